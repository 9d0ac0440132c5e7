"""The watchdogs fire on a step that never ends and on a blocked event loop, and on nothing else."""

from __future__ import annotations

import asyncio
import itertools
import threading
from dataclasses import dataclass

import pytest

from service.watchdog import Heartbeat, hung
from tests.support.patience import PATIENCE


@dataclass(eq=False)
class Step:
    """A step that is expected to take that many seconds."""

    expected: float = 0.0


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


async def test_one_step_that_lasts_too_long(no_waiting):
    """`hung` returns after the given seconds."""
    step = Step()
    await hung(lambda: step, 30)
    assert sum(no_waiting) == pytest.approx(30)


async def test_a_step_that_hangs_after_others(no_waiting):
    """The time counts from the first check that sees the step."""
    last = Step()
    steps = itertools.chain((Step() for _ in range(20)), itertools.repeat(last))
    await hung(lambda: next(steps), 30)
    assert sum(no_waiting) == pytest.approx(90)


@pytest.mark.parametrize(("expected", "found"), [(7, 30), (20, 80), (100, 400)])
async def test_a_slow_step_is_no_hang(no_waiting, expected, found):
    """A step may take four times as long as it is expected to; one after it, that should be fast, may not."""
    slow = Step(expected)
    await hung(lambda: slow, 30)
    assert sum(no_waiting) == pytest.approx(found, abs=3)
    no_waiting.clear()
    fast = Step(0.1)
    steps = itertools.chain([slow] * 5, itertools.repeat(fast))
    await hung(lambda: next(steps), 30)
    assert sum(no_waiting) == pytest.approx(5 * 3 + 30)


STEP = Step()


@pytest.mark.parametrize(
    "steps", [(Step() for _ in itertools.count()), itertools.repeat(None), itertools.cycle([*[STEP] * 9, None])]
)
async def test_steps_that_end(no_waiting, steps):
    """`hung` never returns for an engine that makes progress, idles, or is slow but ends its steps."""
    with pytest.raises(TimeoutError):
        await hung(lambda: next(steps), 30)


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
