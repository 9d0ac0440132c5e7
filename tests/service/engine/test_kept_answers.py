"""What an engine keeps of answers where positions are exact: generated positions, and the scores of tokens."""

from __future__ import annotations

import asyncio

import pytest

from service.types import FinishReason, SamplingParams
from tests.support.engines import GatedModel, collect, running, settled
from tests.support.fakes import LETTERS, FakeModel, request

LONG = LETTERS[:20]


async def last(engine, *arguments, **changes):
    """The last piece of an answer of one candidate."""
    return (await collect(engine, request(*arguments, **changes)))[0, 0][-1]


async def cached(engine, *arguments, **changes):
    return (await last(engine, *arguments, **changes)).cached_tokens


async def scores(engine, *arguments, **changes):
    """All scored tokens of an answer, and how many tokens of its prompt were cached."""
    pieces = (await collect(engine, request(*arguments, echo=True, **{"logprobs": 1, "max_tokens": 2} | changes)))[0, 0]
    return [token for piece in pieces for token in piece.tokens], pieces[-1].cached_tokens


@pytest.mark.parametrize(("exact", "computed"), [(False, 20), (True, 23)])
async def test_a_conversation_goes_on(letters, exact, computed):
    """The next turn finds the answer as well, but for its last token, which the model has not read; others nothing."""
    async with running(letters, exact=exact) as engine:
        assert (await last(engine, LONG, max_tokens=4)).text == "x"
        turn = LONG + "uvwx" + "mn"
        assert await cached(engine, turn, identity="other") == 0
        assert await cached(engine, turn) == computed


async def test_an_answer_that_a_stop_text_cuts(letters):
    """All of its tokens were computed, whatever is shown, and are kept."""
    async with running(letters, exact=True) as engine:
        piece = await last(engine, LONG, max_tokens=30, stop=("wx",))
        assert (piece.finish_reason, piece.completion_tokens) == (FinishReason.STOP, 2)
        assert await cached(engine, LONG + "uvwabc") == 23


async def test_an_answer_that_was_broken_off(letters):
    """What was computed when its caller left is kept."""
    model = GatedModel()
    async with running(letters, model, exact=True) as engine:
        task = asyncio.create_task(collect(engine, request(LONG, max_tokens=30)))
        model.gate.release(4)  # two chunks of the prompt, two tokens
        for _ in range(5):
            await model.reached()
        task.cancel()
        model.gate.release(1000)
        await settled(engine)
        assert await cached(engine, LONG + "uvmnop") == 22


async def test_an_answer_that_failed(letters):
    """Nothing of it is kept."""
    model = FakeModel()
    model.broken = {LETTERS.index("w")}
    async with running(letters, model, exact=True) as engine:
        with pytest.raises(Exception, match="the model failed"):
            await collect(engine, request(LONG, max_tokens=9))
        assert await cached(engine, LONG + "uab") == 0


async def test_scores_come_from_the_cache(letters):
    """The same numbers, of the prompt and of the answer, however they were computed; other callers find none."""
    async with running(letters, exact=True) as engine:
        whole = LONG + "uvwx"
        await last(engine, LONG, max_tokens=4)
        computed, found = await scores(engine, whole, identity="first")
        assert found == 0  # the caller has none of it
        assert (await scores(engine, whole)) == (computed, 0)  # and this one no scores
        assert (await scores(engine, whole)) == (computed, 22)
        assert (await scores(engine, whole, n=2)) == (computed, 22)
        steps = engine.fake.computed
        _, found = await scores(engine, LONG + "uvab", max_tokens=0)
        assert (found, engine.fake.computed - steps) == (21, 3)


async def test_scores_of_an_answer_are_kept(letters):
    """An echo of prompt and answer finds those that were computed with the answer."""
    async with running(letters, exact=True) as engine:
        answered, _ = await scores(engine, LONG, max_tokens=5)
        again, found = await scores(engine, LONG + "uvwxy", max_tokens=0)
        assert (again, found) == (answered, 23)


async def test_only_the_models_own_scores_are_kept(letters):
    """Whatever else changes the answer, the scores are those of a request without it."""
    strange = {
        "sampling": SamplingParams(temperature=2, seed=3, logit_bias={4: 9}, repetition_penalty=1.5, top_k=9),
        "allowed_token_ids": (1, 2, 3),
        "stop_token_ids": frozenset(),
    }
    async with running(letters, exact=True) as engine:
        answered, _ = await scores(engine, LONG, max_tokens=9, **strange)
        text = "".join(token.text for token in answered)
        plain, found = await scores(engine, text, max_tokens=0)
        assert (plain, found) == (answered, 27)
        assert await scores(engine, text, max_tokens=0, identity="other") == (answered, 0)


async def test_fewer_and_more_likeliest_tokens(letters):
    """As many as were kept or fewer are there; more, and scores of further tokens, are computed, and then kept."""
    async with running(letters, exact=True) as engine:
        for logprobs, found in ((1, 0), (0, 18), (1, 18), (3, 0), (2, 18), (3, 18)):
            told = await scores(engine, LONG, logprobs=logprobs)
            computed, _ = await scores(engine, LONG, logprobs=logprobs, identity=str(logprobs))
            assert told == (computed, found)
        (first, *tokens), found = await scores(engine, LONG, scored_token_ids=(3, 4), max_tokens=0)
        assert found == 0
        assert first.by_id == ()
        assert all(len(token.by_id) == 2 for token in tokens)


@pytest.mark.parametrize("start", [0, 1, 9, 19, 20])
async def test_scores_from_some_token_on(letters, start):
    """What is before it needs no scores, and they are kept from there on."""
    async with running(letters, exact=True) as engine:
        await last(engine, LONG)
        computed, found = await scores(engine, LONG, logprobs_from=start)
        assert found == min(18, max(0, start - 1))
        assert await scores(engine, LONG, logprobs_from=start) == (computed, 18)
        assert await scores(engine, LONG, logprobs_from=start, identity="other") == (computed, 0)


async def test_scores_go_with_their_positions(letters):
    """When the memory is needed."""
    async with running(letters, positions=40, exact=True) as engine:
        for _ in range(2):
            assert (await scores(engine, LONG))[1] == 0
            await last(engine, LETTERS[3:23], max_tokens=20)


@pytest.mark.parametrize("logprobs", [0, 2])
async def test_without_exact_positions_scores_are_computed(letters, logprobs):
    """Nothing of a scored prompt comes from the cache."""
    async with running(letters) as engine:
        told = [await scores(engine, LONG, logprobs=logprobs) for _ in range(3)]
    assert told == [(told[0][0], 0)] * 3
