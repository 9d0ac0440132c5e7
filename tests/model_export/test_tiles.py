"""Packing blocks into the tiles of our own kernels."""

from __future__ import annotations

import numpy as np
import pytest

from model_export.errors import ExportError
from model_export.graph import tiles as module
from model_export.graph.tiles import TILE_BYTES, in_pairs, pack_tiles
from model_export.sources.weights import Blocks, dequantize, lazy, stack_rows
from tests.support.reference_kernels import untiled


def random_blocks(kind: str, rows: int, columns: int, seed: int = 0) -> Blocks:
    """Random blocks as a GGUF file of this type has them."""
    rng, bits = np.random.default_rng(seed), 8 if kind == "Q8_0" else 4
    codes = rng.integers(0, 2**bits, (rows, columns // 32, 32), np.uint8)
    scales = rng.normal(0, 0.1, codes.shape[:2]).astype(np.float16).astype(np.float32)
    minimums = -(2 ** (bits - 1)) * scales
    if kind == "Q4_1":
        minimums = rng.normal(0, 1, scales.shape).astype(np.float16).astype(np.float32)
    return Blocks(codes, scales, minimums, bits)


def packed(matrix: Blocks) -> np.ndarray:
    tiles = pack_tiles("a matrix", lazy(matrix))
    found = np.concatenate(list(tiles.parts()))
    assert found.shape == tiles.shape
    return found


@pytest.mark.parametrize("kind", TILE_BYTES)
@pytest.mark.parametrize("shape", [(32, 32), (96, 224), (32, 1536), (1056, 64)])
@pytest.mark.parametrize("at_once", [1, 1 << 21])
def test_tiles_hold_every_weight(
    kind: str, shape: tuple[int, int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each type has its own size of tile, and the weights in it are exactly those of the blocks, in any parts."""
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", at_once)
    matrix = random_blocks(kind, *shape)
    found = packed(matrix)
    assert found.shape == (shape[0] // 32, shape[1] // 32, TILE_BYTES[kind])
    np.testing.assert_array_equal(untiled(found), dequantize(matrix))


@pytest.mark.parametrize(("kind", "at"), [("Q4_1", 1 * 128 + 7 * 4 + 2), ("Q8_0", 5 * 128 + 7 * 4 + 2)])
def test_one_byte(kind: str, at: int) -> None:
    """The code of row 7 and column 22, in 4 bits beside that of column 6, is where the kernels read it."""
    matrix = random_blocks(kind, 32, 32)
    found = packed(matrix)[0, 0, at]
    codes = matrix.codes[7, 0]
    assert found == (codes[6] | codes[22] << 4 if kind == "Q4_1" else codes[22])
    scales = packed(matrix)[0, 0, -128 if kind == "Q4_1" else -64 :][:64].view(np.float16)
    np.testing.assert_array_equal(scales, matrix.scales[:, 0])


def test_blocks_around_another_zero_have_minimums() -> None:
    """A matrix of Q4_0 needs none, and a single block of it with another minimum does."""
    matrix = random_blocks("Q4_0", 64, 64)
    assert packed(matrix).shape[-1] == TILE_BYTES["Q4_0"]
    matrix.minimums[63, 1] = 0.5
    assert packed(matrix).shape[-1] == TILE_BYTES["Q4_1"]
    np.testing.assert_array_equal(untiled(packed(matrix)), dequantize(matrix))


def test_blocks_of_zeros() -> None:
    """A scale of zero keeps its tile, and its weights are zero."""
    matrix = random_blocks("Q8_0", 32, 64)
    matrix.scales[3], matrix.minimums[3] = 0, -0.0
    assert not untiled(packed(matrix))[3].any()


@pytest.mark.parametrize("at_once", [1, 1 << 21])
def test_pairs(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile holds 16 rows of the first matrix, then the same rows of the second."""
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", at_once)
    first, second = random_blocks("Q4_1", 96, 64), random_blocks("Q4_0", 96, 64, seed=1)
    tiles = pack_tiles("pairs", in_pairs(lazy(first), lazy(second)))
    weights = untiled(np.concatenate(list(tiles.parts()))).reshape(6, 2, 16, 64)
    np.testing.assert_array_equal(weights[:, 0].reshape(96, 64), dequantize(first))
    np.testing.assert_array_equal(weights[:, 1].reshape(96, 64), dequantize(second))


def scaled(kind: str, **changes: float) -> Blocks:
    matrix = random_blocks(kind, 32, 32)
    for name, value in changes.items():
        getattr(matrix, name)[5, 0] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (lazy(random_blocks("Q4_1", 40, 32)), r"a matrix has shape \[40, 32\], and own kernels need multiples of 32"),
        (lazy(np.zeros((32, 32), np.float32)), "a matrix is not in blocks of Q4_0, Q4_1 or Q8_0 alone"),
        (stack_rows([lazy(random_blocks(kind, 32, 32)) for kind in ("Q4_1", "Q8_0")]), "is not in blocks of"),
        (in_pairs(lazy(random_blocks("Q4_1", 32, 32)), lazy(random_blocks("Q8_0", 32, 32))), "is not in blocks of"),
        (lazy(scaled("Q8_0", minimums=1)), "a matrix is not in blocks of Q4_0, Q4_1 or Q8_0 alone"),
        (lazy(scaled("Q4_1", minimums=1 + 2**-12)), "a block whose scale or minimum is no float16"),
        (lazy(scaled("Q4_1", scales=1e6)), "a block whose scale or minimum is no float16"),
    ],
)
def test_what_has_no_tiles(matrix, said: str) -> None:
    """One sentence says what does not fit."""
    with np.errstate(over="ignore"), pytest.raises(ExportError, match=said):
        list(pack_tiles("a matrix", matrix).parts())
