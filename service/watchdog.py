"""Notices an engine whose step never ends, and an event loop that no longer turns."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

_LOOKS = 10


async def hung(turn: Callable[[], int | None], seconds: float) -> None:
    """Returns once the same turn has been under way for `seconds`, and up to a fifth more; `turn` gives its number.

    It counts its own looks, not the clock: a process that was stopped for a while, and goes on, does not hang.
    """
    seen, same = turn(), 0
    while same < _LOOKS:
        await asyncio.sleep(seconds / _LOOKS)
        now = turn()
        same = same + 1 if now is not None and now == seen else 0
        seen = now


class Heartbeat:
    """A thread that has the event loop beat, and calls `end` once there was no beat for `seconds`, up to a fifth more.

    It counts its own looks, not the clock, as `hung` does. As a context manager it watches inside the block.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float, end: Callable[[], None]) -> None:
        self._loop = loop
        self._pause = seconds / _LOOKS
        self._end = end
        self._beats = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def _watch(self) -> None:
        silent = 0
        self._loop.call_soon_threadsafe(self._beats.set)
        while not self._over.wait(self._pause):
            if self._beats.is_set():
                self._beats.clear()
                silent = 0
                self._loop.call_soon_threadsafe(self._beats.set)
                continue
            silent += 1
            if silent == _LOOKS:
                self._end()
                return

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
