"""The real model: what a sequence gets never depends on who shares its calls, to the last bit."""

from __future__ import annotations

import itertools
import mmap
import resource
from pathlib import Path

import numpy as np
import pytest

from service import manifest
from service.engine.cache import Copy
from service.engine.ort.device import granule, row_bytes
from service.engine.ort.model import Model

CONTEXT = 192
SLOTS = 33


@pytest.fixture(scope="module")
def model(model_dir):
    """The default model with short slots."""
    described = manifest.load(model_dir)
    return Model(model_dir, described, slots=SLOTS, context_length=CONTEXT, threads=2, batch_invariant=True)


@pytest.fixture(scope="module")
def tokens(model):
    """Random tokens."""
    return np.random.default_rng(7).integers(100, model.vocab_size, 160).tolist()


def prompt(model, slot, tokens, cuts):
    """Computes a prompt in a slot, cut at `cuts`; gives the last logits."""
    for start, end in itertools.pairwise([0, *cuts, len(tokens)]):
        logits = model.forward(slot, [tokens[start:end]], [start], [(0, end - start - 1)])
    return logits[0].copy()


def decode(model, rows, past):
    """One token for each of slots 0.., None for one that sits out; gives the logits of the others."""
    at = [(index, 0) for index, row in enumerate(rows) if row is not None]
    return model.forward(0, [[] if row is None else [row] for row in rows], past, at).copy()


def anonymous():
    """The memory of this process that is not of files, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def test_memory_is_taken_by_position_and_given_back(model, model_dir, tokens):
    """What a slot takes are its positions, by whole pages, wherever they came from; it gives back what it drops."""
    layout, slot, other = manifest.read(model_dir).kv, SLOTS - 1, SLOTS - 2
    kept = -(-65 // granule(layout)) * granule(layout)
    copied = -(-65 // layout.tile) * layout.tile * row_bytes(layout)  # in whole tiles, and then in whole pages
    copied = -(-copied // mmap.PAGESIZE) * mmap.PAGESIZE / row_bytes(layout)
    for _ in range(3):  # so that onnxruntime has taken what it needs
        prompt(model, slot, tokens, [])
    model.copy([Copy(slot, other, 65), Copy(slot, slot, 0), Copy(other, other, 0)])
    begun = anonymous()

    def held():
        """The positions that have memory by now, as far as the rest of the process keeps still."""
        return (anonymous() - begun) / layout.bytes_per_token

    prompt(model, slot, tokens, [])
    assert held() == pytest.approx(160, abs=8)
    model.copy([Copy(slot, slot, 65)])
    assert held() == pytest.approx(kept, abs=8)
    model.copy([Copy(slot, other, 65)])
    assert held() == pytest.approx(kept + copied, abs=8)
    model.copy([Copy(slot, other, 30, moves=True)])
    assert held() == pytest.approx(32, abs=8)
    model.copy([Copy(other, other, 0)])
    assert held() == pytest.approx(0, abs=8)


def test_a_slot_that_gave_memory_back_keeps_the_rest(model, tokens):
    """The positions that are kept have the same bits as before, in the slot and where they were moved."""
    whole = prompt(model, 2, tokens, [])
    model.copy([Copy(2, 2, 50)])
    assert np.array_equal(model.forward(2, [tokens[50:]], [50], [(0, len(tokens) - 51)])[0], whole)
    model.copy([Copy(2, 3, 50, moves=True)])
    assert np.array_equal(model.forward(3, [tokens[50:]], [50], [(0, len(tokens) - 51)])[0], whole)


@pytest.mark.parametrize("cuts", [[64, 128], [2, 100], [158], [127], [43], [86], [21, 64], [33, 35, 99]])
def test_prompt_in_chunks_gives_the_same_bits(model, tokens, cuts):
    """Logits after a prompt do not depend on where it is cut, as long as no chunk leaves one token to a tile."""
    whole = prompt(model, 0, tokens, [])
    assert np.array_equal(prompt(model, 1, tokens, cuts), whole)


def test_decoding_gives_the_same_bits_in_any_company(model, tokens):
    """A row's logits are the same by itself, among others, and beside empty rows."""
    lengths = [40, 41, 60, 25]

    def fresh():
        for slot, length in enumerate(lengths):
            prompt(model, slot, tokens[slot : slot + length], [])

    fresh()
    batch = decode(model, [5, 6, 7, 8], lengths)
    fresh()
    assert np.array_equal(decode(model, [5], lengths[:1])[0], batch[0])
    fresh()
    assert np.array_equal(decode(model, [5, 6], lengths[:2]), batch[:2])
    fresh()
    assert np.array_equal(decode(model, [None, 6, None, 8], lengths), batch[[1, 3]])


def test_decoding_gives_the_same_bits_in_a_batch_of_any_size(model, tokens):
    """A row's logits are the same in batches of one to all slots, wherever in them it is."""
    whole = prompt(model, 0, tokens[:40], [])
    model.copy([Copy(source=0, target=slot, length=40) for slot in range(1, SLOTS)])
    alone = decode(model, [5], [40])[0]
    assert not np.array_equal(alone, whole)
    for rows in range(2, SLOTS + 1):
        batch = decode(model, [5] * rows, [40] * rows)
        assert all(np.array_equal(row, alone) for row in batch), f"{rows} rows"


def test_sitting_out_leaves_a_slot_as_it_is(model, tokens):
    """A slot whose row is empty decodes afterwards as if nothing had happened."""
    prompt(model, 0, tokens[:30], [])
    prompt(model, 1, tokens[:30], [])
    expected = decode(model, [9, 9], [30, 30])[0]
    prompt(model, 0, tokens[:30], [])
    prompt(model, 1, tokens[:30], [])
    decode(model, [None, 9], [30, 30])
    assert np.array_equal(decode(model, [9, None], [30, 31])[0], expected)


def test_copied_positions_are_as_good_as_computed_ones(model, tokens):
    """A prompt continued in another slot after a copy of its beginning gives the same bits."""
    whole = prompt(model, 2, tokens, [128])
    model.copy([Copy(source=2, target=4, length=158)])
    continued = model.forward(4, [tokens[158:]], [158], [(0, 1)])[0]
    assert np.array_equal(continued, whole)


def test_positions_beyond_the_slot_are_refused(model, tokens):
    """A call that would write beyond a slot or a buffer is an error before it runs."""
    with pytest.raises(ValueError, match=f"do not fit a slot of {CONTEXT}"):
        model.forward(0, [tokens[:30]], [CONTEXT - 29], [])
    with pytest.raises(ValueError, match=rf"not within 0\.\.{SLOTS - 1}"):
        model.forward(SLOTS - 1, [[1], [1]], [0, 0], [])


def test_unused_positions_take_no_memory(model_dir, tokens):
    """One short prompt in each of many long slots takes memory for its own positions, not for the slots' length."""
    described = manifest.load(model_dir)
    long = Model(model_dir, described, slots=16, context_length=8192, threads=2, batch_invariant=True)
    long.forward(0, [tokens[:2]], [0], [(0, 1)])
    before = resident_bytes()
    for slot in range(16):
        long.forward(slot, [tokens[:2]], [0], [(0, 1)])
    a_whole_slot = 8192 * described.kv.bytes_per_token
    assert resident_bytes() - before < a_whole_slot / 2


def resident_bytes():
    """The memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
