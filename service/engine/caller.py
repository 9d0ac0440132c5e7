"""One caller's sequences in the scheduler. Pure bookkeeping."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from service.engine.sequence import Sequence


@dataclass(slots=True)
class Caller:
    """One caller: its waiting sequences, the one in prefill, its slots, and the work done for it in prompt tokens."""

    served: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prompting: Sequence | None = None
    held: int = 0

    @property
    def backlogged(self) -> bool:
        """Whether it has prompts that are not computed yet."""
        return bool(self.waiting) or self.prompting is not None

    def enqueue(self, sequences: Seq[Sequence]) -> None:
        """Puts the sequences of one request behind all that are as urgent or more."""
        after, priority = len(self.waiting), sequences[0].request.priority
        while after and self.waiting[after - 1].request.priority > priority:
            after -= 1
        self.waiting.rotate(-after)
        self.waiting.extendleft(reversed(sequences))
        self.waiting.rotate(after)

    def next(self, overdue: float) -> Sequence:
        """The sequence whose turn it is, first in `waiting`: the oldest of those queued before `overdue`, if any."""
        if self.waiting[0].request.priority != self.waiting[-1].request.priority:
            oldest = min(self.waiting, key=lambda sequence: sequence.generation.queued_at)
            if oldest.generation.queued_at < overdue:
                self.waiting.remove(oldest)
                self.waiting.appendleft(oldest)
        return self.waiting[0]
