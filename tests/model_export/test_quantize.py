"""Packing matrices for MatMulNBits."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest

from model_export import sources
from model_export.errors import ExportError
from model_export.graph.quantize import Packed, mixing, pack, pack_rows
from model_export.sources.weights import BLOCK, Blocks, LazyTensor, Matrix, dequantize, lazy, stack_rows, take_rows


def unpack(packed: Packed) -> np.ndarray:
    """The weights [rows, blocks, 32] that the operator uses."""
    codes, zeros = packed.codes, packed.zero_points
    if packed.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], BLOCK)
        if zeros is not None:
            zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(len(zeros), -1)[:, : codes.shape[1]]
    offsets = np.float32(2 ** (packed.bits - 1)) if zeros is None else zeros[..., None].astype(np.float32)
    return packed.scales[..., None] * (codes - offsets)


def blocks(minimum: float, step: float, bits: int = 4) -> Blocks:
    """Six rows of two blocks with random codes, all of one affine scale."""
    codes = np.random.default_rng(3).integers(0, 2**bits, (6, 2, BLOCK), np.uint8)
    scale = np.full((6, 2), step, np.float32)
    return Blocks(codes, scale, np.full((6, 2), minimum, np.float32), bits)


def test_eight_bit_source_is_kept_exactly() -> None:
    """Signed bytes with a scale, as Q8_0 holds them, keep every weight in int8."""
    matrix = blocks(-128 * 0.02, 0.02, bits=8)
    packed = pack(matrix, "int8")
    assert packed.zero_points is None
    np.testing.assert_allclose(unpack(packed).reshape(6, 64), dequantize(matrix), atol=1e-6)


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_integer_zero_point_is_kept_exactly(form: str) -> None:
    """Four-bit codes around an integer zero point keep every weight."""
    matrix = blocks(-5 * 0.5, 0.5)
    np.testing.assert_array_equal(unpack(pack(matrix, form)).reshape(6, 64), dequantize(matrix))


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("step", [0.17, -0.17])
def test_centred_blocks_need_no_zero_points(form: str, step: float) -> None:
    """Blocks as Q4_0 has them, whose steps may be negative, keep every weight around half the range of codes."""
    matrix = blocks(-8 * step, step)
    packed = pack(matrix, form)
    assert packed.zero_points is None
    np.testing.assert_allclose(unpack(packed).reshape(6, 64), dequantize(matrix), rtol=1e-6, atol=1e-6)


def test_sixteen_levels_in_int8() -> None:
    """In int8 the sixteen levels of a block keep their distance, and move together by at most 1/32 of it."""
    matrix = blocks(-1.237, 0.17)
    packed = pack(matrix, "int8")
    moved = unpack(packed).reshape(6, 64) - dequantize(matrix)
    np.testing.assert_allclose(moved, moved[0, 0], atol=1e-6)
    assert 0 < abs(moved[0, 0]) <= 0.17 / 32 + 1e-6
    np.testing.assert_array_equal(packed.scales, np.float32(0.17) / 16)


@pytest.mark.parametrize("minimum", [0.2, -3.0])
def test_levels_on_one_side_of_zero(minimum: float) -> None:
    """Blocks whose range does not hold zero are rounded like floats: no zero point would reach it in finer steps."""
    matrix = blocks(minimum, 0.17)
    matrix.minimums[:2] = -1.237
    weights = dequantize(matrix)
    error = np.abs(unpack(pack(matrix, "int8")).reshape(6, 64) - weights)
    assert error[2:].max() <= np.abs(weights).max() / 255
    assert error[:2].max() <= 0.17 / 32 + 1e-6


def test_float_weights_in_int8() -> None:
    """Float weights move by at most half a step of 1/255 of their block's range, zero included."""
    matrix = np.random.default_rng(4).normal(3, 1, (4, 96)).astype(np.float32)
    error = np.abs(unpack(pack(matrix, "int8")).reshape(4, 96) - matrix)
    assert error.max() <= np.abs(matrix).max() / 255


def test_constant_and_zero_blocks() -> None:
    """A block of equal weights is exact in int8."""
    zeros = np.zeros((2, 32), np.float32)
    np.testing.assert_array_equal(unpack(pack(zeros, "int8")).reshape(2, 32), zeros)
    np.testing.assert_allclose(unpack(pack(blocks(0.75, 0.0), "int8")), 0.75)
    np.testing.assert_array_equal(unpack(pack(blocks(0.0, 0.0), "int8")), 0)


def test_rows_in_eight_bits() -> None:
    """With one scale per row, weights move by at most half a step of 1/255 of their row's range, zero included."""
    matrix = np.random.default_rng(5).normal(0, [[0.1], [5.0], [0.0]], (3, 48)).astype(np.float32)
    packed = pack_rows(matrix, np.eye(48, dtype=np.float32))
    weights = packed.scales[:, None] * (packed.codes.T - packed.zero_points[:, None].astype(np.float32))
    spread = np.ptp(matrix, axis=1, keepdims=True)
    assert (np.abs(weights - matrix) <= spread / 255 * 0.51 + 1e-7).all()


@pytest.mark.parametrize("size", [1, 64, 576])
def test_mixing_spreads_an_outlier(size: int) -> None:
    """Mixing keeps lengths and angles, and spreads a column so that no other gets more than twice the mean share."""
    mix = mixing(size)
    np.testing.assert_allclose(mix @ mix.T, np.eye(size), atol=1e-5)
    assert np.abs(mix).max() <= np.sqrt(2 / size) + 1e-6 or size == 1


def test_rows_are_taken_and_stacked_as_blocks() -> None:
    """Taking and stacking rows commutes with dequantizing; different forms are stacked in float32."""
    four, eight = blocks(-1.2, 0.17), blocks(-2.56, 0.02, bits=8)
    order = np.array([3, 0, 5])
    np.testing.assert_array_equal(dequantize(take_rows(four, order)), dequantize(four)[order])
    assert isinstance(stack_rows([lazy(four), lazy(four)]).load(), Blocks)
    mixed = stack_rows([lazy(four), lazy(eight)])
    assert mixed.bits is None
    both = np.concatenate([dequantize(four), dequantize(eight)])
    np.testing.assert_array_equal(mixed.load(), both)
    np.testing.assert_array_equal(mixed.read(slice(4, 9)), both[4:9])
    np.testing.assert_array_equal(mixed.read(slice(1, 3)), both[1:3])
    np.testing.assert_array_equal(mixed.rows(2, 11).read(slice(3, 8)), both[5:10])


PACKINGS: dict[str, Callable[[Matrix], object]] = {
    "int8": lambda matrix: pack(matrix, "int8"),
    "int4": lambda matrix: pack(matrix, "int4"),
    "rows": lambda matrix: pack_rows(matrix, mixing(64)),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_in_parts(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is packed a few rows at a time gives the same bytes as when it is packed at once.

    Of the first one, only some rows could keep their codes.
    """
    uneven = blocks(-5 * 0.5, 0.5)
    uneven.minimums[4:] -= 0.2
    weights = np.random.default_rng(8).normal(0, 1, (37, 64)).astype(np.float32)
    for matrix in (uneven, blocks(-128 * 0.02, 0.02, bits=8), weights):
        with monkeypatch.context() as patched:
            whole = PACKINGS[packing](matrix)
            patched.setattr(sources.weights, "WEIGHTS_AT_ONCE", 2 * 64)
            assert len(lazy(matrix).parts()) == -(-matrix.shape[0] // 2)
            np.testing.assert_equal(fields(PACKINGS[packing](matrix)), fields(whole))


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_takes_little_memory(packing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the packed matrix only a few parts are in memory, never the whole matrix in float32."""
    monkeypatch.setattr(sources.weights, "WEIGHTS_AT_ONCE", 1 << 14)
    rows, columns = 1 << 12, 64 << 3
    part = np.random.default_rng(9).normal(0, 1, (rows, columns >> 3)).astype(np.float32)
    matrix = LazyTensor((rows, columns), lambda rows: np.tile(part[rows], (1, 8)))
    tracemalloc.start()
    try:
        packed = PACKINGS[packing](matrix)
        stored, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert packed is not None
    assert stored <= 1.25 * rows * columns
    assert peak <= 1.25 * stored + 40 * sources.weights.threads() * (1 << 14) + (1 << 20)


def fields(packed: object) -> object:
    """A packed matrix as something that numpy compares."""
    return list(map(fields, packed)) if isinstance(packed, tuple) else getattr(packed, "__dict__", packed)


def test_reading_in_threads_raises() -> None:
    """An error while any part is read is the error of the whole."""

    def read(rows: slice) -> Matrix:
        if rows.stop == 1 << 12:
            raise ExportError("the last part")
        return np.zeros((rows.stop - rows.start, 1 << 11), np.float32)

    with pytest.raises(ExportError, match="the last part"):
        pack(LazyTensor((1 << 12, 1 << 11), read), "int8")
