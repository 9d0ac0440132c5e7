"""The event loop's end of a request: where the pieces of its answer arrive."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from service.types import Delta


class Generation:
    """An iterator over the pieces of a request's answer; used as a context manager, it frees the request at exit.

    Everything but construction happens on the event loop's thread.
    """

    def __init__(self, candidates: int, abort: Callable[[Generation], None]) -> None:
        self._unfinished = candidates
        self._abort = abort
        self._arrived: deque[Delta] = deque()
        self._error: Exception | None = None
        self._event = asyncio.Event()
        self._completion_tokens: dict[tuple[int, int], int] = {}

    @property
    def completion_tokens(self) -> int:
        """Tokens in the pieces that have arrived."""
        return sum(self._completion_tokens.values())

    def deliver(self, delta: Delta) -> None:
        """Takes in a piece."""
        self._arrived.append(delta)
        self._completion_tokens[delta.prompt_index, delta.candidate] = delta.completion_tokens
        self._event.set()

    def fail(self, error: Exception) -> None:
        """Ends the iteration with `error` after what has arrived."""
        self._error = error
        self._event.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while self._unfinished:
            while self._arrived:
                delta = self._arrived.popleft()
                self._unfinished -= delta.finish_reason is not None
                yield delta
            if self._unfinished:
                if self._error is not None:
                    raise self._error
                self._event.clear()
                await self._event.wait()

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unfinished:
            self._abort(self)
