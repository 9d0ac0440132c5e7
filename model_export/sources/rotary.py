"""Rotary position embeddings: the frequency of each pair of a head, and its scaling for longer contexts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.sources.field_types import ROTATED_HEAD

Frequencies = NDArray[np.float64]


@dataclass(frozen=True)
class Rotary:
    """The rotation of queries and keys.

    `frequencies` [pairs] are in radians per position. Of a head's first 2 x pairs numbers, number i is rotated together
    with number i + pairs; the rest stays. `scale` multiplies the rotated numbers. The rotation holds for texts of at
    most `longest` positions, of any length if `longest` is None.
    """

    frequencies: Frequencies
    scale: float = 1.0
    longest: int | None = None


def checked_size(size: int, head_dim: int) -> int:
    """The `size` of the rotated part of a head. Raises ExportError where the attention operator does not support it."""
    if size == head_dim or (0 < size < head_dim and size % ROTATED_HEAD == 0):
        return size
    raise ExportError(
        f"rotating {size} of a head's {head_dim} numbers is not supported, only all or multiples of {ROTATED_HEAD}"
    )


def plain(size: int, base: float, factors: NDArray[np.float32] | float = 1.0) -> Frequencies:
    """Radians per position for each pair of `size` numbers, divided by `factors`."""
    return base ** (-np.arange(0, size, 2, dtype=np.float64) / size) / factors


def llama3(frequencies: Frequencies, factor: float, low: float, high: float, original: int) -> Frequencies:
    """Llama 3's scaling.

    A frequency with fewer than `low` turns within the `original` context is divided by `factor`, one with more than
    `high` turns is kept, and those in between are interpolated.
    """
    turns = original * frequencies / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (kept + (1 - kept) / factor)


def yarn(
    size: int, base: float, factor: float, original: int, *, beta_fast: float = 32, beta_slow: float = 1
) -> Frequencies:
    """YaRN's scaling.

    Pairs with more than `beta_fast` turns within the `original` context keep their frequency, those with fewer than
    `beta_slow` turns have it divided by `factor`, and those in between are interpolated by their index. Raises
    ExportError where `beta_fast` and `beta_slow` give no such range of pairs.
    """
    if base <= 1:
        raise ExportError(f"YaRN needs a rotary base above 1, not {base:g}")

    def index_of(count: float) -> float:
        return size * math.log(original / (count * 2 * math.pi)) / (2 * math.log(base))

    first, last = max(math.floor(index_of(beta_fast)), 0), min(math.ceil(index_of(beta_slow)), size - 1)
    if last < first:
        raise ExportError(
            f"YaRN from {beta_fast:g} to {beta_slow:g} turns within {original} positions is not supported"
        )
    slowed = np.clip((np.arange(size // 2) - first) / max(last - first, 0.001), 0, 1)
    return plain(size, base) * (slowed / factor + 1 - slowed)


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's factor of queries and keys."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_scale(factor: float, original: int) -> float:
    """LongRoPE's factor of queries and keys, for a context `factor` times as long as the `original` one."""
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
