"""Threads that callers take turns at."""

from __future__ import annotations

import asyncio
import threading

import pytest

from service.rpc.workers import Workers
from tests.support.patience import eventually_async


@pytest.fixture
def workers():
    workers = Workers(1, "test")
    yield workers
    workers.shutdown()


async def test_callers_take_turns(workers):
    """A caller's second piece of work waits behind the next caller's first."""
    gate, done = threading.Event(), []
    tasks = [asyncio.ensure_future(workers.run("busy", gate.wait))]
    await asyncio.sleep(0)
    for identity, name in [("many", 1), ("many", 2), ("many", 3), ("few", 4), ("other", 5)]:
        tasks.append(asyncio.ensure_future(workers.run(identity, lambda name=name: done.append(name))))
        await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(*tasks)
    assert done == [1, 4, 5, 2, 3]


async def test_work_of_who_has_left_is_not_done(workers):
    """Neither that which waits, nor is the thread thought free while it still works for somebody who is gone."""
    gate, done = threading.Event(), []
    first = asyncio.ensure_future(workers.run("a", gate.wait))
    await asyncio.sleep(0)
    waiting = asyncio.ensure_future(workers.run("b", lambda: done.append("b")))
    last = asyncio.ensure_future(workers.run("c", lambda: done.append("c")))
    await asyncio.sleep(0)
    first.cancel()
    waiting.cancel()
    await asyncio.sleep(0)
    assert workers.free == 0
    gate.set()
    await last
    assert done == ["c"]
    await eventually_async(lambda: workers.free == 1)


async def test_failures_are_the_callers(workers):
    """And the thread is free afterwards."""
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await workers.run("a", lambda: 1 // 0)
    assert await workers.run("a", lambda: 5) == 5
