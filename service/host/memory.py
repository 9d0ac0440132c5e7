"""Reads how much memory this machine or container has, and returns freed memory to the system. All sizes in bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(root: Path = Path("/")) -> int:
    """The memory of the machine, or the limit of a control group if that is lower."""
    return min([_physical(), *_group_limits(root)])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of the process's control groups, versions 1 and 2, and of their parent groups.

    In a container the path is often the host's and does not exist; then the limit of the mounted root applies.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(path)
        for folder in (group, *group.parents):
            try:
                limit = (mount / folder.relative_to("/") / name).read_text(encoding="utf-8").strip()
            except OSError:
                continue
            if limit.isdecimal():  # version 2 writes `max` for no limit
                yield int(limit)


def trim() -> None:
    """Returns freed memory that the C library still holds, such as after a burst of requests, to the system."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
