"""What this machine's processor can do, where it decides which kernels are right and quick."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

# With it, onnxruntime multiplies unsigned by unsigned bytes where signed ones could overflow their 16-bit sums.
EXACT_BYTES_OPTION = "session.x64quantprecision"

_DOT_PRODUCTS = {"avx512_vnni", "avx_vnni"}


@functools.cache
def has_byte_dot_products() -> bool:
    """Whether unsigned times signed bytes are summed exactly in 32 bits, which is quick as well."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return not _DOT_PRODUCTS.isdisjoint(flags.split())


def byte_options() -> dict[str, str]:
    """The session options under which products of bytes are exact on this processor."""
    return {} if has_byte_dot_products() else {EXACT_BYTES_OPTION: "1"}
