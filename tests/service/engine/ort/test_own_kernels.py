"""The default model over our own kernels: near its source, and the same bits in any company, chunks and slot."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest

from deploy import local
from model_export.export import Options, export
from model_export.opening import read_source
from model_export.verify.verify import kl_divergence
from service import manifest
from service.engine.cache import Copy, KVCache
from service.engine.engine import Engine
from service.engine.ort.model import Model
from service.engine.scheduler import Scheduler
from service.host import kernels
from service.text.tokenizer import Tokenizer
from service.types import Prompt
from tests.model_export.test_default_model import HELD_OUT
from tests.support.engines import collect
from tests.support.fakes import request

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=f"own kernels: {kernels.why_not()}")

SLOTS, CONTEXT = 33, 320


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The default model, exported for our own kernels."""
    folder = tmp_path_factory.mktemp("own") / "model"
    options = Options(kernels="own", verify_tokens=128)
    export(local.default_weights(), folder, options, lambda *_: lambda: None)
    return folder


def load(directory, threads=2, slots=SLOTS, context_length=CONTEXT):
    described = manifest.load(directory)
    shape = {"slots": slots, "context_length": context_length, "threads": threads, "batch_invariant": True}
    return Model(directory, described, **shape)


@pytest.fixture(scope="module")
def model(directory):
    return load(directory)


@pytest.fixture(scope="module")
def tokenizer(directory):
    described = manifest.load(directory)
    return Tokenizer(directory / "tokenizer.json", described.special_tokens, described.vocab_size)


@pytest.fixture(scope="module")
def tokens(model):
    """Random tokens."""
    return np.random.default_rng(7).integers(100, model.vocab_size, 300).tolist()


def prompt(model, slot, tokens, cuts=()):
    """Computes a prompt in a slot, cut at `cuts`; gives the last logits."""
    for start, end in itertools.pairwise([0, *cuts, len(tokens)]):
        logits = model.forward(slot, [tokens[start:end]], [start], [(0, end - start - 1)])
    return logits[0].copy()


def continued(model, slot, tokens, length):
    """The logits after `tokens`, of which the slot holds the first `length`."""
    return model.forward(slot, [tokens[length:]], [length], [(0, len(tokens) - length - 1)])[0].copy()


def test_the_distribution_is_the_sources(directory, model, tokenizer):
    """On a held-out text the model is within 0.005 nats per token of its source, and so was the export's own text."""
    described = manifest.load(directory)
    assert (described.kernels, described.kv.dtype, described.quality.kl <= 0.005) == ("own", "float16", True)
    tokens = np.array(tokenizer.encode(HELD_OUT)[:CONTEXT])
    expected = read_source(local.default_weights()).logits(tokens, lambda: None)
    found = model.forward(0, [tokens.tolist()], [0], [(0, at) for at in range(len(tokens))])
    assert kl_divergence(expected, found) <= 0.005


@pytest.mark.parametrize("cuts", [[128], [1], [299], [64, 65, 66], [17, 33, 100, 228], [*range(19, 300, 19)]])
def test_prompts_cut_anywhere(model, tokens, cuts):
    """A prompt gives the same bits in any chunks, of single tokens too."""
    assert np.array_equal(prompt(model, 3, tokens, cuts), prompt(model, 0, tokens))


@pytest.mark.parametrize("rows", [1, 2, 6, 7, 12, pytest.param(SLOTS, marks=pytest.mark.slow)])
def test_decoding_in_any_company(model, tokens, rows):
    """A row has the same bits by itself, among any others, in any slot, and beside rows that sit out."""
    lengths = [20 + 3 * slot for slot in range(rows)]
    for slot, length in enumerate(lengths):
        prompt(model, slot, tokens[slot : slot + length])
    together = model.forward(0, [[5 + slot] for slot in range(rows)], lengths, [(row, 0) for row in range(rows)]).copy()
    for slot, length in enumerate(lengths):
        assert np.array_equal(model.forward(slot, [[5 + slot]], [length], [(0, 0)])[0], together[slot])
    some = [[5 + slot] if slot % 2 == 0 else [] for slot in range(rows)]
    found = model.forward(0, some, lengths, [(row, 0) for row in range(0, rows, 2)])
    assert np.array_equal(found, together[::2])


def test_a_checked_token_has_the_bits_of_a_generated_one(model, tokens):
    """Several positions at once give what they give one by one."""
    prompt(model, 0, tokens[:150])
    one_by_one = [model.forward(0, [[token]], [150 + at], [(0, 0)])[0].copy() for at, token in enumerate(tokens[:8])]
    at_once = model.forward(0, [tokens[:8]], [150], [(0, at) for at in range(8)])
    assert np.array_equal(at_once, np.stack(one_by_one))


@pytest.mark.parametrize("length", [1, 15, 16, 17, 127, 129, 200])
def test_copies_and_forks(model, tokens, length):
    """A copied prefix continues with the same bits, and neither copy sees what the other writes behind it."""
    tokens = tokens[:210]
    whole, other = prompt(model, 0, tokens), prompt(model, 1, tokens[:length] + tokens[:40])
    prompt(model, 2, tokens[:length])
    prompt(model, 4, tokens[::-1])
    model.copy([Copy(2, 4, length)])
    assert np.array_equal(continued(model, 4, tokens, length), whole)
    assert np.array_equal(continued(model, 2, tokens[:length] + tokens[:40], length), other)
    model.copy([Copy(4, 4, length)])
    assert np.array_equal(continued(model, 4, tokens, length), whole)
    model.copy([Copy(4, 5, length, moves=True)])
    assert np.array_equal(continued(model, 5, tokens, length), whole)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(directory, model, tokens, threads):
    """A prompt and a decode step have the same bits."""
    other = load(directory, threads, slots=4)
    assert np.array_equal(prompt(other, 0, tokens, [128]), prompt(model, 0, tokens))
    for each in (model, other):
        each.copy([Copy(0, slot, 300) for slot in (1, 2, 3)])
    steps = [each.forward(0, [[7]] * 4, [300] * 4, [(row, 0) for row in range(4)]).copy() for each in (model, other)]
    assert np.array_equal(*steps)


TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "Once upon a time, in a village by the sea, there stood",
    "def add(a, b):\n",
    "Water boils at",
    HELD_OUT[:400],
]


async def texts(model, tokenizer, chosen, chunk):
    """The greedy texts of requests that run together."""
    engine = Engine(model, tokenizer, Scheduler(KVCache(8, exact=True), chunk), max_waiting=100)
    engine.start(asyncio.get_running_loop())
    try:
        prompts = [Prompt(tuple(tokenizer.encode(text)), text) for text in chosen]
        made = [request(each, id=str(at), max_tokens=12) for at, each in enumerate(prompts)]
        pieces = await asyncio.gather(*(collect(engine, each) for each in made))
        assert (engine.faults.failed_steps, engine.faults.not_finite) == (0, 0)
    finally:
        engine.stop()
    return ["".join(delta.text for delta in each[0, 0]) for each in pieces]


async def test_greedy_texts(directory, tokenizer):
    """A text is the same alone, among others, after a kept prefix, and in chunks of any size."""
    model = load(directory, slots=8)
    alone = [(await texts(model, tokenizer, [text], 128))[0] for text in TEXTS]
    assert "Paris" in alone[0]
    for chunk in (16, 37):
        assert await texts(model, tokenizer, TEXTS + TEXTS[::-1], chunk) == alone + alone[::-1]
