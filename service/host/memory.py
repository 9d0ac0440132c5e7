"""Reads how much memory this machine or container has, and returns freed memory to the system. All sizes in bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# By version of control groups: the files of the limit and of the use, and the part of the use that is given up first.
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = ("memory.max", "memory.current", "inactive_file")


def available(root: Path = Path("/")) -> int:
    """The memory of the machine, or the limit of a control group if that is lower."""
    return min([_physical(), *(limit for limit, _ in _groups(root))])


def free(root: Path = Path("/")) -> int:
    """The memory that the process could take now: what is free on the machine, and below the limits of its groups."""
    on_machine = _table(root / "proc/meminfo").get("MemAvailable:", _physical() >> 10) << 10
    return max(0, min([on_machine, *(limit - used for limit, used in _groups(root))]))


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the process's control groups, versions 1 and 2, and of their parents, where there is a limit.

    In a container the path is often the host's and does not exist; then the limit of the mounted root applies.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, (most, used, cached) = root / "sys/fs/cgroup", _VERSION_2
        elif "memory" in controllers.split(","):
            mount, (most, used, cached) = root / "sys/fs/cgroup/memory", _VERSION_1
        else:
            continue
        group = PurePosixPath(path)
        for folder in (mount / each.relative_to("/") for each in (group, *group.parents)):
            limit, use = _read(folder / most).strip(), _read(folder / used).strip()
            if limit.isdecimal():  # version 2 writes `max` for no limit
                yield int(limit), int(use or 0) - _table(folder / "memory.stat").get(cached, 0)


def _read(path: Path) -> str:
    """The text of a file; nothing if it does not exist."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _table(path: Path) -> dict[str, int]:
    """The numbers in a file of lines that begin with a name and a number."""
    return {words[0]: int(words[1]) for words in map(str.split, _read(path).splitlines()) if len(words) > 1}


def trim() -> None:
    """Returns freed memory that the C library still holds, such as after a burst of requests, to the system."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
