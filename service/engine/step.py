"""The two kinds of steps: a chunk of one prompt, or a token for each running sequence."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.cache import Copy
from service.engine.sequence import Sequence

# After this many positions a prompt token's attention takes about as long as its matrix products (default model, CPU).
HALF_SPEED = 1280


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Prefill of tokens `start`..`end` of one sequence's prompt, after `copies`.

    `start` equals `end` when a sibling's prefill serves the whole prompt.
    """

    sequence: Sequence
    start: int
    end: int
    copies: tuple[Copy, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The sequence that advances."""
        return (self.sequence,)

    @property
    def work(self) -> float:
        """The work of the model, as in `work`; 0 if it has no part in this step."""
        return work(self.start, self.end - self.start)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token for each row; row i is the sequence in slot i, None where that sequence takes no part in this step."""

    rows: tuple[Sequence | None, ...]

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """The sequences that advance."""
        return tuple(row for row in self.rows if row is not None)

    @property
    def work(self) -> float:
        """The work of the model, as in `work`."""
        return sum(work(sequence.computed, 1) for sequence in self.sequences)


Step = PromptChunk | DecodeBatch


def work(start: int, tokens: int) -> float:
    """The work of computing `tokens` after `start` positions, in tokens at the start of a context."""
    return tokens * (HALF_SPEED + start) / HALF_SPEED
