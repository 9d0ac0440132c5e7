"""Detects an engine whose step never ends, and an event loop that is blocked."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Protocol

# Both watchdogs check this many times in the time limit. They count checks instead of reading the clock, so that a
# process that was stopped for a while, and then continues, does not count as hung.
_CHECKS = 10
# A step may take this many times as long as expected: other processes may take the cores meanwhile.
_PATIENCE = 4.0


class Step(Protocol):
    """A step of the engine that runs, which is `expected` to take that many seconds; 0 if nothing is known yet."""

    @property
    def expected(self) -> float: ...


async def hung(step: Callable[[], Step | None], seconds: float) -> None:
    """Returns when one step of the engine has lasted `seconds`, or up to a fifth longer.

    A step that is expected to take long may last several times as long as that. `step` returns the step that runs, or
    None while the engine idles.
    """
    previous, unchanged, allowed = step(), 0, _CHECKS
    while unchanged < allowed:
        await asyncio.sleep(seconds / _CHECKS)
        current = step()
        unchanged = unchanged + 1 if current is not None and current is previous else 0
        if current is not None:
            allowed = math.ceil(_CHECKS * max(1.0, _PATIENCE * current.expected / seconds))
        previous = current


class Heartbeat:
    """A thread that calls `end` when the event loop has run no callback for `seconds`, or up to a fifth longer.

    As a context manager it watches inside the block.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, end: Callable[[], None]) -> None:
        self._loop = loop
        self._pause = seconds / _CHECKS
        self._end = end
        self._beat = threading.Event()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def _watch(self) -> None:
        missed = 0
        self._loop.call_soon_threadsafe(self._beat.set)
        while not self._stopped.wait(self._pause):
            if self._beat.is_set():
                self._beat.clear()
                missed = 0
                self._loop.call_soon_threadsafe(self._beat.set)
                continue
            missed += 1
            if missed == _CHECKS:
                self._end()
                return

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
