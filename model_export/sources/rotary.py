"""Rotary position embeddings: how fast each pair of a head turns, as models scale it for longer texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError

Frequencies = NDArray[np.float64]


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys.

    `frequencies` [pairs] are in radians per position, for a rotation that pairs the first half of a head's first
    2 x pairs numbers with the second half; numbers behind those stay. `scale` multiplies what is rotated. It holds for
    texts of at most `longest` positions, of any length where that is None.
    """

    frequencies: Frequencies
    scale: float = 1.0
    longest: int | None = None


def checked_size(size: int, head_dim: int) -> int:
    """How many numbers of a head rotate. Raises ExportError for a number that the attention operator does not take."""
    if size == head_dim or (0 < size < head_dim and size % 16 == 0):
        return size
    raise ExportError(f"rotating {size} of a head's {head_dim} numbers is not supported, only all or multiples of 16")


def factors(values: Sequence[float]) -> NDArray[np.float32]:
    """Factors of frequencies, one per pair."""
    return np.array(values, np.float32)


def plain(size: int, base: float, factors: NDArray[np.float32] | float = 1.0) -> Frequencies:
    """Radians per position for each pair of `size` numbers, slowed down by `factors`."""
    return base ** (-np.arange(0, size, 2, dtype=np.float64) / size) / factors


def llama3(frequencies: Frequencies, factor: float, low: float, high: float, original: int) -> Frequencies:
    """Llama 3's scaling.

    A wave of which less than `low` turns fit into the `original` context is slowed down by `factor`, one of which more
    than `high` turns fit is kept, and those between are blended.
    """
    turns = original * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    scaled: Frequencies = frequencies * (kept + (1 - kept) / factor)
    return scaled


def yarn(size: int, base: float, factor: float, original: int, turns: tuple[float, float] = (32, 1)) -> Frequencies:
    """YaRN's scaling.

    Pairs that turn more than the first of `turns` times in the `original` context are kept, those that turn less than
    the second slowed down by `factor`, and those between blended by their index. Raises ExportError where that is no
    order of pairs.
    """
    fast, slow = turns
    if base <= 1:
        raise ExportError(f"YaRN needs a rotary base above 1, not {base:g}")

    def index_of(count: float) -> float:
        return size * math.log(original / (count * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(index_of(fast)), 0), min(math.ceil(index_of(slow)), size - 1)
    if last < first:
        raise ExportError(f"YaRN from {fast:g} to {slow:g} turns within {original} positions is not supported")
    slowed = np.clip((np.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)
    frequencies = plain(size, base)
    blended: Frequencies = frequencies * (slowed / factor + 1 - slowed)
    return blended


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """What YaRN multiplies queries and keys with."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scale(factor: float, original: int) -> float:
    """What LongRoPE multiplies queries and keys with, for a context `factor` times the `original` one."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
