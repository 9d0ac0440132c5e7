"""The engine with leaving callers, failing steps and its stop: nothing leaks, and every caller gets an end."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.engine.budget import Budget, Share
from service.engine.generation import Generation
from service.errors import (
    DeadlineError,
    EngineFaultError,
    InvalidRequestError,
    OverloadedError,
    SlowReaderError,
    UnavailableError,
)
from service.types import Delta, Prompt, Token
from tests.support.engines import GatedModel, check_histories, running, settled, texts
from tests.support.fakes import END, LETTERS, FakeModel, ids, request
from tests.support.patience import PATIENCE, eventually_async


async def test_abort_frees_within_one_step(letters):
    """A caller who leaves gives the slot back before the next step."""
    model = GatedModel()
    async with running(letters, model) as engine:
        generation = engine.submit(request("ab", max_tokens=50))
        with generation:
            await model.reached()
            model.gate.release()
            await model.reached()
        model.gate.release()
        await settled(engine)
        assert model.steps == 2
        model.gate.release(1000)
        assert await texts(engine, request("x")) == ["yza"]


async def test_leaving_moves_nobody_who_leaves_too(letters):
    """The slots of a request's candidates are given back without copying one of them into another's place."""
    model = GatedModel()
    async with running(letters, model) as engine:
        with engine.submit(request("ab", n=4, max_tokens=50)):
            await model.reached()
            model.gate.release(4)
            for _ in range(4):
                await model.reached()
            copied = model.copied
        model.gate.release(1000)
        await settled(engine)
        assert model.copied == copied == 3 * len("ab")


async def test_cancelled_task_frees(letters):
    """Cancelling the task that iterates is leaving."""
    model = GatedModel()
    async with running(letters, model) as engine:
        task = asyncio.create_task(texts(engine, request("ab", max_tokens=50)))
        await model.reached()
        task.cancel()
        model.gate.release(1000)
        with pytest.raises(asyncio.CancelledError):
            await task
        await settled(engine)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=12))
def test_cancel_storm(letters, plan):
    """Whenever callers leave, nothing is left behind and the next request is answered."""

    async def leave(engine, pieces, length, n):
        with engine.submit(request(LETTERS[:length], n=n, max_tokens=8)) as generation:
            iterator = aiter(generation)
            for _ in range(pieces):
                await anext(iterator)

    async def storm():
        async with running(letters) as engine:
            await asyncio.gather(*(leave(engine, *each) for each in plan))
            await settled(engine)
            assert await texts(engine, request("x")) == ["yza"]
            check_histories(engine.fake, LETTERS[:20], "x", *(LETTERS[:length] for _, length, _ in plan))

    asyncio.run(storm())


async def test_failing_step_ends_only_its_requests(letters):
    """If the model fails on a prompt, only that request ends; decoding requests go on."""
    model = FakeModel()
    model.fault = END
    async with running(letters, model) as engine:
        good = asyncio.create_task(texts(engine, request("a", max_tokens=40)))
        with pytest.raises(EngineFaultError):
            await texts(engine, request(Prompt((END,), "")))
        assert await good == [(LETTERS * 2)[1:41]]
        await settled(engine)
        assert await texts(engine, request("x")) == ["yza"]


async def test_failing_decode_step_ends_the_requests_in_it(letters):
    """All requests of a failing batch fail, with their waiting candidates; the engine goes on."""
    model = FakeModel(slots=2)
    model.fault = ids("e")[0]
    async with running(letters, model) as engine:
        with pytest.raises(EngineFaultError):
            await texts(engine, request("a", n=5, max_tokens=10))
        await settled(engine)
        assert await texts(engine, request("x")) == ["yza"]


async def test_logits_that_are_not_numbers_end_their_request_alone(letters):
    """Its neighbours in the same step are not touched."""
    model = GatedModel()
    model.broken = {ids("m")[0]}
    async with running(letters, model) as engine:
        good = asyncio.create_task(texts(engine, request("n", max_tokens=10)))
        await model.reached()
        bad = asyncio.create_task(texts(engine, request("k", n=2, max_tokens=30)))
        await asyncio.sleep(0)
        model.gate.release(1000)
        with pytest.raises(EngineFaultError):
            await bad
        assert await good == ["opqrstuvwx"]
        await settled(engine)


async def test_pieces_before_a_fault_arrive(letters):
    """The error comes after what was generated before it."""
    model = FakeModel()
    model.fault = ids("d")[0]
    async with running(letters, model) as engine:
        with engine.submit(request("a", max_tokens=9)) as generation:
            pieces = aiter(generation)
            assert [(await anext(pieces)).text for _ in range(3)] == ["b", "c", "d"]
            with pytest.raises(EngineFaultError):
                await anext(pieces)


async def test_stop_ends_everything(letters):
    """Running, waiting and later requests end with UnavailableError."""
    model = GatedModel(slots=1)
    async with running(letters, model) as engine:
        tasks = [asyncio.create_task(texts(engine, request("a", max_tokens=50))) for _ in range(3)]
        await model.reached()
        engine.request_stop()
        model.gate.release(1000)  # the step continues once the stop is requested
        engine.stop()
        for task in tasks:
            with pytest.raises(UnavailableError):
                await task
        with pytest.raises(UnavailableError):
            engine.submit(request("a"))


async def test_too_many_waiting(letters):
    """Beyond the limit a request is refused at once, also when the step thread has not seen the others yet."""
    model = GatedModel(slots=1)
    async with running(letters, model, max_waiting=6) as engine:
        tasks = [asyncio.create_task(texts(engine, request("a")))]
        await model.reached()
        tasks += [asyncio.create_task(texts(engine, request("b"))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            engine.submit(request("c"))
        model.gate.release(1000)
        assert await asyncio.gather(*tasks) == [["bcd"], ["cde"], ["cde"], ["cde"]]


async def test_engine_that_dies_takes_no_caller_with_it(letters):
    """An error outside any step ends the thread; every request, seen or not, hears of it."""
    model = GatedModel()
    async with running(letters, model) as engine:
        task = asyncio.create_task(texts(engine, request("a", max_tokens=3)))
        await model.reached()
        unseen = asyncio.create_task(texts(engine, request("b", max_tokens=3)))
        await asyncio.sleep(0)
        engine.steps.scheduler.schedule = lambda: 1 / 0
        model.gate.release(1000)
        for each in (task, unseen):
            with pytest.raises(UnavailableError):
                await each
        with pytest.raises(UnavailableError):
            engine.submit(request("a"))
        assert engine.died.is_set()


async def test_a_model_that_is_gone_takes_the_engine_along(letters):
    """Not at fault, the requests hear that another instance may answer; after the third there is no engine any more."""
    model = FakeModel()
    async with running(letters, model) as engine:
        assert await texts(engine, request("x")) == ["yza"]
        model.gone = True
        for _ in range(3):
            with pytest.raises(UnavailableError):
                await texts(engine, request("a"))
        await asyncio.wait_for(engine.died.wait(), PATIENCE)


async def test_a_step_without_the_model_says_nothing_of_it(letters):
    """A candidate that a sibling's prompt serves whole is no sign that the model answers again."""
    model = GatedModel()
    async with running(letters, model) as engine:
        first = asyncio.create_task(texts(engine, request("a", max_tokens=50)))
        await model.reached()
        served = asyncio.create_task(texts(engine, request("bcd", n=2, max_tokens=1)))
        await asyncio.sleep(0)
        while tuple(ids("bcd")) not in model.histories:
            model.gate.release()
            await model.reached()
        model.gone = True
        model.gate.release(1000)
        with pytest.raises(UnavailableError):
            await first
        assert await served == ["e", "e"]
        for _ in range(2):
            with pytest.raises(UnavailableError):
                await texts(engine, request("a"))
        await asyncio.wait_for(engine.died.wait(), PATIENCE)


async def test_requests_at_fault_do_not_end_the_engine(letters):
    """However many the model fails on in a row, as long as it answers without them; nor does a moment without it."""
    model = FakeModel()
    model.fault = ids("t")[0]
    async with running(letters, model) as engine:
        for _ in range(10):
            with pytest.raises(EngineFaultError):
                await texts(engine, request("s"))
        for _ in range(5):
            model.gone = True
            for _ in range(2):
                with pytest.raises(UnavailableError):
                    await texts(engine, request("a"))
            model.gone = False
            assert await texts(engine, request("x")) == ["yza"]


async def test_slow_reader_holds_nobody_up(letters):
    """Pieces wait for their reader while the engine goes on."""
    async with running(letters) as engine:
        with engine.submit(request("a", max_tokens=20)) as slow:
            assert await texts(engine, request("x")) == ["yza"]
            await settled(engine)
            assert "".join([delta.text async for delta in slow]) == LETTERS[1:21]


def test_fake_model_notices_misuse():
    """The fake model refuses positions that were never computed."""
    model = FakeModel(slots=1)
    with pytest.raises(AssertionError, match="never computed"):
        model.forward(0, [[1]], [1], [(0, 0)])
    assert np.argmax(model.forward(0, [ids("ab")], [0], [(0, 1)])) == ids("c")[0]


class FailsOn(FakeModel):
    """A fake model that fails on calls that `blames` says so of, by the tokens of their rows."""

    def __init__(self, blames):
        super().__init__()
        self.blames = blames

    def forward(self, first_slot, rows, past, logits_at):
        if self.blames([row for row in rows if row]):
            raise MemoryError("told to fail")
        return super().forward(first_slot, rows, past, logits_at)


async def test_one_row_that_fails_takes_no_neighbour_along(letters):
    """The batch fails; run by themselves, only the row at fault fails again."""
    model = FailsOn(lambda rows: ids("m") in rows and len(rows) >= 1)
    async with running(letters, model) as engine:
        results = await asyncio.gather(
            *(texts(engine, request(prompt, max_tokens=8)) for prompt in ("bc", "jk", "rs")), return_exceptions=True
        )
        assert results[0] == ["defghijk"]
        assert isinstance(results[1], EngineFaultError)
        assert results[2] == ["tuvwxyza"]
        await settled(engine)
        assert engine.faults.failed_steps >= 1


async def test_a_batch_that_is_too_large_is_done_row_by_row(letters):
    """If memory is too short for the batch, every request still gets its full text."""
    model = FailsOn(lambda rows: len(rows) > 1)
    async with running(letters, model) as engine:
        results = await asyncio.gather(*(texts(engine, request(prompt, max_tokens=8)) for prompt in "abc"))
        assert results == [["bcdefghi"], ["cdefghij"], ["defghijk"]]
        assert engine.faults.failed_steps > 0


async def test_faults_are_counted_by_kind(letters):
    """Logits that are not numbers, and calls that fail."""
    model = FakeModel()
    model.broken, model.fault = {ids("d")[0]}, ids("t")[0]
    async with running(letters, model) as engine:
        for prompt in ("c", "s", "s"):
            with pytest.raises(EngineFaultError):
                await texts(engine, request(prompt))
        assert (engine.faults.not_finite, engine.faults.failed_steps) == (1, 2)


async def test_what_a_failed_request_computed_is_not_reused(letters):
    """Its keys and values may be wrong: the next request computes the same prompt anew."""
    model, prompt = FakeModel(), LETTERS[:20]
    model.broken = {ids("t")[0]}
    async with running(letters, model) as engine:
        with pytest.raises(EngineFaultError):
            await texts(engine, request(prompt))
        model.broken = set()
        await texts(engine, request(prompt))
        assert engine.reuse.cached_tokens == 0


async def test_a_caller_that_leaves_the_queue_costs_nothing(letters):
    """A deadline that passes in the queue: its prompt is never computed."""
    model = GatedModel(slots=1)
    async with running(letters, model) as engine:
        first = asyncio.create_task(texts(engine, request("a")))
        await model.reached()
        with engine.submit(request("mnop")):
            await asyncio.sleep(0)
        model.gate.release(1000)
        assert await first == ["bcd"]
        await settled(engine)
        assert all(history[0] == ids("a")[0] for history in model.histories)


async def test_a_request_behind_the_stop_hears_of_it(letters):
    """A request between the stop and the end of the thread gets an error."""
    async with running(letters) as engine:
        engine.request_stop()
        generation = engine.submit(request("a"))
        with pytest.raises(UnavailableError):
            await anext(aiter(generation))


async def test_an_engine_that_hangs_blames_the_step(letters):
    """Requests in the step that hangs may be its cause, and get a fault; those that wait may be sent elsewhere."""
    model = GatedModel()
    async with running(letters, model) as engine:
        with engine.submit(request("a")) as stuck, engine.submit(request("b")) as waiting:
            await model.reached()
            assert engine.running_step.requests == (stuck,)
            engine.abandon(hangs=True)
            with pytest.raises(EngineFaultError):
                await anext(aiter(stuck))
            with pytest.raises(UnavailableError):
                await anext(aiter(waiting))


async def test_the_watchdog_hears_how_long_a_step_should_take(letters):
    """Nothing at first; then by the steps before."""
    model = GatedModel()
    async with running(letters, model) as engine:
        assert engine.running_step is None
        answer = asyncio.create_task(texts(engine, request("a", max_tokens=2)))
        await model.reached()
        assert engine.running_step.expected == 0
        model.gate.release()
        await model.reached()
        assert engine.running_step.expected > 0
        model.gate.release()
        await answer
        await settled(engine)


def piece(text="x", tokens=()):
    return Delta(0, 0, text, tokens, None, completion_tokens=1, cached_tokens=0)


def test_a_reader_that_takes_nothing_is_given_up():
    """After the timeout the next piece ends the request: once, and whatever waits is let go."""
    now, aborted = [0.0], []
    generation = Generation(1, aborted.append, send_timeout=10, clock=lambda: now[0])
    generation.deliver(piece())
    now[0] = 10
    generation.deliver(piece())
    assert not aborted
    now[0] = 10.5
    generation.deliver(piece())
    generation.deliver(piece())
    assert aborted == [generation]
    with pytest.raises(SlowReaderError):
        anext(aiter(generation)).send(None)
    generation.__exit__(None, None, None)
    assert aborted == [generation]


def test_a_slow_reader_that_reads_is_not_given_up():
    """It is the time since it took its last piece that counts."""
    now = [0.0]
    generation = Generation(1, lambda _: pytest.fail("given up"), send_timeout=10, clock=lambda: now[0])
    pieces = aiter(generation)
    generation.deliver(piece())
    for _ in range(100):
        now[0] += 9
        generation.deliver(piece())
        with pytest.raises(StopIteration):
            anext(pieces).send(None)


SCORED = Token("x", 0, -1.0, tuple((letter, -1.0) for letter in "abcde"))


@pytest.mark.parametrize(
    ("tokens", "candidates", "waited", "most"),
    [((), 1, 0, 8192), ((), 1, 6, 1024), ((SCORED,), 1, 0, 1424), ((SCORED,), 1, 6, 178), ((SCORED,), 3, 6, 534)],
)
def test_what_waits_for_a_reader_is_bounded(tokens, candidates, waited, most):
    """In bytes per candidate, so that scores count for what they are; less where nothing is read at all."""
    now, aborted = [0.0], []
    generation = Generation(candidates, aborted.append, clock=lambda: now[0])
    generation.deliver(piece(tokens=tokens))
    now[0] = waited
    count = 1
    while not aborted:
        generation.deliver(piece(tokens=tokens))
        count += 1
    assert count == most + 1


def test_a_long_echo_is_no_backlog():
    """The scores of a whole prompt come as one piece per candidate, however many they are."""
    generation = Generation(4, lambda _: pytest.fail("given up"))
    for candidate in range(4):
        generation.deliver(Delta(0, candidate, "x" * 8000, (SCORED,) * 8000, None, 0, 0))


async def test_a_sequence_larger_than_the_kv_cache_is_refused(letters):
    """At once, with both numbers; one that just fits is answered."""
    async with running(letters, positions=20) as engine:
        with pytest.raises(InvalidRequestError, match=r"20 tokens together.* you asked for 21") as caught:
            engine.submit(request("a", "bcd", max_tokens=18))
        assert caught.value.code == "context_length_exceeded"
        assert await texts(engine, request("ab", max_tokens=18)) == ["cdefghijklmnopqrstuvwxyz"[:18]]


async def test_requests_wait_for_memory(letters):
    """With memory for one at a time all are answered, one after the other, and an idle engine waits without turning."""
    async with running(letters, positions=20) as engine:
        found = await asyncio.gather(*(texts(engine, request("ab", max_tokens=15)) for _ in range(5)))
        assert found == [["cdefghijklmnopq"]] * 5
        await settled(engine)


async def test_two_engines_share_memory(letters):
    """The one waits for what the other holds, is woken when it is free, and gets what the other only keeps."""
    budget, held_up, free = Budget(40), GatedModel(), FakeModel()
    async with (
        running(letters, held_up, share=Share(budget)) as one,
        running(letters, free, share=Share(budget)) as two,
    ):
        first = asyncio.create_task(texts(one, request(LETTERS[:20], max_tokens=2)))
        await held_up.reached()
        second = asyncio.create_task(texts(two, request("ab", max_tokens=20)))
        await eventually_async(lambda: budget.waiting)
        assert free.steps == 0
        held_up.gate.release(1000)
        assert await first == ["uv"]
        assert await second == ["cdefghijklmnopqrstuv"]
        assert await texts(one, request("ab", max_tokens=30))  # what the second keeps is given up


async def test_prompts_that_wait_are_bounded(letters):
    """By their tokens, which take memory: a caller may have half of them waiting."""
    model = GatedModel()
    async with running(letters, model, max_waiting_tokens=100) as engine:
        with ExitStack() as open_requests:
            for _ in range(3):
                open_requests.enter_context(engine.submit(request(LETTERS[:20])))
            with pytest.raises(OverloadedError, match="prompts of 60 tokens are waiting, 60 of them yours"):
                engine.submit(request("a"))
            open_requests.enter_context(engine.submit(request("a", identity="another")))
            model.gate.release(1000)


async def test_queue_is_bounded_by_estimated_work(letters):
    """Once the pace is known, a request that would wait too long is refused and leaves nothing."""
    model = GatedModel(slots=1)
    async with running(letters, model, max_queue_seconds=1.0) as engine:
        engine.admission.pace.step(1, 0.1)
        first = asyncio.create_task(texts(engine, request("a", max_tokens=4)))
        await model.reached()
        second = asyncio.create_task(texts(engine, request("a", max_tokens=7)))
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError) as caught:  # at most 4 steps until the slot is free, and 7 tokens ahead
            engine.submit(request("b"))
        assert caught.value.retry_after == pytest.approx(1.1)
        engine.check("another")
        with pytest.raises(DeadlineError):
            engine.submit(request("b", identity="another"), deadline=0.3)
        second.cancel()
        await asyncio.wait([second])
        engine.check("caller", deadline=0.5)
        model.gate.release(1000)
        assert await first == ["bcde"]
        await settled(engine)
        assert engine.admission.queued == {}
        assert engine.requests == 0


async def test_refusing_takes_no_time(letters):
    """With a thousand callers queueing, a refusal needs no step of the engine."""
    model = GatedModel(slots=1)
    async with running(letters, model, max_waiting=2000) as engine:
        tasks = [asyncio.create_task(texts(engine, request("a", identity=f"caller {i}"))) for i in range(1000)]
        await model.reached()
        await asyncio.sleep(0)
        began = time.perf_counter()
        for _ in range(20):
            with pytest.raises(DeadlineError):
                engine.submit(request("a", identity="caller 999"), deadline=-1.0)
        print(f"{(time.perf_counter() - began) / 20 * 1000:.2f} ms for a refusal")
        assert model.steps == 0
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        model.gate.release(1000)
        await settled(engine)
