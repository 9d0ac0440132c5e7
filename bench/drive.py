"""Runs requests beside each other, within the event loop's thread."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from bench.client import Job, PeerError, Stream, Timing, timed

T = TypeVar("T")


async def closed_loop(stream: Stream, work: list[Job], concurrency: int) -> tuple[float, list[Timing]]:
    """Seconds from the first request sent to the last token received, and every request's timing."""
    queue = list(reversed(work))
    timings: list[Timing] = []

    async def worker() -> None:
        while queue:
            timings.append(await timed(stream, queue.pop()))

    began = time.perf_counter()
    await together(worker() for _ in range(concurrency))
    return max(timing.at[-1] for timing in timings) - began, timings


async def listen(stream: Stream, job: Job, at: list[float]) -> None:
    """Runs one request and notes in `at` when its pieces come."""
    async for _ in stream(job):
        at.append(time.perf_counter())  # noqa: PERF401 - others read the list meanwhile


async def until(condition: Callable[[], bool], running: list[asyncio.Task[None]]) -> None:
    """Waits for the condition; a running task that ends before is an error."""
    while not condition():
        for task in running:
            if task.done():
                task.result()
                raise PeerError("a stream ended too early")
        await asyncio.sleep(0.005)


@asynccontextmanager
async def background(work: Iterable[Coroutine[Any, Any, None]]) -> AsyncIterator[list[asyncio.Task[None]]]:
    """Runs work beside the block, and ends it with the block."""
    tasks = [asyncio.create_task(item) for item in work]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first failure ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(item) for item in work]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]
