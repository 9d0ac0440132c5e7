"""The model as a GPU runs it: padded calls of few shapes, tensors apart from the host, the same results."""

from __future__ import annotations

import numpy as np
import pytest

from service import manifest
from service.engine.cache import Copy
from service.engine.ort.device import Cpu
from service.engine.ort.model import Model
from service.engine.sampler import Shortlist, whole
from service.errors import StartupError
from tests.model_export import tiny
from tests.support.fake_gpu import StandIn

CONTEXT, SLOTS = 64, 6
# Calls of other widths sum in another order, in float16.
CLOSE = {"rtol": 0, "atol": 0.05}


def load(directory, device, slots=SLOTS):
    described = manifest.load(directory)
    return Model(
        directory, described, slots=slots, context_length=CONTEXT, threads=1, batch_invariant=True, device=device
    )


@pytest.fixture
def device():
    """The fake GPU."""
    return StandIn()


@pytest.fixture
def gpu(directory, device):
    """The model on the fake GPU."""
    return load(directory, device)


@pytest.fixture(scope="module")
def plain(directory):
    """The same model on the CPU, where nothing is padded."""
    return load(directory, Cpu())


@pytest.fixture(scope="module")
def tokens():
    """Random tokens."""
    return np.random.default_rng(5).integers(0, tiny.VOCAB, CONTEXT).tolist()


def prompt(model, slot, tokens, cuts=()):
    start = 0
    for end in (*cuts, len(tokens)):
        rows = model.forward(slot, [tokens[start:end]], [start], [(0, end - start - 1)])
        start = end
    return whole(rows[0]).copy()


def decode(model, rows, past):
    at = [(index, 0) for index, row in enumerate(rows) if row is not None]
    got = model.forward(0, [[] if row is None else [row] for row in rows], past, at)
    return np.stack([whole(row).copy() for row in got])


@pytest.mark.parametrize("cuts", [(), (16,), (5, 6, 30), (1, 2)])
def test_prompts_whole_and_in_chunks(gpu, plain, tokens, cuts):
    """A prompt gives the same logits padded and cut in any way."""
    expected = prompt(plain, 1, tokens[:45])
    np.testing.assert_allclose(prompt(gpu, 1, tokens[:45], cuts), expected, **CLOSE)


def test_a_ragged_batch(gpu, plain, tokens):
    """Rows of different lengths, some of which sit out, each get what they get without padding."""
    lengths = [20, 3, 41, 9, 30]
    for model in (gpu, plain):
        for slot, length in enumerate(lengths):
            prompt(model, slot, tokens[slot : slot + length])
    rows = [5, None, 7, 8, 9]
    np.testing.assert_allclose(decode(gpu, rows, lengths), decode(plain, rows, lengths), **CLOSE)
    assert decode(gpu, rows, [21, 3, 42, 10, 31]).shape == (4, tiny.VOCAB)


def test_padding_leaves_other_slots_as_they_are(gpu, plain, tokens):
    """Padded steps leave the slots beyond the batch, and those of empty rows, unchanged."""
    for model in (gpu, plain):
        for slot in range(SLOTS):
            prompt(model, slot, tokens[: 10 + slot])
    for step in range(8):
        decode(gpu, [1, None, 2], [10 + step, 11, 12 + step])
    for slot in (1, 3, 4, 5):
        length = 10 + slot
        after = [whole(model.forward(slot, [[7]], [length], [(0, 0)])[0]).copy() for model in (gpu, plain)]
        np.testing.assert_allclose(*after, **CLOSE)


def test_a_full_slot(gpu, plain, tokens):
    """The last positions of a slot can be read, although padding takes room as well."""
    expected = prompt(plain, 0, tokens)
    np.testing.assert_allclose(prompt(gpu, 0, tokens, (33, 50)), expected, **CLOSE)
    decode(gpu, [None, 3], [CONTEXT, 0])
    again = whole(gpu.forward(0, [tokens[-2:]], [CONTEXT - 2], [(0, 1)])[0])
    np.testing.assert_allclose(again, expected, **CLOSE)


def test_copies_between_slots(gpu, plain, tokens, device):
    """A prompt continues in another slot, and in a third from there, after copies of its own positions only."""
    expected = prompt(plain, 0, tokens[:30])
    prompt(gpu, 0, tokens[:28])
    gpu.copy([Copy(0, 4, 28), Copy(4, 2, 28)])
    assert not device.driver.copies
    continued = gpu.forward(2, [tokens[28:30]], [28], [(0, 1)])[0]
    np.testing.assert_allclose(whole(continued), expected, **CLOSE)


def test_steps_of_generated_tokens_recur(gpu, tokens, device):
    """Any number of rows takes the shape of a power of two, each bound once and captured by a number of its own."""
    for slot in range(SLOTS):
        prompt(gpu, slot, tokens[:9])
    device.runs.clear()
    for _ in range(2):
        for count in range(1, SLOTS + 1):
            decode(gpu, [4] * count, [9] * count)
    by_rows = [device.runs[at][0] for at in (0, 1, 2, 3, 4, 5)]
    assert (by_rows[2], by_rows[4]) == (by_rows[3], by_rows[5])
    assert len({*by_rows}) == 4
    assert None not in by_rows
    assert [graph for graph, _ in device.runs[6:]] == by_rows
    assert len({id(binding) for _, binding in device.runs}) == 4
    steps = {shape.rows: call for shape, call in gpu.calls.items() if shape.decodes}
    assert set(steps) == {1, 2, 4, 8}
    assert all(call.total_sequence_length[0] == CONTEXT for call in steps.values())


def test_prompts_are_not_captured(gpu, tokens, device):
    """A prompt's slot and length differ from call to call: its widths are powers of two, and nothing is captured."""
    for slot in range(SLOTS):
        for width in (2, 3, 9, 16, 17):
            prompt(gpu, slot, tokens[:width])
    assert {graph for graph, _ in device.runs} == {None}
    assert {shape.width for shape in gpu.calls} == {2, 4, 16, 32}


def test_captured_steps_outlast_prompts_of_all_shapes(directory, device):
    """A step is captured once: it keeps its number however many prompts, in however many shapes, come in between."""
    gpu = load(directory, device, slots=32)
    decode(gpu, [4] * 32, [0] * 32)
    before = len(device.driver.memory)
    for slot in range(32):
        for width in range(2, CONTEXT + 1):  # near a slot's end padding has less room: any width is a shape then
            gpu.forward(slot, [[1] * width], [CONTEXT - width], [(0, width - 1)])
    decode(gpu, [4] * 32, [0] * 32)
    assert [graph for graph, _ in device.runs if graph is not None] == [0, 0]
    assert len(device.driver.memory) == before + gpu.kept_bindings


def test_prompts_of_common_shapes_are_bound_once(directory, device):
    """Prompts of any slot and width are bound once without logits, as all chunks but the last, with one, and scored."""
    gpu = load(directory, device, slots=32)
    gpu.forward(0, [[1] * CONTEXT], [0], [(0, at) for at in range(CONTEXT)])  # results grow, and all is bound anew
    device.runs.clear()
    calls = [(slot, 1 << power, logits) for slot in range(32) for power in range(1, 7) for logits in (0, 1, 1 << power)]
    for _ in range(2):
        for slot, width, logits in calls:
            gpu.forward(slot, [[1] * width], [0], [(0, at) for at in range(logits)])
    bindings = [id(binding) for _, binding in device.runs]
    assert bindings[: len(calls)] == bindings[len(calls) :]


def without_room_once(driver):
    """Has the driver's next `allocate` fail, and gives the list of sizes that it and all later ones are asked for."""
    sizes, allocate = [], driver.allocate

    def once(size):
        sizes.append(size)
        if len(sizes) == 1:
            raise StartupError("NVIDIA's driver: cuMemAlloc_v2 failed: out of memory")
        return allocate(size)

    driver.allocate = once
    return sizes


def test_results_that_cannot_grow_stay_as_they_are(gpu, plain, tokens, device):
    """If there is no memory for a long prompt's logits, only that call fails; steps before and after are right."""
    driver = device.driver
    for model in (gpu, plain):
        prompt(model, 0, tokens[:9])
        decode(model, [4], [9])
    held, scores = {*driver.memory, *driver.host}, [(0, at) for at in range(40)]
    sizes = without_room_once(driver)
    with pytest.raises(StartupError, match="out of memory"):
        gpu.forward(1, [tokens[:40]], [0], scores)
    assert sizes[0] > 40 * tiny.VOCAB * 4
    assert {*driver.memory, *driver.host} == held
    np.testing.assert_allclose(decode(gpu, [5], [10]), decode(plain, [5], [10]), **CLOSE)
    assert {*driver.memory, *driver.host} == held
    scored = [[whole(row).copy() for row in model.forward(1, [tokens[:40]], [0], scores)] for model in (gpu, plain)]
    np.testing.assert_allclose(*scored, **CLOSE)


def test_results_that_have_grown(gpu, plain, tokens, device):
    """After a long prompt's scores steps go on by graphs of new numbers: the old ones write where no one reads."""
    for model in (gpu, plain):
        prompt(model, 0, tokens[:9])
        decode(model, [4], [9])
        model.forward(1, [tokens[:40]], [0], [(0, at) for at in range(40)])
    for step in range(2):
        row = decode(gpu, [5], [10 + step])
        np.testing.assert_allclose(row, decode(plain, [5], [10 + step]), **CLOSE)
    assert [graph for graph, _ in device.runs if graph is not None] == [0, 1, 1]


class Unbindable:
    """A session whose bindings take all but one input."""

    def __init__(self, session, name):
        self.session, self.name = session, name

    def io_binding(self):
        self.binding = self.session.io_binding()
        return self

    def bind_input(self, name, *place):
        if name == self.name:
            raise RuntimeError(f"no binding of {name}")
        self.binding.bind_input(name, *place)

    def bind_output(self, name, *place):
        self.binding.bind_output(name, *place)


@pytest.mark.parametrize("name", ["input_ids", "logits_idx", "total_sequence_length", "past_key.0"])
def test_a_call_that_cannot_be_bound_leaves_nothing(gpu, tokens, monkeypatch, name, device):
    """The memory for a call's inputs is freed if binding fails at any input."""
    prompt(gpu, 0, tokens[:2])
    driver = device.driver
    held = {*driver.memory, *driver.host}
    with monkeypatch.context() as patched:
        patched.setattr(gpu, "_session", Unbindable(gpu._session, name))
        with pytest.raises(RuntimeError, match=f"no binding of {name}"):
            prompt(gpu, 0, tokens[:9])
    assert {*driver.memory, *driver.host} == held
    prompt(gpu, 0, tokens[:9])


def test_what_is_bound_is_given_back(gpu, tokens, device):
    """Calls that are forgotten give their memory back; keys and values stay where they are."""
    gpu.kept_bindings = 3
    before = len(device.driver.memory)
    for slot in range(SLOTS):
        for width in (2, 4, 8, 16):
            prompt(gpu, slot, tokens[:width])
    assert len(device.driver.memory) == before + 3
    gpu.forward(0, [tokens[:40]], [0], [(0, at) for at in range(40)])
    assert len(device.driver.memory) == before + 1


def test_only_the_likeliest_come_to_the_host(gpu, tokens, device):
    """A step brings 64 candidates a row; a whole row comes when it is asked for, and is right."""
    prompt(gpu, 0, tokens[:9])
    driver = device.driver
    driver.sent = driver.fetched = 0
    (row,) = gpu.forward(0, [[4]], [9], [(0, 0)])
    assert isinstance(row, Shortlist)
    assert driver.fetched == 8 * (64 * (4 + 8) + 4)  # room for eight rows
    assert driver.sent < 2048
    logits = row.whole()
    assert driver.fetched == 8 * (64 * (4 + 8) + 4) + tiny.VOCAB * 4
    likeliest = np.argsort(-logits, kind="stable")[: len(row.ids)]
    assert np.array_equal(row.ids, likeliest)
    assert np.array_equal(row.logits, logits[likeliest])
    assert row.normalizer == pytest.approx(np.log(np.exp(logits.astype(np.float64)).sum()), abs=1e-5)


def test_several_rows_of_several_tokens_are_refused(gpu):
    """Attention without lengths of rows takes one prompt at a time: anything else is an error before it runs."""
    with pytest.raises(ValueError, match="2 rows, some of several tokens"):
        gpu.forward(0, [[1, 2], [3]], [0, 0], [])
    with pytest.raises(ValueError, match=f"do not fit a slot of {CONTEXT}"):
        gpu.forward(0, [[1]], [CONTEXT], [])
