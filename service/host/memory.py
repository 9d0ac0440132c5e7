"""How much memory this machine or container has, and giving back what is no longer needed. All sizes in bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(root: Path = Path("/")) -> int:
    """The machine's memory, or less where a control group allows less."""
    return min([_physical(), *_group_limits(root)])


def _physical() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _group_limits(root: Path) -> Iterator[int]:
    """The limits of the process's control groups, versions 1 and 2, and of the groups around them.

    In a container the path is often the host's and leads nowhere; then the limit is that of the mounted root.
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
            if limit.isdecimal():  # version 2 says `max` for none
                yield int(limit)


def give_back() -> None:
    """Returns to the system what the C library keeps of memory that was freed: what a burst has needed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
