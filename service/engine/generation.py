"""A request on the event loop: the pieces of its answer arrive here."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from types import TracebackType

from service.errors import SlowReaderError
from service.text.usage import TokenCounts
from service.types import Delta, FinishReason, Times

# Limits of the bytes per candidate that wait for the reader: always, and when it has read nothing for _IDLE_SECONDS.
_MAX_BACKLOG = 2 << 20
_MAX_BACKLOG_IDLE = 256 << 10
_IDLE_SECONDS = 5.0
# The approximate memory of a piece, and of each scored token and alternative in it, in bytes.
_PIECE, _TOKEN, _ALTERNATIVE = 256, 256, 192


class Generation:
    """An iterator over the pieces of a request's answer. As a context manager it ends the request at exit.

    Everything but construction happens on the event loop's thread. If too many bytes wait for the reader, or pieces
    wait longer than `send_timeout` seconds of `clock`, the reader gets SlowReaderError in place of the pieces, and the
    request ends. `given_up` is true once `end` has ended the request. `error` is the error of `end` or `fail`.
    `finished` counts the candidates that have ended by themselves. `queued_at`, `started_at`, `prefilled_at` (the first
    token), `first_piece_at` (the first piece beyond an echo) and `ended_at` are times of `clock`.
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
        self._counts = TokenCounts()
        self.finished: Counter[FinishReason] = Counter()
        self.queued_at = clock()
        self.started_at: float | None = None
        self.prefilled_at: float | None = None
        self.ended_at: float | None = None
        self.first_piece_at: float | None = None

    @property
    def completion_tokens(self) -> int:
        """The number of generated tokens in the pieces that have arrived."""
        return self._counts.completion

    @property
    def longest(self) -> int:
        """The number of tokens of the longest candidate so far."""
        return self._counts.longest

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that came from the prefix cache, counted once for each prompt."""
        return self._counts.cached

    @property
    def unread(self) -> int:
        """The number of pieces that have arrived and wait for the reader."""
        return len(self._arrived)

    @property
    def ready(self) -> bool:
        """Whether the iteration can continue or end without waiting."""
        return bool(self._arrived) or self.error is not None or not self._unfinished

    def start(self) -> None:
        """Records that a candidate has a slot; only the first call counts."""
        self.started_at = self._clock() if self.started_at is None else self.started_at

    def prefilled(self) -> None:
        """Records that a prompt is computed and a token chosen; only the first call counts."""
        self.prefilled_at = self._clock() if self.prefilled_at is None else self.prefilled_at

    @property
    def ended(self) -> bool:
        """Whether the reader has taken every candidate's last piece."""
        return not self._unfinished

    @property
    def times(self) -> Times:
        """How long the request waited and was computed, once it has ended."""
        started = self.queued_at if self.started_at is None else self.started_at
        first = started if self.prefilled_at is None else self.prefilled_at
        last = first if self.ended_at is None else self.ended_at
        rest = max(0, self._counts.completion - 1)
        return Times(started - self.queued_at, first - started, last - first, rest)

    def deliver(self, delta: Delta) -> None:
        """Adds a piece."""
        if self.error is not None:
            return
        if not self._arrived:
            self._taken_at, self._backlog = self._clock(), 0
        self._arrived.append(delta)
        self._backlog += _size(delta)
        self._counts.add(delta)
        if delta.finish_reason is not None:
            self.finished[delta.finish_reason] += 1
            self.ended_at = self._clock()
        if self.first_piece_at is None and (delta.completion_tokens or delta.finish_reason is not None):
            self.first_piece_at = self._clock()
        self._event.set()
        if self._reads_too_slowly():
            self.end(SlowReaderError("The answer was not read fast enough, and was given up."))

    def _reads_too_slowly(self) -> bool:
        idle = self._clock() - self._taken_at
        allowed = _MAX_BACKLOG_IDLE if idle > _IDLE_SECONDS else _MAX_BACKLOG
        return idle > self._send_timeout or self._backlog / self._candidates > allowed

    def end(self, error: Exception) -> None:
        """Ends the request with `error` at once: pieces that wait for the reader are dropped."""
        if self.given_up:
            return
        self._arrived.clear()
        self.given_up = True
        self.fail(error)
        self._abort(self)

    def fail(self, error: Exception) -> None:
        """Ends the iteration with `error` after the pieces that have arrived; only the first error counts."""
        self.error = self.error or error
        self._event.set()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        async for delta in self.pieces():
            if delta is not None:
                yield delta

    async def pieces(self, silence: float = math.inf, since: float = math.inf) -> AsyncIterator[Delta | None]:
        """The pieces, and None after every `silence` seconds without one.

        The first silence begins at `since`, a time of the monotonic clock, or now if that is earlier.
        """
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
    """The approximate memory of a piece in bytes; an echo, the first piece, shares its memory with the request."""
    if not delta.completion_tokens:
        return _PIECE
    return _PIECE + sum(_TOKEN + _ALTERNATIVE * (len(token.top or ()) + len(token.by_id)) for token in delta.tokens)
