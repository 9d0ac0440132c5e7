"""The pages of a file that a library has mapped: they leave this process's memory once they have been read."""

from __future__ import annotations

import ctypes
import mmap
import os
from dataclasses import dataclass
from pathlib import Path

_MAPS = Path("/proc/self/maps")


@dataclass(frozen=True)
class Mappings:
    """Where a file is mapped: addresses and lengths in bytes. Valid only while what has mapped it still holds it."""

    places: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, path: Path) -> Mappings:
        """The mappings of the file that cannot be written; none where the system does not list them."""
        name = os.path.realpath(path)
        try:
            rows = [line.split(maxsplit=5) for line in _MAPS.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):
            return cls(())
        found = []
        for place, rights, *others in rows:
            if others[3:] == [name] and "w" not in rights:
                start, end = (int(address, 16) for address in place.split("-"))
                found.append((start, end - start))
        return cls(tuple(found))

    def give_back(self) -> None:
        """Takes the file's pages out of this process's memory; those that are used again are read again."""
        for start, length in self.places:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)
