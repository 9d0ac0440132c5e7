"""The event loop's end of a request: where the pieces of its answer arrive."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from service.errors import SlowReaderError
from service.types import Delta, FinishReason

# What may wait for a reader, in bytes per candidate: at any time, and where it has taken nothing for some seconds.
_MOST = 2 << 20
_MOST_UNTOUCHED = 256 << 10
_UNTOUCHED_SECONDS = 5.0
# About what a piece takes, and each scored token and alternative in it.
_PIECE, _TOKEN, _ALTERNATIVE = 256, 256, 192


class Generation:
    """An iterator over the pieces of a request's answer; used as a context manager, it frees the request at exit.

    Everything but construction happens on the event loop's thread. A reader that lets pieces grow too many, or wait
    for more than `send_timeout` seconds of `clock`, gets SlowReaderError in their place, and the request is freed.
    `given_up` says that it was ended before its time, `error` with what.
    `finished` counts the candidates that have ended by themselves. `queued_at`, `started_at` and `first_piece_at` (of
    more than an echo) tell when it got how far, by `clock`.
    """

    def __init__(
        self,
        candidates: int,
        abort: Callable[[Generation], None],
        send_timeout: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._unfinished = candidates
        self._abort = abort
        self._send_timeout = send_timeout
        self._clock = clock
        self._arrived: deque[Delta] = deque()
        self._backlog = 0
        self._candidates = candidates
        self._taken_at = 0.0
        self.error: Exception | None = None
        self.given_up = False
        self._event = asyncio.Event()
        self._completion_tokens: dict[tuple[int, int], int] = {}
        self._cached_tokens: dict[int, int] = {}
        self.finished: Counter[FinishReason] = Counter()
        self.queued_at = clock()
        self.started_at: float | None = None
        self.first_piece_at: float | None = None

    @property
    def completion_tokens(self) -> int:
        """Tokens in the pieces that have arrived."""
        return sum(self._completion_tokens.values())

    @property
    def longest(self) -> int:
        """Tokens of the candidate that has most."""
        return max(self._completion_tokens.values(), default=0)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were copied and not computed; what candidates of one prompt share was computed once."""
        return sum(self._cached_tokens.values())

    @property
    def unread(self) -> int:
        """Pieces that have arrived and were not taken."""
        return len(self._arrived)

    @property
    def ready(self) -> bool:
        """Whether the iteration goes on, or ends, without waiting."""
        return bool(self._arrived) or self.error is not None or not self._unfinished

    def start(self) -> None:
        """Notes that a candidate has got a slot; the first counts."""
        self.started_at = self._clock() if self.started_at is None else self.started_at

    def deliver(self, delta: Delta) -> None:
        """Takes in a piece."""
        if self.error is not None:
            return
        if not self._arrived:
            self._taken_at, self._backlog = self._clock(), 0
        self._arrived.append(delta)
        self._backlog += _size(delta)
        self._completion_tokens[delta.prompt_index, delta.candidate] = delta.completion_tokens
        if delta.candidate == 0:
            self._cached_tokens[delta.prompt_index] = delta.cached_tokens
        if delta.finish_reason is not None:
            self.finished[delta.finish_reason] += 1
        if self.first_piece_at is None and (delta.completion_tokens or delta.finish_reason is not None):
            self.first_piece_at = self._clock()
        self._event.set()
        if self._reads_too_slowly():
            self.end(SlowReaderError("The answer was not read fast enough, and was given up."))

    def _reads_too_slowly(self) -> bool:
        waited, each = self._clock() - self._taken_at, self._backlog / self._candidates
        return waited > self._send_timeout or each > (_MOST_UNTOUCHED if waited > _UNTOUCHED_SECONDS else _MOST)

    def end(self, error: Exception) -> None:
        """Ends the request with `error` at once: what has arrived and was not taken is dropped."""
        if self.given_up:
            return
        self._arrived.clear()
        self.given_up = True
        self.fail(error)
        self._abort(self)

    def fail(self, error: Exception) -> None:
        """Ends the iteration with `error` after what has arrived; the first error counts."""
        self.error = self.error or error
        self._event.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for delta in self.pieces():
            if delta is not None:
                yield delta

    async def pieces(self, silence: float = math.inf, since: float = math.inf) -> AsyncIterator[Delta | None]:
        """The pieces, and None whenever for `silence` seconds none has come, first counted from `since` (monotonic)."""
        speak_at = min(since, time.monotonic()) + silence
        while self._unfinished:
            while self._arrived:
                delta = self._arrived.popleft()
                self._taken_at = self._clock()
                self._backlog -= _size(delta)
                self._unfinished -= delta.finish_reason is not None
                yield delta
                speak_at = time.monotonic() + silence
            if self._unfinished:
                if self.error is not None:
                    raise self.error
                self._event.clear()
                if math.isinf(speak_at):
                    await self._event.wait()
                    continue
                try:
                    async with asyncio.timeout(speak_at - time.monotonic()):
                        await self._event.wait()
                except TimeoutError:
                    yield None
                    speak_at = time.monotonic() + silence

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unfinished and not self.given_up:
            self._abort(self)


def _size(delta: Delta) -> int:
    """About how many bytes a piece takes; those of an echo, the first piece, are the request's own."""
    if not delta.completion_tokens:
        return _PIECE
    return _PIECE + sum(_TOKEN + _ALTERNATIVE * len(token.top or ()) for token in delta.tokens)
