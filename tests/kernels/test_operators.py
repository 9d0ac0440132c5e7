"""The operators of the kernel library: right numbers, and the same bits however the work is cut, batched and shared."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest

import kernels
from tests.kernels.tiny import TILE, Decoder, Floats, Running, Sizes, over_library

pytestmark = pytest.mark.skipif(kernels.library() is None or not kernels.target(), reason="no own kernels here")

SHAPES = {
    "default": Sizes(),
    "one head of keys": Sizes(heads=7, kv_heads=1, head_dim=64, kinds=("q8_0",) * 5),
    "as many heads of keys": Sizes(hidden=128, heads=4, kv_heads=4, head_dim=64, mlp=96, kinds=("q4_0",) * 5),
    "wide heads": Sizes(hidden=64, heads=4, kv_heads=2, head_dim=128, mlp=32, kinds=("q4_1",) * 5),
    "odd head": Sizes(hidden=160, heads=15, kv_heads=3, head_dim=96, mlp=64, layers=1),
}
TOKENS = 300


def decoder(shape: str) -> Decoder:
    return Decoder(SHAPES[shape], np.random.default_rng(1))


def tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, 64, count)]


def whole(running: Running, ids: Sequence[int], slot: int = 0) -> Floats:
    """The logits after each token of a prompt that is read in one call."""
    (logits,) = running.step([ids], [0], slot)
    return logits


def same(one: Floats, other: Floats) -> bool:
    return bool(np.array_equal(one.view(np.uint32), other.view(np.uint32)))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_float_products_are_exact(shape: str, half: bool) -> None:
    """With float activations the logits are NumPy's, up to the rounding of sums."""
    made, ids = decoder(shape), tokens(TOKENS)
    got = whole(over_library(made, half=half, threads=2, in_float=True), ids)
    # A cached number may be rounded to float16 the other way where float32 and float64 differ.
    np.testing.assert_allclose(got, made.expected(ids, half=half), atol=5e-4 if half else 2e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_integer_products_are_near(shape: str) -> None:
    """8-bit activations cost little: the mean error is a few hundredths of what the logits vary."""
    made, ids = decoder(shape), tokens(TOKENS)
    expected = made.expected(ids, half=True)
    got = whole(over_library(made, half=True, threads=2), ids)
    assert np.sqrt(np.mean((got - expected) ** 2)) < 0.03 * expected.std()
    assert not same(got, whole(over_library(made, half=True, threads=2, in_float=True), ids))


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_cut_anywhere(shape: str, half: bool) -> None:
    """A prompt's logits have the same bits however it is cut into calls, down to single tokens."""
    made, ids = decoder(shape), tokens(TOKENS)
    running = over_library(made, half=half, threads=2)
    reference = whole(running, ids)
    random = np.random.default_rng(2)
    cuts = [[128, 128, 44], [7] * 42 + [6], [129, 129, 42], [2, 3, 4, 5, 6, 280], [1, 299], [299, 1], [1] * TOKENS]
    cuts += [np.diff([0, *sorted(random.choice(TOKENS, 8, replace=False)), TOKENS]).tolist() for _ in range(3)]
    for cut in cuts:
        starts = [0, *itertools.accumulate(cut)]
        parts = [running.step([ids[a:b]], [a], 1)[0] for a, b in itertools.pairwise(starts)]
        assert same(np.concatenate(parts), reference), cut


@pytest.mark.parametrize("rows", [2, 3, 5, 6, 7, 8, 13, 16])
@pytest.mark.parametrize("shape", ["default", "one head of keys"])
def test_company(shape: str, rows: int) -> None:
    """Each row of a batch has the bits that it has alone, in another slot; rows of several, one and no tokens."""
    running, random = over_library(decoder(shape), half=True, threads=2, slots=rows + 1), np.random.default_rng(rows)
    for lengths in ([1] * rows, random.integers(0, 9, rows).tolist(), random.integers(0, 40, rows).tolist()):
        past = random.integers(1, 200, rows).tolist()
        ids = [tokens(before + length, seed) for seed, (before, length) in enumerate(zip(past, lengths, strict=True))]
        for slot in range(rows):
            whole(running, ids[slot][: past[slot]], slot)
        together = running.step([each[before:] for each, before in zip(ids, past, strict=True)], past)
        for slot in range(rows):
            alone = whole(running, ids[slot], rows)[past[slot] :]
            assert same(together[slot], alone), (lengths, slot)


@pytest.mark.parametrize("threads", [1, 3, 8, 64])
def test_threads(threads: int) -> None:
    """Any number of threads gives the same bits, also more than there are processors."""
    made, ids = decoder("default"), tokens(TOKENS)
    one, many = (over_library(made, half=True, threads=count, slots=32) for count in (2, threads))
    assert same(whole(one, ids), whole(many, ids))
    for rows in (1, 4, 9, 32):
        batch = [tokens(40 + row, row) for row in range(rows)]
        for past in ([0] * rows, [len(row) - 1 for row in batch]):
            wanted = [row[before:] for row, before in zip(batch, past, strict=True)]
            for got, expected in zip(many.step(wanted, past), one.step(wanted, past), strict=True):
                assert same(got, expected)


def test_copies_are_whole_tiles() -> None:
    """The first positions of a slot continue in another one, and neither sees what the other writes later."""
    running, ids = over_library(decoder("default"), half=True, threads=2), tokens(TOKENS)
    reference = whole(running, ids)
    for length in (1, TILE - 1, TILE, TILE + 1, 127, 128, 200):
        running.copy(0, 1, length)
        others = tokens(50, seed=9)
        running.step([others], [length], 1)
        assert same(running.step([ids[length:]], [length], 0)[0], reference[length:]), length
        running.copy(0, 1, length)
        assert same(running.step([ids[length:]], [length], 1)[0], reference[length:]), length


def test_calls_outside_the_cache() -> None:
    """A position beyond the cache, more tokens than there are, and tokens outside the table are refused."""
    running = over_library(decoder("default"), half=True, threads=1)
    for ids, past, words in (
        ([[1]], [512], "up to position 512, and there are 512"),
        ([tokens(20)], [500], "up to position 519, and there are 512"),
        ([[1]], [-1], "1 of 1 tokens up to position -1"),
        ([[64]], [0], "token 64 is not within 0..63"),
        ([[-1]], [0], "token -1 is not within 0..63"),
    ):
        with pytest.raises(Exception, match=words):
            running.step(ids, past)


def test_graphs_whose_sizes_lie() -> None:
    """Weights that do not fit each other are refused when the graph is loaded, in a sentence."""
    sizes = Sizes(head_dim=16, heads=12, kv_heads=4)
    with pytest.raises(Exception, match="head_dim must be a multiple of 32 up to 256, and is 16"):
        over_library(Decoder(sizes, np.random.default_rng(1)), half=True, threads=1)
    broken = decoder("default")
    first = broken.layers[0]
    first["down"] = first["output"]
    with pytest.raises(Exception, match="down must have 96 outputs of 160 inputs, and has 96 of 192"):
        over_library(broken, half=True, threads=1)
    broken = decoder("default")
    cut = broken.layers[0]["qkv"]
    broken.layers[0]["qkv"] = dataclasses.replace(cut, tiles=cut.tiles[..., :600])
    with pytest.raises(Exception, match="qkv has tiles of 600 bytes: Q4_0 has 576, Q4_1 640, Q8_0 1088"):
        over_library(broken, half=True, threads=1)
