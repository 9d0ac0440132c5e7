"""SHA-256 of files, by blocks, so that several threads can hash one file."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

BLOCK_BYTES: Final = 64 << 20
_READ_BYTES = 1 << 20


def pool() -> ThreadPoolExecutor:
    """As many threads as there are cores; hashing runs beside other Python code."""
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hashing")


def count(size: int) -> int:
    """How many blocks a file of `size` bytes has; the last one may be shorter."""
    return -(-size // BLOCK_BYTES)


def block(path: Path, number: int) -> str:
    """The SHA-256 of a file's block, in lower-case hex. Raises OSError when the file cannot be read."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_READ_BYTES))
    with path.open("rb", buffering=0) as file:
        file.seek(number * BLOCK_BYTES)
        left = BLOCK_BYTES
        while left and (size := file.readinto(buffer[:left])):
            digest.update(buffer[:size])
            left -= size
    return digest.hexdigest()


def blocks(path: Path) -> tuple[str, ...]:
    """The SHA-256 of every block of a file, in order."""
    with pool() as threads:
        return tuple(threads.map(lambda number: block(path, number), range(count(path.stat().st_size))))
