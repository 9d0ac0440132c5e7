"""The deadline of a call: its caller's, and the service's own limit."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from service.engine.generation import Generation
from service.errors import DeadlineError
from service.rpc.calls import Context, current_call

# The error must be sent this long before the deadline, when gRPC or Envoy ends the call.
_LAST_WORDS_SECONDS = 0.5


class Deadline:
    """When a call must be answered, on the monotonic clock; gRPC gives its deadline on the wall clock."""

    def __init__(self, context: Context, longest: float, *, events: bool = False) -> None:
        """No call takes longer than `longest` seconds; one that answers by `events` must report its end as an event."""
        left = context.time_remaining()
        self._at = None if left is None else time.monotonic() + left
        message = f"The request took longer than {longest:g} seconds, the longest it may."
        self._ends = [(current_call.get().began + longest, message)]
        if self._at is not None and events:
            self._ends.append((self._at, "The request took longer than it may."))

    @property
    def left(self) -> float | None:
        """Seconds until the caller's own deadline, None if it has none; `longest` refuses no request."""
        return None if self._at is None else self._at - time.monotonic()

    @contextmanager
    def ending(self, generation: Generation) -> Iterator[None]:
        """Has a generation fail just before the call has taken too long; gRPC itself keeps its callers' deadlines."""
        at, message = min(self._ends)
        if math.isinf(at):
            yield
            return
        seconds = max(0.0, at - _LAST_WORDS_SECONDS - time.monotonic())
        timer = asyncio.get_running_loop().call_later(seconds, generation.fail, DeadlineError(message))
        try:
            yield
        finally:
            timer.cancel()
