"""Packs the blocks of a source into the tiles that our own kernels read, without changing a weight.

A matrix [rows, columns] becomes [rows / 32, columns / 32, bytes of a tile]. A tile holds one block of each of 32 rows:
first the codes, 4 columns of all rows after one another, then the rows' scales in float16, then in Q4_1 their minimums.
A byte of 4-bit codes holds a column's code in its low half, and in its high half that of the column 16 behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.sources.weights import (
    BLOCK,
    WEIGHTS_AT_ONCE,
    Blocks,
    Bytes,
    Floats,
    LazyTensor,
    Matrix,
    in_threads,
    stack_rows,
    take_rows,
    threads,
)

TILE_ROWS = 32
# Columns whose codes lie side by side.
_SIDE_BY_SIDE = 4

_NOT_IN_BLOCKS = "not in blocks of Q4_0, Q4_1 or Q8_0 alone, and own kernels have no other matrices"

TileType = Literal["Q4_0", "Q4_1", "Q8_0"]
TILE_BYTES: dict[TileType, int] = {"Q4_0": 576, "Q4_1": 640, "Q8_0": 1088}


@dataclass(frozen=True)
class Tiles:
    """A matrix in tiles: `shape` is [rows of tiles, columns of tiles, bytes], and `parts` makes its rows in order."""

    shape: tuple[int, int, int]
    parts: Callable[[], Iterator[Bytes]]


def pack_tiles(name: str, matrix: LazyTensor) -> Tiles:
    """The tiles of `matrix`, packed when `parts` is read.

    Raises ExportError where the matrix has no tiles (see `matrix_obstacle`).
    """
    if (reason := matrix_obstacle(name, matrix)) is not None:
        raise ExportError(reason)
    rows, columns = matrix.shape
    parts = _parts(rows, columns)
    kind = _type(name, matrix, parts)

    def pack(part: slice) -> Bytes:
        blocks = matrix.read(part)
        assert isinstance(blocks, Blocks)
        return _pack(name, blocks, kind)

    def packed() -> Iterator[Bytes]:
        for start in range(0, len(parts), threads()):
            yield from in_threads(pack, parts[start : start + threads()])

    return Tiles((rows // TILE_ROWS, columns // BLOCK, TILE_BYTES[kind]), packed)


def matrix_obstacle(name: str, matrix: LazyTensor) -> str | None:
    """Why the matrix `name` has no tiles, as far as can be told without its weights; None where it has."""
    rows, columns = matrix.shape
    if matrix.bits is None:
        return f"{name} is {_NOT_IN_BLOCKS}"
    if rows % TILE_ROWS or columns % BLOCK:
        return f"{name} has shape [{rows}, {columns}], and own kernels need multiples of {TILE_ROWS}"
    return None


def in_pairs(first: LazyTensor, second: LazyTensor) -> LazyTensor:
    """Two matrices of the same shape as one whose tiles hold 16 rows of the first, then the same rows of the second.

    Only whole tiles of it can be read.
    """
    half = TILE_ROWS // 2

    def read(rows: slice) -> Matrix:
        start, stop = rows.start // 2, rows.stop // 2
        stacked = stack_rows([first.rows(start, stop), second.rows(start, stop)]).load()
        return take_rows(stacked, np.arange(2 * (stop - start)).reshape(2, -1, half).swapaxes(0, 1).reshape(-1))

    bits = first.bits if first.bits == second.bits else None
    return LazyTensor((2 * first.shape[0], first.shape[1]), read, bits)


def _parts(rows: int, columns: int) -> list[slice]:
    """All rows in parts of whole tiles and about WEIGHTS_AT_ONCE weights."""
    step = max(1, WEIGHTS_AT_ONCE // (TILE_ROWS * columns)) * TILE_ROWS
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _type(name: str, matrix: LazyTensor, parts: list[slice]) -> TileType:
    """The smallest type of tile that holds every block of the matrix exactly."""
    if matrix.bits == 4:
        return "Q4_0" if all(in_threads(lambda rows: _is_centred(matrix.read(rows)), parts)) else "Q4_1"
    if matrix.bits == 8 and all(in_threads(lambda rows: _is_centred(matrix.read(rows)), parts)):
        return "Q8_0"
    raise ExportError(f"{name} is {_NOT_IN_BLOCKS}")


def _is_centred(matrix: Matrix) -> bool:
    """Whether a weight is `scale * (code - half the range of codes)` in all blocks."""
    assert isinstance(matrix, Blocks)
    return bool(np.all(matrix.minimums == -(2 ** (matrix.bits - 1)) * matrix.scales))


def _pack(name: str, blocks: Blocks, kind: TileType) -> Bytes:
    codes = blocks.codes
    if blocks.bits == 4:
        codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << np.uint8(4)
    rows, columns = blocks.scales.shape
    tiled = codes.reshape(rows // TILE_ROWS, TILE_ROWS, columns, -1, _SIDE_BY_SIDE).transpose(0, 2, 3, 1, 4)
    parts = [tiled.reshape(rows // TILE_ROWS, columns, -1), _halves(name, blocks.scales)]
    if kind == "Q4_1":
        parts.append(_halves(name, blocks.minimums))
    return np.concatenate(parts, axis=-1)


def _halves(name: str, numbers: Floats) -> Bytes:
    """Numbers [rows, blocks] in float16 as the bytes [rows / 32, blocks, 64] of tiles.

    Raises ExportError where float16 does not hold one exactly, as it does all that a file has in float16.
    """
    halves: NDArray[np.float16] = numbers.astype(np.float16)
    if not np.array_equal(halves, numbers):
        raise ExportError(f"{name} holds a block whose scale or minimum is no float16, and own kernels have no others")
    tiled = halves.reshape(-1, TILE_ROWS, numbers.shape[1]).swapaxes(1, 2)
    return np.ascontiguousarray(tiled).view(np.uint8)
