"""How soon a cancelled request gives its slot back."""

from __future__ import annotations

import asyncio
import time

from bench.client import Job, PeerError, Stream, percentile
from bench.drive import background, listen, until
from bench.loads import Figure, Outcome, Plan, jobs
from service.engine.engine import Engine

TIMES = 8
STREAMS = 4
STREAM_TOKENS = 600
VICTIM_PROMPT = 1024
POLL_SECONDS = 0.0005
PATIENCE_SECONDS = 30.0


async def cancel(engine: Engine, stream: Stream, plan: Plan) -> Outcome:
    """Cancels requests one by one beside running streams, some while they decode and some within their prompt.

    Of each: the milliseconds until its slot is free, and the steps that other streams took meanwhile.
    """
    arrived: list[list[float]] = [[] for _ in range(STREAMS)]
    work = jobs(plan, "cancel", STREAMS, plan.prompt_tokens, STREAM_TOKENS)
    victims = jobs(plan, "cancelled", TIMES, VICTIM_PROMPT, plan.new_tokens)
    waits, steps = [], []
    async with asyncio.timeout(plan.limit):
        async with background(listen(stream, job, at) for job, at in zip(work, arrived, strict=True)) as running:
            await until(lambda: all(arrived), running)
            for index, victim in enumerate(victims):
                wait, step = await _cancel_one(engine, stream, victim, arrived[0], decoding=index % 2 == 0)
                waits.append(1000 * wait)
                steps.append(step)
            if any(task.done() for task in running):
                raise PeerError("a stream ended before the last cancellation: nothing ran beside it")
    return Outcome(
        [
            Figure("cancel to freed slot, p50", percentile(waits, 50), "ms", "less"),
            Figure("cancel to freed slot, longest", max(waits), "ms", "less"),
            Figure("cancel to freed slot, most steps", max(steps), "steps", "less"),
        ]
    )


async def _cancel_one(
    engine: Engine, stream: Stream, victim: Job, beside: list[float], *, decoding: bool
) -> tuple[float, int]:
    """Seconds, and pieces of a stream beside, from cancelling `victim` until one slot less is held."""
    pieces = stream(victim)
    first = asyncio.ensure_future(anext(pieces))
    await held(engine, STREAMS + 1)
    if decoding:
        await first
    began, seen = time.perf_counter(), len(beside)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await pieces.aclose()
    await held(engine, STREAMS)
    return time.perf_counter() - began, len(beside) - seen


async def held(engine: Engine, slots: int) -> None:
    """Waits until exactly so many slots are held."""
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while engine.stats.running != slots:
        if time.perf_counter() > deadline:
            raise PeerError(f"{engine.stats.running} slots were held for {PATIENCE_SECONDS} s, not {slots}")
        await asyncio.sleep(POLL_SECONDS)
