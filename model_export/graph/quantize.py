"""Quantizes weight matrices for operators on 4-bit and 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model_export.sources.weights import BLOCK, Blocks, Bytes, Floats, LazyTensor, Matrix, dequantize, lazy

# The forms of matrices: plain floats, or blocks of 32 weights with one scale and one zero point.
Form = Literal["float32", "float16", "int8", "int4"]
BlockForm = Literal["int8", "int4"]
PLAIN_FORMS = ("float32", "float16")

# The type of everything that is not a matrix: activations, norms, the KV cache.
Activations = Literal["float32", "float16"]

# Rows that are mixed at once, so that they stay in the processor's cache.
_ROWS_MIXED = 1024

# The parts of a block's range that 4-bit codes may span: clipping a few large weights may lower the total error.
RANGES = np.linspace(0.7, 1.06, 13, dtype=np.float32)

# The steps of an 8-bit code in one of a 4-bit code. All 16 levels then have a code, and a zero point in the middle is
# 128, which needs no array of zero points.
_FINER = 16


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as MatMulNBits takes it: a weight is `scale * (code - zero point)` of its block.

    `codes` is [rows, blocks, 4 * bits], weights of 0 fill up the last block; `scales` [rows, blocks]; `zero_points`
    [rows, packed blocks], None where all are half the range.
    """

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None
    bits: int
    columns: int


@dataclass(frozen=True)
class PackedRows:
    """A matrix [rows, columns] in 8 bits with one scale per row: a weight is `scale * (code - zero point)` of its row.

    `codes` is [columns, rows]; `scales` and `zero_points` are [rows].
    """

    codes: Bytes
    scales: Floats
    zero_points: Bytes


def pack_rows(matrix: Matrix | LazyTensor, mix: Floats) -> PackedRows:
    """Packs `matrix` [rows, columns] by rounding to nearest, after `mix` has mixed the columns: see `mixing`."""

    def pack_part(part: Matrix) -> tuple[Bytes, Floats, Bytes]:
        codes, scales, zeros = _round_to_nearest(_mixed(part, mix))
        return codes.T, scales, zeros

    codes, scales, zeros = lazy(matrix).joined(pack_part, axis=-1)
    return PackedRows(codes, scales, zeros)


def _mixed(matrix: Matrix, mix: Floats) -> Floats:
    weights = dequantize(matrix)
    rows = weights.reshape(-1, len(mix))
    mixed = np.empty_like(rows)
    # Not a matrix product, whose last bits depend on the number of rows.
    for start in range(0, len(rows), _ROWS_MIXED):
        part = rows[start : start + _ROWS_MIXED]
        total = part[:, :1] * mix[0]
        for column in range(1, len(mix)):
            total += part[:, column : column + 1] * mix[column]
        mixed[start : start + _ROWS_MIXED] = total
    return mixed.reshape(weights.shape)


def mixing(size: int) -> Floats:
    """An orthogonal matrix [size, size] that spreads an outlier over all columns, so that 8 bits represent a row well.

    It is a cosine transform of the columns, each with a random sign. The signs are the same in every export.
    """
    columns = np.arange(size)
    cosines = np.cos(np.pi / size * np.outer(columns + 0.5, columns)) * np.sqrt(2 / size)
    cosines[:, 0] /= np.sqrt(2)
    signs = np.random.Generator(np.random.Philox(size)).choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * cosines, np.float32)


def pack(matrix: Matrix | LazyTensor, form: BlockForm) -> Packed:
    """Packs in `form`.

    Blocks of the source keep their values where the form has codes for them: in int8 those of 8 bits with an integer
    zero point; in int4 those of 4 bits with an integer zero point; and in int8 those of 4 bits as well, with a zero
    point rounded to a sixteenth of their step. Everything else is rounded.
    """
    tensor = lazy(matrix)
    return _pack_int4(tensor) if form == "int4" else _pack_int8(tensor)


def in_blocks(weights: Floats) -> Floats:
    """`weights` [rows, columns] as [rows, blocks, 32]; weights of 0 fill up the last block."""
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK)))
    return padded.reshape(len(weights), -1, BLOCK)


def _pack_int8(matrix: LazyTensor) -> Packed:
    exact = _has_integer_zero_points(matrix, 8)

    def pack_part(part: Matrix) -> tuple[Bytes, Floats, Bytes]:
        if isinstance(part, Blocks):
            if exact:
                return part.codes, part.scales, _zero_points(part, 255)
            if part.bits == 4:
                return _on_finer_steps(part)
        return _round_to_nearest(in_blocks(dequantize(part)))

    codes, scales, zeros = matrix.joined(pack_part)
    return Packed(codes, scales, None if _is_centred(zeros, scales, 128) else zeros, 8, matrix.shape[1])


def _on_finer_steps(blocks: Blocks) -> tuple[Bytes, Floats, Bytes]:
    """8-bit codes, scales and zero points of 4-bit blocks, on a grid of a sixteenth of their step around zero.

    A block that is constant, or whose weights lie too far on one side of zero, is rounded as floats are.
    """
    scales = (blocks.scales / np.float32(_FINER)).astype(np.float32)
    exact = np.divide(-blocks.minimums, scales, out=np.zeros_like(scales), where=scales != 0)
    zeros = np.rint(exact)
    fits = np.where(scales != 0, (zeros >= 0) & (zeros <= 255), blocks.minimums == 0)
    codes, zeros = blocks.codes * np.uint8(_FINER), np.where(fits, zeros, 0).astype(np.uint8)
    if not fits.all():
        rounded = _round_to_nearest(in_blocks(dequantize(blocks))[~fits])
        codes[~fits], scales[~fits], zeros[~fits] = rounded
    return codes, scales, zeros


def _pack_int4(matrix: LazyTensor) -> Packed:
    exact = _has_integer_zero_points(matrix, 4)

    def pack_part(part: Matrix) -> tuple[Bytes, Floats, Bytes]:
        if exact and isinstance(part, Blocks):
            return _pack_nibbles(part.codes), part.scales, _zero_points(part, 15)
        return _best_int4(dequantize(part))

    codes, scales, zeros = matrix.joined(pack_part)
    packed = None if _is_centred(zeros, scales, 8) else _pack_zero_points(zeros)
    return Packed(codes, scales, packed, 4, matrix.shape[1])


def _has_integer_zero_points(matrix: LazyTensor, bits: int) -> bool:
    """Whether the matrix is in blocks of so many bits, each with a zero point that is one of its codes."""

    def holds(part: Matrix) -> bool:
        assert isinstance(part, Blocks)
        return bool(np.all(part.minimums + part.scales * _zero_points(part, 2**bits - 1) == 0))

    return matrix.bits == bits and all(matrix.map(holds))


def _is_centred(zeros: Bytes, scales: Floats, middle: int) -> bool:
    return bool(np.all((zeros == middle) | (scales == 0)))


def _best_int4(weights: Floats) -> tuple[Bytes, Floats, Bytes]:
    """4-bit codes, scales and zero points of `weights` [rows, columns], each block in the best of several ranges.

    For each range the weights are rounded to codes, and the scale is the one with the least squared error for them.
    """
    blocks = in_blocks(weights)
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    best = np.full(low.shape, np.inf, np.float32)
    codes, scales, zeros = np.zeros(blocks.shape, np.uint8), np.zeros_like(low), np.zeros(low.shape, np.uint8)
    for clip in RANGES:
        scale = clip * (high - low) / 15
        inverse = _inverse(scale)
        below = np.clip(np.floor(-clip * low * inverse), 0, 15)
        for zero in (below, np.clip(below + 1, 0, 15)):
            steps = np.clip(np.rint(blocks * inverse[..., None]), -zero[..., None], 15 - zero[..., None])
            squares = np.square(steps).sum(axis=-1)
            fitted = np.divide((blocks * steps).sum(axis=-1), squares, out=np.zeros_like(scale), where=squares != 0)
            error = np.square(blocks - fitted[..., None] * steps).sum(axis=-1)
            better = error < best
            best[better], scales[better], zeros[better] = error[better], fitted[better], zero[better]
            codes[better] = (steps + zero[..., None])[better]
    return _pack_nibbles(codes), scales, zeros


def _inverse(values: NDArray[Any]) -> NDArray[Any]:
    """1 / `values`, in their type, and 0 where a value is 0."""
    inverse = np.zeros_like(values)
    np.divide(1, values, out=inverse, where=values != 0)
    return inverse


def _zero_points(matrix: Blocks, largest: int) -> Bytes:
    """The nearest integer zero point of each block."""
    exact = np.divide(-matrix.minimums, matrix.scales, out=np.zeros_like(matrix.scales), where=matrix.scales != 0)
    return np.clip(np.rint(exact), 0, largest).astype(np.uint8)


def _round_to_nearest(blocks: Floats) -> tuple[Bytes, Floats, Bytes]:
    """8-bit codes, scales and zero points of blocks [..., weights]; their range covers a block's weights and zero."""
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    scales = ((high - low) / 255).astype(np.float32)
    inverse = _inverse(scales)
    zeros = np.rint(-low * inverse)
    codes = np.clip(np.rint(blocks * inverse[..., None]) + zeros[..., None], 0, 255)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _pack_nibbles(codes: Bytes) -> Bytes:
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def _pack_zero_points(zeros: Bytes) -> Bytes:
    return _pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
