"""The watchdog: it fires on a step that never ends, and on nothing else."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from service.watchdog import Heartbeat, hung
from tests.support.patience import PATIENCE


@pytest.fixture
def no_waiting(monkeypatch):
    """Sleeping takes no time; the seconds that it would have taken are noted."""
    slept = []

    async def sleep(seconds):
        slept.append(seconds)
        if len(slept) > 1000:
            raise TimeoutError

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return slept


async def test_the_same_turn_for_long(no_waiting):
    """After so many seconds it returns."""
    await hung(lambda: 7, 30)
    assert sum(no_waiting) == pytest.approx(30)


async def test_a_turn_that_hangs_after_others(no_waiting):
    """Its time is counted from when it is first seen."""
    turns = itertools.chain(range(20), itertools.repeat(20))
    await hung(lambda: next(turns), 30)
    assert sum(no_waiting) == pytest.approx(90)


@pytest.mark.parametrize("turns", [itertools.count(), itertools.repeat(None), itertools.cycle([*[1] * 9, None])])
async def test_turns_that_end(no_waiting, turns):
    """An engine that goes on, idles, or is slow but ends its steps is left alone."""
    with pytest.raises(TimeoutError):
        await hung(lambda: next(turns), 30)


async def test_a_loop_that_turns_keeps_the_heartbeat(monkeypatch):
    """However often it is looked at."""
    ended = []
    with Heartbeat(asyncio.get_running_loop(), 0.2, lambda: ended.append(True)):
        for _ in range(50):
            await asyncio.sleep(0.01)
    assert not ended


async def test_a_loop_that_stands_still_has_none():
    """The thread says so by itself, once."""
    ended = threading.Event()
    with Heartbeat(asyncio.get_running_loop(), 0.2, ended.set):
        assert ended.wait(PATIENCE)  # on the event loop, which meanwhile does nothing else
