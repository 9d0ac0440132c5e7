"""Threads that callers share in turns, so that one caller's backlog does not delay the others."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

_Result = TypeVar("_Result")


class Workers:
    """Some threads, and callers who take turns at them.

    `free` threads have nothing to do. Invariant: no more work is handed to the threads than there are threads, so that
    nothing waits but in its caller's row. Work whose caller has left before its turn is not done. All but the work
    happens on the event loop's thread.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self.free = threads
        self._rows: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()

    async def run(self, identity: str, work: Callable[[], _Result]) -> _Result:
        """The result of `work`, done on a thread when it is this caller's turn."""
        loop = asyncio.get_running_loop()
        if self.free:
            self.free -= 1
        else:
            await self._turn(identity, loop)
        done = self._executor.submit(work)
        # Also when its caller has left meanwhile: the thread is busy until then.
        done.add_done_callback(lambda _: _post(loop, self._next))
        return await asyncio.wrap_future(done)

    async def _turn(self, identity: str, loop: asyncio.AbstractEventLoop) -> None:
        turn: asyncio.Future[None] = loop.create_future()
        self._rows.setdefault(identity, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._next()
            raise

    def _next(self) -> None:
        """Gives an idle thread to the next caller."""
        while self._rows:
            identity, row = self._rows.popitem(last=False)
            turn = row.popleft()
            if row:
                self._rows[identity] = row
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
