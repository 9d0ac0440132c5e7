"""Decides which sequence advances by how many tokens. Pure: it plans and records, and never computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from service.engine.cache import Copy, KVCache, Reuse
from service.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Tokens `start`..`end` of one sequence's prompt, after `copies`; none when a sibling's prompt served whole."""

    sequence: Sequence
    start: int
    end: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """One token each; `rows` are the holders of slots 0.. in order, None where a slot sits this step out."""

    rows: tuple[Sequence | None, ...]


# A prompt gives the same bits however it is cut, but for a chunk that leaves one token to a tile of the kernels.
_TILE = 128
_RECOMPUTE = 2
# A call costs so much by itself that fewer tokens hardly make it shorter; the setting allows no fewer either.
_LEAST_CHUNK = 16
# Behind so many positions attention costs a prompt token about as much again as the matrices do (default model, CPU).
_HALF_SPEED = 2048

Step = PromptChunk | DecodeBatch


class Scheduler:
    """First come, first served, with prompts in chunks between decode steps.

    Invariants: `holders[i]` is the sequence in slot i; at most one holder is still computing its prompt; while
    sequences decode, no two prompt chunks that compute follow each other.
    """

    def __init__(self, cache: KVCache, prompt_chunk: int) -> None:
        self._cache = cache
        self._prompt_chunk = prompt_chunk
        self._waiting: deque[Sequence] = deque()
        self._holders: list[Sequence] = []
        self._prompting: Sequence | None = None
        self._decode_next = False

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """Sequences that do not hold a slot yet."""
        return len(self._waiting)

    @property
    def reuse(self) -> Reuse:
        """What the cache has saved so far."""
        return self._cache.reuse

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queues sequences."""
        self._waiting.extend(sequences)

    def schedule(self) -> Step | None:
        """The next step, or None when nothing is to be done."""
        decoding = any(sequence.decoding for sequence in self._holders)
        if not (decoding and self._decode_next):
            chunk = self._next_chunk(decoding)
            if chunk is not None:
                self._decode_next = chunk.start < chunk.end
                return chunk
        self._decode_next = False
        return self._decode_batch() if decoding else None

    def commit_chunk(self, chunk: PromptChunk) -> None:
        """Records that a chunk's keys and values are in its slot."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        assert sequence.slot is not None
        self._cache.record(sequence.slot, chunk.end)
        if chunk.end == sequence.prompt_length:
            self._prompting = None

    def remove(self, sequence: Sequence) -> tuple[Copy, ...]:
        """Ends a sequence in whatever state it is; the copies close the hole that it leaves among the slots."""
        sequence.finished = True
        if sequence is self._prompting:
            self._prompting = None
        if sequence.slot is None:
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            return ()
        slot, sequence.slot = sequence.slot, None
        last = self._holders.pop()
        copies = self._cache.release(slot, last.computed)
        if last is not sequence:
            self._holders[slot] = last
            last.slot = slot
        return copies

    def forget(self, sequence: Sequence) -> None:
        """Sees to it that nothing is reused of what was computed for a sequence that fails: it may be wrong."""
        if sequence.slot is not None:
            self._cache.record(sequence.slot, 0)

    def _next_chunk(self, decoding: bool) -> PromptChunk | None:
        copies: tuple[Copy, ...] = ()
        if self._prompting is None:
            if not self._waiting or self._cache.full:
                return None
            self._prompting, copies = self._admit(self._waiting.popleft())
        sequence = self._prompting
        length = self._chunk_length(sequence, decoding)
        return PromptChunk(sequence, sequence.computed, sequence.computed + length, copies)

    def _chunk_length(self, sequence: Sequence, decoding: bool) -> int:
        """How many prompt tokens to compute next, so that none is ever alone in a tile.

        Beside running streams chunks shrink as the prompt grows, so that each takes about as long as the first.
        """
        remaining, most = sequence.prompt_length - sequence.computed, self._prompt_chunk
        if decoding:
            most = max(_LEAST_CHUNK, most * _HALF_SPEED // (_HALF_SPEED + sequence.computed))
        length = min(most, remaining)
        while length > 1 and (length % _TILE == 1 or remaining - length == 1):
            length -= 1
        return length

    def _admit(self, sequence: Sequence) -> tuple[Sequence, tuple[Copy, ...]]:
        if sequence.scores_prompt:
            recompute = sequence.prompt_length
        elif sequence.group.logits is not None:
            recompute = 0
        else:
            recompute = min(_RECOMPUTE, sequence.prompt_length)
        allocation = self._cache.allocate(sequence.group.prompt.token_ids, sequence.request.identity, recompute)
        sequence.slot = allocation.slot
        cached, rest = allocation.cached, sequence.prompt_length - allocation.cached
        sequence.computed = sequence.cached = max(0, cached - 1) if rest == 1 else cached
        self._holders.append(sequence)
        return sequence, allocation.copies

    def _decode_batch(self) -> DecodeBatch:
        rows = [sequence if sequence.decoding else None for sequence in self._holders]
        while rows[-1] is None:
            rows.pop()
        return DecodeBatch(tuple(rows))
