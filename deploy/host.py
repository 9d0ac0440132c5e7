"""Refuses a machine that Envoy's package cannot run on, in one sentence, before anything is installed or exported.

It runs with any Python 3, and has no type annotations because old versions know few.
"""

import os
import platform
import re
import sys

PYTHON = (3, 11)
# Envoy's wheel was built for this version; onnxruntime's wheel also runs on older ones.
GLIBC = (2, 31)
MACHINES = ("x86_64", "aarch64")


def problem():  # noqa: ANN201, see above
    """The reason why the service and Envoy cannot run on this machine, or None."""
    if not sys.platform.startswith("linux"):
        return f"this system is {sys.platform}, and Envoy's package is for Linux"
    if platform.machine() not in MACHINES:
        return "this machine is {}, and Envoy's package is for {}".format(platform.machine(), " and ".join(MACHINES))
    libc = glibc()
    wanted = "Envoy's package needs glibc {}.{} or later".format(*GLIBC)
    if libc is None:
        return f"this system has another C library than glibc (musl, as in Alpine?), and {wanted}"
    if libc < GLIBC:
        return f"this system has glibc {libc[0]}.{libc[1]}, and {wanted}"
    if sys.version_info < PYTHON:
        wanted = "the service needs Python {}.{} or later; PYTHON3=python3.12 names another".format(*PYTHON)
        return f"this is Python {platform.python_version()}, and {wanted}"
    return None


def glibc():  # noqa: ANN201, see above
    """The version of glibc that this Python runs on; None where that is another C library."""
    try:
        name = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    found = re.match(r"glibc (\d+)\.(\d+)", name)
    return (int(found.group(1)), int(found.group(2))) if found else None


if __name__ == "__main__":
    sys.exit("cannot run here: " + problem() if problem() else 0)
