"""Drives a peer by a load: closed loops, open loops and conversations, all within the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from tokenizers import Tokenizer

from bench.client import Job, PeerError, RefusedError, Stream, Timing, timed
from bench.peers import Served

T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """One number. `better` says which direction is better: "more", "less", or "" for a number that only explains."""

    name: str
    value: float
    unit: str
    better: str


@dataclass(frozen=True)
class Outcome:
    """The result of a load: its figures, and the requests behind them.

    `size` is what a curve is drawn against, such as the requests at once; None where the load has only one size.
    """

    figures: list[Figure]
    timings: list[Timing] = field(default_factory=list)
    size: float | None = None


@dataclass(frozen=True)
class Run:
    """One finished load: the timings of its answers, and the seconds that each refusal took.

    `began` is a moment of the timings' clock; `resident` is the service's memory afterwards, in bytes.
    """

    began: float
    timings: Sequence[Timing]
    refusals: Sequence[float] = ()
    resident: int = 0

    @property
    def output_rate(self) -> float:
        """Generated tokens per second, from the first request sent to the last token received."""
        return sum(timing.tokens for timing in self.timings) / self.seconds

    @property
    def seconds(self) -> float:
        """From the first request sent to the last token received."""
        return max(timing.at[-1] for timing in self.timings) - self.began


# Unit, which direction is better (see Figure), and how the number follows from a run.
Metric = tuple[str, str, Callable[[Run], float]]


@dataclass(frozen=True)
class Load:
    """Requests and the figures that follow from them.

    In a closed loop, `concurrency` callers send the requests one after the other. In an open loop, `moments` holds the
    second at which each request arrives, whether or not earlier ones are done. Refusals are errors unless `refusable`.
    """

    work: Sequence[Job]
    metrics: Mapping[str, Metric]
    concurrency: int = 1
    moments: Sequence[float] = ()
    size: float | None = None
    refusable: bool = False


async def measure(served: Served, load: Load, tokenizer: Tokenizer) -> Outcome:
    """Drives the peer by the load and computes its figures."""
    run = await drive(served, load, tokenizer)
    figures = [Figure(name, value(run), unit, better) for name, (unit, better, value) in load.metrics.items()]
    return Outcome(figures, list(run.timings), load.size)


async def drive(served: Served, load: Load, tokenizer: Tokenizer) -> Run:
    """Sends all requests of the load and waits for every answer."""
    timings: list[Timing] = []
    refusals: list[float] = []
    queue = list(reversed(load.work))

    async def arrive(moment: float, job: Job) -> None:
        await asyncio.sleep(moment)
        sent = time.perf_counter()
        try:
            timings.extend(await converse(served.stream, job, tokenizer))
        except RefusedError:
            if not load.refusable:
                raise
            refusals.append(time.perf_counter() - sent)

    async def caller() -> None:
        while queue:
            await arrive(0, queue.pop())

    began = time.perf_counter()
    if load.moments:
        await together(arrive(moment, job) for moment, job in zip(load.moments, load.work, strict=True))
    else:
        await together(caller() for _ in range(load.concurrency))
    return Run(began, timings, refusals, served.resident())


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
async def background(stream: Stream, work: Iterable[Job], pieces: int) -> AsyncIterator[list[list[float]]]:
    """Runs requests beside the block, from when each has sent `pieces` pieces; gives the lists of their pieces' times.

    Raises PeerError when one of them ends before the block does.
    """

    async def listen(job: Job, at: list[float]) -> None:
        async for _ in stream(job):
            at.append(time.perf_counter())  # noqa: PERF401 - others read the list meanwhile

    jobs = list(work)
    arrived: list[list[float]] = [[] for _ in jobs]
    tasks = [asyncio.create_task(listen(job, at)) for job, at in zip(jobs, arrived, strict=True)]
    try:
        while min(map(len, arrived)) < pieces:
            _require_running(tasks)
            await asyncio.sleep(0.005)
        yield arrived
        _require_running(tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _require_running(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done():
            task.result()
            raise PeerError("a background stream ended too early: nothing ran beside what was measured")


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
