"""Quantizes weight matrices for operators on 4-bit and 8-bit integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from model_export.sources.weights import BLOCK, Blocks, Bytes, Floats, LazyTensor, Matrix, dequantize, lazy

# The forms of matrices: plain floats, or blocks of 32 weights with one scale and one zero point. In int4 and int4-int8,
# 4-bit blocks of the source keep their values. All other matrices are rounded to 4 bits in int4, and to 8 bits in
# int4-int8.
Form = Literal["float32", "float16", "int8", "int4", "int4-int8"]
PLAIN_FORMS = ("float32", "float16")

# The type of everything that is not a matrix: activations, norms, the KV cache.
Activations = Literal["float32", "float16"]

# Two 4-bit addends hold a remainder to 5 bits. With one addend, half of the divergence from the source would come from
# the remainders.
MEAN_COPIES = 2

# Rows that are mixed at once, so that they stay in the processor's cache.
_ROWS_MIXED = 1024

# The parts of a block's range that 4-bit codes may span: clipping a few large weights may lower the total error.
RANGES = np.linspace(0.7, 1.06, 13, dtype=np.float32)

# How many columns are mixed at a time: more take longer, fewer spread outliers less.
FEWEST_MIXED, MOST_MIXED = 32, 256


@dataclass(frozen=True)
class Packed:
    """A matrix [rows, columns] as MatMulNBits takes it: a weight is `scale * (code - zero point)` of its block.

    `codes` is [rows, blocks, 4 * bits], weights of 0 fill up the last block; `scales` [rows, blocks]; `zero_points`
    [rows, packed blocks], None where all are half the range. Behind the matrix's own columns lie `block_means` copies
    of one further column per block, which are multiplied by the mean of the activation over that block.
    """

    codes: Bytes
    scales: Floats
    zero_points: Bytes | None
    bits: int
    columns: int
    block_means: int = 0


@dataclass(frozen=True)
class PackedRows:
    """A matrix [rows, columns] in 8 bits with one scale per row: a weight is `scale * (code - zero point)` of its row.

    `codes` is [columns, rows]; `scales` and `zero_points` are [rows]. Codes are signed where `zero_points` is None.
    """

    codes: Bytes | NDArray[np.int8]
    scales: Floats
    zero_points: Bytes | None


def pack_rows(matrix: Matrix | LazyTensor, mix: Floats) -> PackedRows:
    """Packs `matrix` [rows, columns] by rounding to nearest, after `mix` has mixed groups of columns: see `mixing`."""

    def pack_part(part: Matrix) -> tuple[Bytes, Floats, Bytes]:
        codes, scales, zeros = _round_to_nearest(_mixed(part, mix))
        return codes.T, scales, zeros

    codes, scales, zeros = lazy(matrix).joined(pack_part, axis=-1)
    return PackedRows(codes, scales, zeros)


def pack_signed_rows(matrix: Matrix | LazyTensor, mix: Floats) -> PackedRows:
    """The same with signed codes around zero, which processors multiply fastest with unsigned bytes."""

    def pack_part(part: Matrix) -> tuple[NDArray[np.int8], Floats]:
        weights = _mixed(part, mix)
        scales = (np.abs(weights).max(axis=1) / np.float32(127)).astype(np.float32)
        return np.rint(weights * _inverse(scales)[:, None]).astype(np.int8).T, scales

    codes, scales = lazy(matrix).joined(pack_part, axis=-1)
    return PackedRows(codes, scales, None)


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


def mixed_columns(columns: int) -> int:
    """How many columns to mix at a time: up to MOST_MIXED in an even number of groups, or else all of them.

    With an even number of groups a kernel's tile never holds a single group, so results do not depend on how many rows
    a call has.
    """
    sizes = [size for size in range(FEWEST_MIXED, MOST_MIXED + 1) if columns % (2 * size) == 0]
    return max(sizes, default=columns)


def mixing(size: int) -> Floats:
    """An orthogonal matrix [size, size] that spreads an outlier over all columns, so that 8 bits represent a row well.

    It is a cosine transform of the columns, each with a random sign. The signs are the same in every export.
    """
    columns = np.arange(size)
    cosines = np.cos(np.pi / size * np.outer(columns + 0.5, columns)) * np.sqrt(2 / size)
    cosines[:, 0] /= np.sqrt(2)
    signs = np.random.Generator(np.random.Philox(size)).choice([-1.0, 1.0], size)
    return np.asarray(signs[:, None] * cosines, np.float32)


def pack(matrix: Matrix | LazyTensor, form: Literal["int8", "int4", "int4-int8"]) -> Packed:
    """Packs in `form`. Blocks of the source with as many bits keep their values; everything else is rounded."""
    tensor = lazy(matrix)
    if form != "int8" and tensor.bits == 4:
        return _pack_int4_blocks(tensor)
    return _round_to_int4(tensor) if form == "int4" else _pack_int8(tensor)


def pack_with_remainders(
    matrix: Matrix | LazyTensor, form: Literal["int8", "int4", "int4-int8"]
) -> tuple[Packed, Floats | None]:
    """As `pack`, and the float32 remainders [rows, blocks] of 4-bit blocks, which multiply the block means, or None."""
    tensor = lazy(matrix)
    if form == "int8" or tensor.bits != 4:
        return pack(tensor, form), None
    codes, scales, zeros, remainders = tensor.joined(_split_int4)
    packed = Packed(codes, scales, _pack_zero_points(zeros), 4, tensor.shape[1])
    return packed, BLOCK * remainders if remainders.any() else None


def block_means(columns: int) -> Floats:
    """A matrix [columns, columns / 32]; a vector times this matrix is the mean of each block."""
    return np.repeat(np.eye(columns // BLOCK, dtype=np.float32), BLOCK, axis=0) / np.float32(BLOCK)


def in_blocks(weights: Floats) -> Floats:
    """`weights` [rows, columns] as [rows, blocks, 32]; weights of 0 fill up the last block."""
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK)))
    return padded.reshape(len(weights), -1, BLOCK)


def _pack_int8(matrix: LazyTensor) -> Packed:
    exact = matrix.bits is not None and all(matrix.map(_has_integer_zero_points))

    def pack_part(part: Matrix) -> tuple[Bytes, Floats, Bytes]:
        if exact and isinstance(part, Blocks):
            return part.codes, part.scales, _zero_points(part, 255)
        return _round_to_nearest(in_blocks(dequantize(part)))

    codes, scales, zeros = matrix.joined(pack_part)
    centred = bool(np.all((zeros == 128) | (scales == 0)))
    return Packed(codes, scales, None if centred else zeros, 8, matrix.shape[1])


def _has_integer_zero_points(matrix: Matrix) -> bool:
    assert isinstance(matrix, Blocks)
    return bool(np.all(matrix.minimums + matrix.scales * _zero_points(matrix, 255) == 0))


def _pack_int4_blocks(matrix: LazyTensor) -> Packed:
    """Splits each block into `scale * (code - integer zero point)` and a remainder that is constant over the block.

    The remainder times the sum of the block's activations is the rest of the product, so the remainders become further
    columns. One pooling operator computes means instead of sums, so the remainders are stored times the block size.
    """
    codes, scales, zeros, remainders = matrix.joined(_split_int4)
    columns = matrix.shape[1]
    if not remainders.any():
        return Packed(codes, scales, _pack_zero_points(zeros), 4, columns)
    added_codes, added_scales = _share_among_int4_copies(BLOCK * remainders)
    return Packed(
        codes=np.concatenate([codes, _pack_nibbles(added_codes)], axis=1),
        scales=np.concatenate([scales, added_scales], axis=1),
        zero_points=_pack_zero_points(np.concatenate([zeros, np.full(added_scales.shape, 8, np.uint8)], axis=1)),
        bits=4,
        columns=columns + MEAN_COPIES * remainders.shape[1],
        block_means=MEAN_COPIES,
    )


def _split_int4(matrix: Matrix) -> tuple[Bytes, Floats, Bytes, Floats]:
    """Codes, scales, integer zero points [rows, blocks], and the remainders [rows, blocks] that these leave."""
    assert isinstance(matrix, Blocks)
    zeros = _zero_points(matrix, 15)
    return _pack_nibbles(matrix.codes), matrix.scales, zeros, matrix.minimums + matrix.scales * zeros


def _round_to_int4(matrix: LazyTensor) -> Packed:
    codes, scales, zeros = matrix.joined(lambda part: _best_int4(dequantize(part)))
    return Packed(codes, scales, _pack_zero_points(zeros), 4, matrix.shape[1])


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
    """8-bit codes, scales and zero points of blocks [..., weights]; their range covers a block's weights and zero.

    A block of weights on 16 evenly spaced levels around zero uses every 17th code: only its offset is rounded.
    """
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    scales = ((high - low) / 255).astype(np.float32)
    inverse = _inverse(scales)
    zeros = np.rint(-low * inverse)
    codes = np.clip(np.rint(blocks * inverse[..., None]) + zeros[..., None], 0, 255)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _share_among_int4_copies(values: Floats) -> tuple[Bytes, Floats]:
    """4-bit codes around 8, and their scales, of `values` split into MEAN_COPIES addends side by side.

    Columns come in blocks of 32, the last one padded with zeros. Each copy also holds the rounding errors of those
    before it.
    """
    rows, columns = values.shape
    copies = np.concatenate([values] * MEAN_COPIES, axis=1)
    blocks = np.pad(copies, ((0, 0), (0, -copies.shape[1] % BLOCK))).reshape(rows, -1, BLOCK)
    extremes = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)[..., 0]
    scales = (extremes / (-8 * MEAN_COPIES)).astype(np.float32)
    steps = np.repeat(scales, BLOCK, axis=1)
    inverse = _inverse(steps)
    codes = np.full(steps.shape, 8, np.uint8)
    rest = values.copy()
    for copy in range(MEAN_COPIES):
        place = slice(copy * columns, (copy + 1) * columns)
        share = np.clip(np.rint(rest * inverse[:, place] / (MEAN_COPIES - copy)), -8, 7)
        rest -= share * steps[:, place]
        codes[:, place] = share + 8
    return codes.reshape(rows, -1, BLOCK), scales


def _pack_nibbles(codes: Bytes) -> Bytes:
    return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)


def _pack_zero_points(zeros: Bytes) -> Bytes:
    return _pack_nibbles(np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2))))
