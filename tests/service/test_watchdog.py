"""The watchdogs fire on a step that never ends and on a blocked event loop, and on nothing else."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from service.watchdog import Heartbeat, hung
from tests.support.patience import PATIENCE


@pytest.fixture
def no_waiting(monkeypatch):
    """Sleeping takes no time; the list collects the seconds of each sleep."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        if len(slept) > 1000:
            raise TimeoutError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return slept


async def test_one_turn_that_lasts_too_long(no_waiting):
    """`hung` returns after the given seconds."""
    await hung(lambda: 7, 30)
    assert sum(no_waiting) == pytest.approx(30)


async def test_a_turn_that_hangs_after_others(no_waiting):
    """The time counts from the first check that sees the turn."""
    turns = itertools.chain(range(20), itertools.repeat(20))
    await hung(lambda: next(turns), 30)
    assert sum(no_waiting) == pytest.approx(90)


@pytest.mark.parametrize("turns", [itertools.count(), itertools.repeat(None), itertools.cycle([*[1] * 9, None])])
async def test_turns_that_end(no_waiting, turns):
    """`hung` never returns for an engine that makes progress, idles, or is slow but ends its steps."""
    with pytest.raises(TimeoutError):
        await hung(lambda: next(turns), 30)


async def test_a_loop_that_runs_keeps_the_heartbeat(monkeypatch):
    """An event loop that runs its callbacks is never reported, after many checks."""
    ended = []
    with Heartbeat(asyncio.get_running_loop(), 0.2, lambda: ended.append(True)):
        for _ in range(50):
            await asyncio.sleep(0.01)
    assert not ended


async def test_a_blocked_loop_has_no_heartbeat():
    """The heartbeat thread calls `end` while the event loop is blocked."""
    ended = threading.Event()
    with Heartbeat(asyncio.get_running_loop(), 0.2, ended.set):
        assert ended.wait(PATIENCE)  # blocks the event loop
