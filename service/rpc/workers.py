"""Threads that callers share in turns, so that one caller's backlog does not delay the others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")


class Workers:
    """A pool of threads on which callers take turns.

    `free` threads are idle. Invariant: the pool never gets more work than it has threads, so that work waits only in
    its own caller's queue. Work whose caller leaves before its turn is dropped. Everything except the work itself runs
    on the event loop's thread.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.free = threads
        self._queues: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, identity: str, work: Callable[[], _Result]) -> _Result:
        """Runs `work` on a thread when it is this caller's turn, and returns its result."""
        loop = asyncio.get_running_loop()
        if self.free:
            self.free -= 1
        else:
            await self._turn(identity, loop)
        done = self._executor.submit(work)
        # Even if the caller leaves, the thread is busy until the work is done.
        done.add_done_callback(lambda _: _post(loop, self._next))
        return await asyncio.wrap_future(done)

    async def _turn(self, identity: str, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._queues.setdefault(identity, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()
            raise

    def _next(self) -> None:
        """Gives an idle thread to the next caller."""
        while self._queues:
            identity, waiting = self._queues.popitem(last=False)
            turn = waiting.popleft()
            if waiting:
                self._queues[identity] = waiting
            if not turn.done():
                turn.set_result(None)
                return
        self.free += 1

    def shutdown(self) -> None:
        """Waits for the running work, and accepts no more."""
        self._executor.shutdown()


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Schedules a callback on the event loop, unless it is closed: work may outlast it."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)
