"""The weight matrices of a source: plain float32, or blocks of small integers with a scale and a minimum."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

BLOCK = 32

# How many weights are read and converted at a time, and by how many threads at most. What is computed from them takes
# about ten times 4 bytes per weight and thread.
WEIGHTS_AT_ONCE = 1 << 21
MOST_THREADS = 8

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

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk: its shape, and the function that reads rows of it.

    All rows are read as Blocks of `bits`, or all as float32 where `bits` is None. `read` may be called by several
    threads at once.
    """

    shape: tuple[int, ...]
    read: Callable[[slice], Matrix]
    bits: int | None = None

    def load(self) -> Matrix:
        """The whole tensor."""
        return self.read(slice(0, self.shape[0]))

    def rows(self, start: int, stop: int) -> LazyTensor:
        """The matrix of the rows from `start` up to `stop`."""

        def read(rows: slice) -> Matrix:
            return self.read(slice(start + rows.start, start + rows.stop))

        return LazyTensor((stop - start, *self.shape[1:]), read, self.bits)

    def parts(self) -> list[slice]:
        """All rows in their order, in nearly equal parts of about WEIGHTS_AT_ONCE weights."""
        rows = self.shape[0]
        weights = rows * (self.shape[1] if len(self.shape) > 1 else 1)
        count = max(1, min(rows, -(-weights // WEIGHTS_AT_ONCE)))
        ends = [rows * part // count for part in range(count + 1)]
        return [slice(start, stop) for start, stop in pairwise(ends)]

    def map(self, function: Callable[[Matrix], Result]) -> list[Result]:
        """The result of `function` for each of `parts`, computed by several threads."""
        return in_threads(lambda rows: function(self.read(rows)), self.parts())

    def joined(self, function: Callable[[Matrix], Sequence[NDArray[Any]]], axis: int = 0) -> list[NDArray[Any]]:
        """The arrays that `function` makes of each of `parts`, joined along `axis`, on which the parts' rows lie.

        Only the joined arrays and a part for each thread are in memory at the same time.
        """
        first, *others = self.parts()
        made = function(self.read(first))
        whole = [_grown(array, axis, self.shape[0]) for array in made]

        def fill(rows: slice, arrays: Sequence[NDArray[Any]]) -> None:
            for target, array in zip(whole, arrays, strict=True):
                target.swapaxes(0, axis)[rows] = array.swapaxes(0, axis)

        fill(first, made)
        del made
        in_threads(lambda rows: fill(rows, function(self.read(rows))), others)
        return whole


def threads() -> int:
    """How many threads convert weights: one for each core, up to MOST_THREADS."""
    return min(MOST_THREADS, len(os.sched_getaffinity(0)))


def in_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results of `function` for all `items`, in their order, computed by several threads."""
    if threads() == 1 or len(items) <= 1:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads()) as pool:
        return list(pool.map(_with_errors_as_here(function), items))


def _with_errors_as_here(function: Callable[[Item], Result]) -> Callable[[Item], Result]:
    """`function`, with this thread's treatment of floating-point errors in whatever thread calls it."""
    treatment: Any = np.geterr()

    def call(item: Item) -> Result:
        with np.errstate(**treatment):
            return function(item)

    return call


def _grown(array: NDArray[Any], axis: int, rows: int) -> NDArray[Any]:
    """An empty array of the shape and type of `array`, but `rows` long on `axis`."""
    shape = list(array.shape)
    shape[axis] = rows
    return np.empty(shape, array.dtype)


def lazy(matrix: Matrix | LazyTensor) -> LazyTensor:
    """The matrix as a LazyTensor, also if it is in memory already."""
    if isinstance(matrix, LazyTensor):
        return matrix
    bits = matrix.bits if isinstance(matrix, Blocks) else None
    return LazyTensor(matrix.shape, lambda rows: take_rows(matrix, rows), bits)


def dequantize(matrix: Matrix) -> Floats:
    """The weights as float32 [rows, columns]."""
    if not isinstance(matrix, Blocks):
        return matrix
    return (matrix.scales[..., None] * matrix.codes + matrix.minimums[..., None]).reshape(matrix.shape)


def is_finite(matrix: Matrix) -> bool:
    """Whether every weight is a finite number."""
    parts = (matrix.scales, matrix.minimums) if isinstance(matrix, Blocks) else (matrix,)
    return all(bool(np.isfinite(part).all()) for part in parts)


def take_rows(matrix: Matrix, rows: NDArray[np.int64] | slice) -> Matrix:
    """The matrix of the given rows, in their order."""
    if not isinstance(matrix, Blocks):
        return matrix[rows]
    return Blocks(matrix.codes[rows], matrix.scales[rows], matrix.minimums[rows], matrix.bits)


def stack_rows(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """The matrices stacked; blocks stay blocks if all have the same number of bits."""
    bits = tensors[0].bits if len({tensor.bits for tensor in tensors}) == 1 else None
    ends = np.cumsum([tensor.shape[0] for tensor in tensors]).tolist()

    def read(rows: slice) -> Matrix:
        found = []
        for tensor, end in zip(tensors, ends, strict=True):
            begin = end - tensor.shape[0]
            start, stop = max(rows.start, begin), min(rows.stop, end)
            if start < stop:
                found.append(tensor.read(slice(start - begin, stop - begin)))
        return _stacked(found, bits)

    return LazyTensor((ends[-1], *tensors[0].shape[1:]), read, bits)


def _stacked(matrices: Sequence[Matrix], bits: int | None) -> Matrix:
    if len(matrices) == 1:
        return matrices[0] if bits is not None else dequantize(matrices[0])
    if bits is None:
        return np.concatenate([dequantize(matrix) for matrix in matrices])
    blocks = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
    return Blocks(
        np.concatenate([matrix.codes for matrix in blocks]),
        np.concatenate([matrix.scales for matrix in blocks]),
        np.concatenate([matrix.minimums for matrix in blocks]),
        bits,
    )
