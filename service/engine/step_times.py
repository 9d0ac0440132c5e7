"""Learns how long the model's calls take: for the length of prompt chunks, and to tell a slow step from a hang."""

from __future__ import annotations

import math

from service.engine.step import HALF_SPEED

# Each observation multiplies the weight of all earlier ones by this: the last three make up half of a mean.
_DECAY = 0.8


class _Mean:
    """The mean work and the mean seconds of calls of one kind, recent ones most."""

    def __init__(self) -> None:
        self.weight = self.work = self.seconds = 0.0

    def add(self, work: float, seconds: float) -> None:
        kept = self.weight * _DECAY
        self.weight = kept + 1
        self.work = (self.work * kept + work) / self.weight
        self.seconds = (self.seconds * kept + seconds) / self.weight


class StepTimes:
    """The seconds of a call, as a straight line over its work: through the mean decode step and the mean prompt chunk.

    Work is that of `step.work`. Only the step thread uses it.
    """

    def __init__(self) -> None:
        self._decode = _Mean()
        self._prefill = _Mean()

    def prefill(self, work: float, seconds: float) -> None:
        """Records a prompt chunk."""
        self._prefill.add(work, seconds)

    def decode(self, work: float, seconds: float) -> None:
        """Records a decode step."""
        self._decode.add(work, seconds)

    def expected(self, work: float) -> float:
        """The seconds that a call will take; 0 if no call is known yet."""
        fixed, slope = self._line()
        return fixed + slope * work

    def longest_chunk(self, start: int, seconds: float) -> int:
        """The most prompt tokens after `start` positions that take at most `seconds`; any if no call is known yet."""
        fixed, slope = self._line()
        if not slope or math.isinf(seconds):
            return 1 << 30
        return int(max(0.0, (seconds - fixed) / slope) * HALF_SPEED / (HALF_SPEED + start))

    def _line(self) -> tuple[float, float]:
        """The fixed seconds of a call, and the seconds for each unit of work."""
        decode, prefill = self._decode, self._prefill
        # Between points that are close together the line would follow chance.
        if decode.weight and prefill.work >= 2 * decode.work and prefill.seconds > decode.seconds:
            slope = (prefill.seconds - decode.seconds) / (prefill.work - decode.work)
            fixed = decode.seconds - slope * decode.work
            if fixed > 0:
                return fixed, slope
        mean = prefill if prefill.weight else decode
        return 0.0, mean.seconds / mean.work if mean.weight else 0.0
