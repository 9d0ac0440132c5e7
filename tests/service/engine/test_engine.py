"""Engine: requests join and leave between steps, and each gets its own answer."""

from __future__ import annotations

import asyncio

import pytest

from service.engine.cache import Reuse
from service.types import FinishReason, SamplingParams
from tests.support.engines import GatedModel, check_histories, collect, running, settled, texts
from tests.support.fakes import LETTERS, FakeModel, request


async def test_one_request(letters):
    """After "ab" comes "cde"."""
    async with running(letters) as engine:
        assert await texts(engine, request("ab")) == ["cde"]
        assert engine.fake.steps == 3


async def test_pieces_come_one_by_one(letters):
    """Each token is a piece as soon as it is computed, with the counts so far."""
    async with running(letters) as engine:
        (deltas,) = (await collect(engine, request("ab"))).values()
    assert [(delta.text, delta.completion_tokens) for delta in deltas] == [("c", 1), ("d", 2), ("e", 3)]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


async def test_many_requests_over_few_slots(letters):
    """All get their own answer, however many wait, and the cache mixes nothing up."""
    prompts = [LETTERS[start : start + length] for start in range(8) for length in (1, 2, 17)]
    async with running(letters) as engine:
        found = await asyncio.gather(*(texts(engine, request(prompt, max_tokens=5)) for prompt in prompts))
        await settled(engine)
    after = LETTERS + LETTERS
    assert found == [[after[after.index(prompt[-1]) + 1 :][:5]] for prompt in prompts]
    check_histories(engine.fake, *prompts)


async def test_requests_join_between_steps(letters):
    """A second request starts while the first is under way, and both advance in one call."""
    model = GatedModel()
    async with running(letters, model) as engine:
        first = asyncio.create_task(texts(engine, request("ab", max_tokens=6)))
        await model.reached()
        second = asyncio.create_task(texts(engine, request("mn", max_tokens=3)))
        await asyncio.sleep(0)
        model.gate.release(1000)
        assert await first == ["cdefgh"]
        assert await second == ["opq"]
    assert model.steps == 2 + 5  # both prompts, and the second's tokens beside the first's


@pytest.mark.parametrize("changes", [{"n": 3}, {"n": 1, "best_of": 3}])
async def test_candidates_share_one_prefill(letters, changes):
    """The prompt's tokens are computed once for all candidates of a prompt."""
    prompt = LETTERS[:20]
    async with running(letters) as engine:
        assert await texts(engine, request(prompt, **changes)) == ["uvw"] * 3
        assert engine.fake.computed == len(prompt) + 3 * 2


async def test_more_candidates_than_slots(letters):
    """Candidates that start after others have ended give the same text."""
    async with running(letters, FakeModel(slots=2)) as engine:
        assert await texts(engine, request("abc", n=7)) == ["def"] * 7
        await settled(engine)


async def test_batch_of_prompts(letters):
    """Choices come per prompt and candidate."""
    async with running(letters) as engine:
        assert await texts(engine, request("a", "x", n=2)) == ["bcd", "bcd", "yza", "yza"]


async def test_prompt_is_cached_for_its_identity_alone(letters):
    """A caller's second request computes only the prompt's end again; another caller's all of it."""
    prompt = LETTERS[:20]
    async with running(letters) as engine:
        cached = []
        for identity in ("me", "me", "you"):
            pieces = await collect(engine, request(prompt, identity=identity))
            cached.append(pieces[0, 0][-1].cached_tokens)
        assert engine.reuse == Reuse(prompt_tokens=60, cached_tokens=18)
    assert cached == [0, 18, 0]


async def test_echo_comes_first(letters):
    """The prompt is a piece of its own."""
    async with running(letters) as engine:
        (deltas,) = (await collect(engine, request("ab", echo=True))).values()
    assert [delta.text for delta in deltas] == ["ab", "c", "d", "e"]


async def test_echo_with_scores(letters):
    """Over a prompt in chunks, every token but the first is scored by what precedes it; candidates share that."""
    prompt = LETTERS[:20]
    async with running(letters) as engine:
        pieces = await collect(engine, request(prompt, n=2, echo=True, logprobs=1, max_tokens=2))
        assert engine.fake.computed == len(prompt) + 2
    for deltas in pieces.values():
        tokens = [token for delta in deltas for token in delta.tokens]
        assert "".join(token.text for token in tokens) == "".join(delta.text for delta in deltas) == LETTERS[:22]
        assert [token.offset for token in tokens] == list(range(22))
        assert tokens[0].logprob is None
        assert all(token.top == ((token.text, token.logprob),) for token in tokens[1:])


async def test_scoring_does_not_use_the_cache(letters):
    """Scores need the logits of every prompt token."""
    async with running(letters) as engine:
        for _ in range(2):
            made = request(LETTERS[:20], echo=True, logprobs=0, max_tokens=0)
            (deltas,) = (await collect(engine, made)).values()
            assert len(deltas[0].tokens) == 20
            assert deltas[0].cached_tokens == 0


@pytest.mark.parametrize(("echo", "logprobs"), [(False, None), (False, 2), (True, None), (True, 2)])
async def test_nothing_to_generate(letters, echo, logprobs):
    """The answer is the prompt or nothing; only scoring needs the model."""
    async with running(letters) as engine:
        made = request("abc", "x", n=2, max_tokens=0, echo=echo, logprobs=logprobs)
        assert await texts(engine, made) == (["abc", "abc", "x", "x"] if echo else [""] * 4)
        assert (engine.fake.steps > 0) == (echo and logprobs is not None)
        await settled(engine)


@pytest.mark.parametrize("prompts", [("x", "abc"), ("abc", "x")])
async def test_scores_do_not_depend_on_other_prompts(letters, prompts):
    """A prompt of one token, which has nothing to score, stands before or behind one that is scored."""
    async with running(letters) as engine:
        pieces = await collect(engine, request(*prompts, max_tokens=0, echo=True, logprobs=0))
        await settled(engine)
    for (index, _), (delta,) in pieces.items():
        assert [token.logprob is not None for token in delta.tokens] == [False, True, True][: len(prompts[index])]


async def test_stop_text_frees_the_slot(letters):
    """A stop text ends a choice early, without the tokens of its own."""
    async with running(letters) as engine:
        (deltas,) = (await collect(engine, request("a", stop=("de",), max_tokens=50))).values()
        await settled(engine)
    assert "".join(delta.text for delta in deltas) == "bc"
    assert (deltas[-1].finish_reason, deltas[-1].completion_tokens) == (FinishReason.STOP, 2)


async def test_best_of_is_ranked(letters):
    """Every candidate's last piece tells its mean log probability."""
    made = request("a", best_of=2, sampling=SamplingParams(seed=3))
    async with running(letters) as engine:
        pieces = await collect(engine, made)
    assert all(deltas[-1].mean_logprob < 0 for deltas in pieces.values())


async def test_seeded_text_is_the_same_in_any_company(letters):
    """Alone or among others, first or last: the same request gives the same text."""
    made = request("ab", n=2, max_tokens=12, sampling=SamplingParams(temperature=2, seed=11))
    async with running(letters) as engine:
        alone = await texts(engine, made)
        others = [request(letter, max_tokens=9, sampling=SamplingParams(seed=1)) for letter in "pqrst"]
        together = await asyncio.gather(*(texts(engine, each) for each in [*others, made, *others]))
    assert together[5] == alone
    assert alone[0] != alone[1]
