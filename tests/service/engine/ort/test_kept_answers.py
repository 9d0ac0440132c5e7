"""A small model over our own kernels: the same answers with what the cache keeps of other answers as without it."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from model_export.export import Options, export
from service import manifest
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.ort.model import Model
from service.engine.scheduler import Scheduler
from service.host import kernels
from service.text.tokenizer import Tokenizer
from service.types import SamplingParams
from tests.model_export import tiny
from tests.support.engines import collect
from tests.support.fakes import request

pytestmark = pytest.mark.skipif(kernels.why_not() is not None, reason=f"own kernels: {kernels.why_not()}")

SLOTS = 5
TOKENS = st.integers(0, tiny.VOCAB - 1)
PROMPTS = st.lists(TOKENS, min_size=1, max_size=40)
SAMPLING = st.builds(
    SamplingParams, temperature=st.sampled_from([0.0, 1.0, 2.0]), top_k=st.sampled_from([0, 5]), seed=st.integers(0, 99)
)
SCORES = st.fixed_dictionaries({}, optional={"logprobs": st.integers(0, 3), "echo": st.just(True)})
SCORES |= st.fixed_dictionaries({"logprobs": st.integers(0, 3), "echo": st.just(True)})
CHANGES = st.fixed_dictionaries(
    {"max_tokens": st.integers(0, 20), "sampling": SAMPLING, "n": st.sampled_from([1, 1, 1, 2, 3])}
)
RARE = st.sampled_from([{}] * 6 + [{"scored_token_ids": (3, 4)}, {"allowed_token_ids": (5, 6, 7, 8)}])
FROM = st.sampled_from([0, 0, 0, 1, 5, 30])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    unused = -tiny.VOCAB % 32  # own kernels take vocabularies of a multiple of 32
    source = tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q4_1, unused_tokens=unused)
    export(source, folder / "model", Options(kernels="own", max_kl=1.0), lambda *_: lambda: None)
    return folder / "model"


async def answer(engine, made):
    """All that an answer says but what was cached, which comes beside it, and the tokens of the first candidate."""
    pieces = await collect(engine, made)
    told = {
        which: (
            "".join(delta.text for delta in deltas),
            [token for delta in deltas for token in delta.tokens],
            [token for delta in deltas for token in delta.token_ids],
            deltas[-1].finish_reason,
        )
        for which, deltas in pieces.items()
    }
    return told, pieces[0, 0][-1].cached_tokens, [*made.prompts[0].token_ids, *told[0, 0][2]]


async def test_answers_are_those_without_a_cache(directory):
    """Conversations go on, part and are scored again; a caller with a cache and one without get the same to the bit."""
    described = manifest.load(directory)
    tokenizer = Tokenizer(directory / "tokenizer.json", described.special_tokens, described.vocab_size)
    shape = {"slots": SLOTS, "context_length": tiny.CONTEXT, "threads": 1, "batch_invariant": True}
    model = Model(directory, described, **shape)
    engine = Engine(model, tokenizer, Scheduler(KVCache(SLOTS, exact=True), 16), max_waiting=100)
    engine.start(asyncio.get_running_loop())
    loop, numbers = asyncio.get_running_loop(), itertools.count()
    seen: list[tuple[int, list[int]]] = [(0, [])]
    generated, scored, parted = 0, 0, 0

    def made(ids, identity, changes):
        changes = {"stop_token_ids": frozenset(), "return_token_ids": True, **changes}
        changes["logprobs_from"] = min(changes["logprobs_from"], len(ids))
        return request(tokenizer.prompt_of_tokens(ids), identity=identity, **changes)

    async def both(ids, changes):
        """The answers to a caller for whom all is kept, and to one who has never asked."""
        callers = ("kept", f"new {next(numbers)}")
        return await asyncio.gather(*(answer(engine, made(ids, caller, changes)) for caller in callers))

    @settings(
        max_examples=250,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.integers(1, 4), st.integers(0, 3) | st.just(1000), PROMPTS, st.tuples(CHANGES, SCORES, RARE, FROM))
    def check(back, cut, more, drawn):
        nonlocal generated, scored, parted
        changes = {**drawn[0], **drawn[1], **drawn[2], "logprobs_from": drawn[3]}
        prompt, before = seen[-min(back, len(seen))]
        ids = [*before[: max(0, len(before) - cut)], *more][: tiny.CONTEXT - 20]
        kept, new = asyncio.run_coroutine_threadsafe(both(ids, changes), loop).result()
        (told, cached, tokens), (expected, nothing, _) = kept, new
        assert told == expected
        assert nothing == 0
        generated += cached > prompt > 0 and ids[:cached] == before[:cached]
        if cached and changes.get("echo") and changes.get("logprobs") is not None:
            scored += 1
            parted += ids[: cached + 2] != before[: cached + 2]
        seen.append((len(ids), tokens))

    try:
        await asyncio.to_thread(check)
    finally:
        engine.stop()
    assert generated > 5
    assert scored > 10
    assert parted > 5
