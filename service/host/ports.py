"""Finds the process that listens on a port of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LISTENING = "0A"


def listener(port: int, proc: Path = Path("/proc")) -> int | None:
    """The id of the process that listens on a TCP port; None if it is not visible, such as another user's process."""
    sockets = {f"socket:[{inode}]" for inode in _inodes(port, proc)}
    if not sockets:
        return None
    for process in proc.glob("[0-9]*"):
        if not sockets.isdisjoint(_open_files(process)):
            return int(process.name)
    return None


def _open_files(process: Path) -> Iterator[str]:
    """The link targets of a process's open descriptors, without those that are closed in the meantime."""
    try:
        descriptors = list((process / "fd").iterdir())
    except OSError:
        return
    for descriptor in descriptors:
        with suppress(OSError):
            yield str(descriptor.readlink())


def _inodes(port: int, proc: Path) -> Iterator[str]:
    for table in ("net/tcp", "net/tcp6"):
        try:
            lines = (proc / table).read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            _, local, _, state, *rest = line.split()
            if state == _LISTENING and int(local.rpartition(":")[2], 16) == port:
                yield rest[5]
