"""Measures when tokens are sampled, and reports them to the observer once a turn."""

from __future__ import annotations

from collections.abc import Callable

from service.engine.sequence import Sequence
from service.telemetry.observer import Observer


class TokenTimer:
    """The tokens sampled in one turn, and the seconds since each sequence's previous token, by `clock`."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sampled = 0
        self._gaps: list[float] = []

    def sampled(self, sequence: Sequence) -> None:
        """Records that a sequence's next token has been sampled."""
        now = self._clock()
        if sequence.sampled_at is not None:
            self._gaps.append(now - sequence.sampled_at)
        sequence.sampled_at = now
        self._sampled += 1

    def report(self, observer: Observer) -> None:
        """Reports this turn's tokens, if there are any."""
        if self._sampled:
            observer.sampled(self._sampled, self._gaps)
            self._sampled, self._gaps = 0, []
