"""Drives a peer by the loads, all within the event loop's thread.

Most loads are data of `bench.loads`. The requests of `stall`, `cancel` and `overload` depend on what the peer does.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise

from tokenizers import Tokenizer

from bench import keystrokes, loads
from bench.client import Job, PeerError, RefusedError, Run, Stream, Timing, percentile, timed
from bench.loads import Load, jobs
from bench.peers import Served
from bench.processes import memory
from bench.report import Figure, Outcome
from service.engine.engine import Engine

STREAMS = 4
# Until every stream has sent the first two pieces, streams still start; the pieces after them are undisturbed.
STARTING_PIECES = 2
QUIET_PIECES = 64
PATIENCE_SECONDS = 30.0


async def measure(served: Served, load: Load, tokenizer: Tokenizer) -> Outcome:
    """Drives the peer by the load and computes its figures."""
    run = await drive(served, load, tokenizer)
    figures = [
        Figure(name, number, unit, better)
        for name, (unit, better, value) in load.metrics.items()
        if (number := value(run)) is not None
    ]
    return Outcome(figures, list(run.timings), load.size)


async def drive(served: Served, load: Load, tokenizer: Tokenizer) -> Run:
    """Sends all requests of the load and waits for every answer."""
    timings: list[Timing] = []
    refusals: list[float] = []
    callers = asyncio.Semaphore(load.concurrency)

    async def arrive(moment: float, job: Job) -> None:
        await asyncio.sleep(moment)
        async with callers:
            sent = time.perf_counter()
            try:
                timings.extend(await converse(served.stream, job, tokenizer))
            except RefusedError:
                if not load.refusable:
                    raise
                refusals.append(time.perf_counter() - sent)

    counted = {name: counter() for name, counter in served.counters.items()}
    began = time.perf_counter()
    async with together() as tasks:
        for moment, job in zip(load.moments or [0.0] * len(load.work), load.work, strict=True):
            tasks.create_task(arrive(moment, job))
    resident = sum(memory(pid, "VmRSS") for pid in served.processes[:1])
    spent = {name: counter() - counted[name] for name, counter in served.counters.items()}
    return Run(began, timings, refusals, resident, spent)


async def converse(stream: Stream, job: Job, tokenizer: Tokenizer) -> list[Timing]:
    """Runs a request and its follow-ups, each with everything before it as its prompt."""
    timings = [await timed(stream, job)]
    history = job.prompts[0]
    for turn, question in enumerate(job.follow_ups, 1):
        # Encoding an answer may give more tokens than were generated.
        answer = tokenizer.encode(timings[-1].text, add_special_tokens=False).ids[: 2 * job.new_tokens]
        history = (*history, *answer, *question)
        timings.append(await timed(stream, replace(job, prompts=(history,)), turn))
    return timings


@asynccontextmanager
async def background(stream: Stream, work: Sequence[Job], pieces: int) -> AsyncIterator[list[list[float]]]:
    """Runs requests beside the block, from when each has sent `pieces` pieces; gives the lists of their pieces' times.

    Raises PeerError when one of them ends before the block does.
    """

    async def listen(job: Job, at: list[float]) -> None:
        async for _ in stream(job):
            at.append(time.perf_counter())  # noqa: PERF401 - others read the list meanwhile
        raise PeerError("a background stream ended too early: nothing ran beside what was measured")

    arrived: list[list[float]] = [[] for _ in work]
    async with together() as group:
        tasks = [group.create_task(listen(job, at)) for job, at in zip(work, arrived, strict=True)]
        while min(map(len, arrived)) < pieces:  # noqa: ASYNC110 - an event at every piece would cost the streams time
            await asyncio.sleep(0.005)
        yield arrived
        for task in tasks:
            task.cancel()


@asynccontextmanager
async def together() -> AsyncIterator[asyncio.TaskGroup]:
    """Waits for the tasks of a group at the end of the block; the first failure ends the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def stall(served: Served, plan: Namespace) -> list[Outcome]:
    """How a long prompt delays running streams: the time between their pieces before it and during its prefill."""
    streams = jobs(plan, "stall", STREAMS, plan.prompt_tokens, loads.STALL_TOKENS)
    (long,) = jobs(plan, "stall prompt", 1, loads.STALL_PROMPT, 1)
    async with background(served.stream, streams, STARTING_PIECES + QUIET_PIECES) as arrived:
        timing = await timed(served.stream, long)
    settled = max(at[STARTING_PIECES - 1] for at in arrived)
    quiet = [gap for at in arrived for gap in _gaps_within(at, settled, timing.began)]
    busy = [gap for at in arrived for gap in _gaps_within([*at, max(at[-1], timing.at[0])], timing.began, timing.at[0])]
    return [
        Outcome(
            [
                Figure("undisturbed between tokens, p50", 1000 * percentile(quiet, 50), "ms", "less"),
                Figure("undisturbed between tokens, p95", 1000 * percentile(quiet, 95), "ms", "less"),
                Figure("beside a 2000-token prompt, p50", 1000 * percentile(busy, 50), "ms", "less"),
                Figure("beside a 2000-token prompt, p95", 1000 * percentile(busy, 95), "ms", "less"),
                Figure("beside a 2000-token prompt, longest", 1000 * max(busy), "ms", "less"),
                Figure("2000-token prompt beside streams, time to first token", timing.first, "s", "less"),
            ],
            # The streams' pieces too, as times relative to the long prompt's sending.
            [timing, *(replace(timing, at=tuple(at), tokens=len(at)) for at in arrived)],
        )
    ]


def _gaps_within(at: list[float], start: float, end: float) -> list[float]:
    """The gaps that overlap the time from `start` to `end`, and not only by touching it."""
    return [after - before for before, after in pairwise(at) if after > start and before < end]


async def cancel(served: Served, plan: Namespace) -> list[Outcome]:
    """How soon a cancelled request frees its slot beside running streams, alternately in decode and in prefill.

    Only the bare engine reports its slots. Figures are the milliseconds until the slot is free, and the steps that
    another stream took meanwhile.
    """
    waits, steps = [], []
    streams = jobs(plan, "cancel", STREAMS, plan.prompt_tokens, new_tokens=600)
    async with background(served.stream, streams, 1) as arrived:
        for number, job in enumerate(jobs(plan, "cancelled", 8, prompt_tokens=1024, new_tokens=plan.new_tokens)):
            # In decode it has sent its first piece.
            async with background(served.stream, [job], 1 if number % 2 == 0 else 0):
                await wait_for_slots(served.engine, STREAMS + 1)
                began, pieces_before = time.perf_counter(), len(arrived[0])
            await wait_for_slots(served.engine, STREAMS)
            waits.append(1000 * (time.perf_counter() - began))
            steps.append(len(arrived[0]) - pieces_before)
    return [
        Outcome(
            [
                Figure("cancel to freed slot, p50", percentile(waits, 50), "ms", "less"),
                Figure("cancel to freed slot, longest", max(waits), "ms", "less"),
                Figure("cancel to freed slot, most steps", max(steps), "steps", "less"),
            ]
        )
    ]


async def overload(served: Served, plan: Namespace) -> list[Outcome]:
    """Offers half to three times the sustainable rate, which it measures first."""
    work = jobs(plan, "sustainable", 4 * loads.CALLERS, loads.CALLER_PROMPT, loads.CALLER_TOKENS)
    run = await drive(served, Load(work, {}, loads.CALLERS), plan.tokenizer)
    sustainable = len(work) / run.seconds
    return [
        await measure(served, loads.offered(plan, share, sustainable * share), plan.tokenizer)
        for share in (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
    ]


async def wait_for_slots(engine: Engine | None, held: int) -> None:
    """Waits until exactly `held` slots of the engine are in use. Raises PeerError after PATIENCE_SECONDS."""
    assert engine is not None, "only the bare engine reports its slots"
    deadline = time.perf_counter() + PATIENCE_SECONDS
    while engine.stats.running != held:
        if time.perf_counter() > deadline:
            raise PeerError(f"{engine.stats.running} slots were held for {PATIENCE_SECONDS} s, not {held}")
        await asyncio.sleep(0.0005)


INTERACTIVE = {"stall": stall, "cancel": cancel, "overload": overload, "typing": keystrokes.typing}


async def run(served: Served, names: Sequence[str], plan: Namespace) -> list[tuple[str, Outcome]]:
    """Drives a peer by the named loads, one after the other, after a short request that warms it up.

    Raises PeerError when a load takes longer than the plan's limit.
    """
    if served.engine is not None:
        served.engine.start(asyncio.get_running_loop())
    await timed(served.stream, jobs(plan, "warm-up", 1, 16, 8)[0])
    table = loads.table(plan)
    outcomes = []
    for name in names:
        try:
            async with asyncio.timeout(plan.limit):
                if name in INTERACTIVE:
                    results = await INTERACTIVE[name](served, plan)
                else:
                    results = [await measure(served, load, plan.tokenizer) for load in table[name]]
        except TimeoutError:
            raise PeerError(f"the load {name} did not end within {plan.limit} s") from None
        outcomes += [(name, outcome) for outcome in results]
    if served.engine is not None:
        await wait_for_slots(served.engine, 0)  # no request may outlive the event loop
    return outcomes
