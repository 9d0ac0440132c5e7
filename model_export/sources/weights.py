"""The weight matrices of a source: plain float32, or blocks of small integers with a scale and a minimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] in blocks of 32 columns: a weight is `scale * code + minimum` of its block.

    `codes` is [rows, columns / 32, 32]; `scales` and `minimums` are [rows, columns / 32]; a code is below 2 ** `bits`.
    """

    codes: Bytes
    scales: Floats
    minimums: Floats
    bits: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape[0], self.codes.shape[1] * BLOCK


Matrix = Blocks | Floats


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk: its shape, and the function that reads it."""

    shape: tuple[int, ...]
    load: Callable[[], Matrix]

    def rows(self, start: int, stop: int) -> LazyTensor:
        """The matrix of the rows from `start` up to `stop`."""
        return LazyTensor((stop - start, *self.shape[1:]), lambda: take_rows(self.load(), np.arange(start, stop)))


def dequantize(matrix: Matrix) -> Floats:
    """The weights as float32 [rows, columns]."""
    if not isinstance(matrix, Blocks):
        return matrix
    return (matrix.scales[..., None] * matrix.codes + matrix.minimums[..., None]).reshape(matrix.shape)


def is_finite(matrix: Matrix) -> bool:
    """Whether every weight is a finite number."""
    parts = (matrix.scales, matrix.minimums) if isinstance(matrix, Blocks) else (matrix,)
    return all(bool(np.isfinite(part).all()) for part in parts)


def take_rows(matrix: Matrix, rows: NDArray[np.int64]) -> Matrix:
    """The matrix of the given rows, in their order."""
    if not isinstance(matrix, Blocks):
        return matrix[rows]
    return Blocks(matrix.codes[rows], matrix.scales[rows], matrix.minimums[rows], matrix.bits)


def stack_rows(matrices: Sequence[Matrix]) -> Matrix:
    """The matrices stacked; blocks stay blocks if all have the same number of bits."""
    blocks = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
    if len(blocks) == len(matrices) and len({matrix.bits for matrix in blocks}) == 1:
        return Blocks(
            np.concatenate([matrix.codes for matrix in blocks]),
            np.concatenate([matrix.scales for matrix in blocks]),
            np.concatenate([matrix.minimums for matrix in blocks]),
            blocks[0].bits,
        )
    return np.concatenate([dequantize(matrix) for matrix in matrices])
