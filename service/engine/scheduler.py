"""Decides which sequence advances by how many tokens. Pure: it plans and records, and never runs the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from service.engine.admission import Space
from service.engine.cache import Copy, KVCache, Reuse
from service.engine.caller import Caller
from service.engine.sequence import Sequence
from service.engine.step import HALF_SPEED, DecodeBatch, PromptChunk, Step
from service.engine.step_times import StepTimes

# The kernels compute in tiles of this many tokens. A prompt gives the same bits however it is cut into chunks, unless a
# tile is left with one token. The end of a prompt is therefore recomputed with at least _RECOMPUTE tokens.
_TILE = 128
_RECOMPUTE = 2
# In tokens. A call has a fixed cost, so smaller chunks would hardly be faster; the setting allows none smaller either.
LEAST_CHUNK = 16
# In prompt tokens: a decoded token takes about as long as a prefill of three (default model, CPU, 8 rows or more).
_GENERATED_COST = 3
# One slot in this many is reserved for callers who hold none, because a long answer is never interrupted.
_SLOTS_PER_RESERVED = 16


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a scheduler is: sequences `running`, which have a slot, and `waiting`, which have none yet.

    `holding` are the callers that hold slots: each of them could take `room` more, any other caller `first_room`; and
    their sequences `positions` positions of the KV cache. `ends` has for each running sequence within how many decode
    steps it ends, and the positions that it frees then.
    """

    running: int
    waiting: int
    room: int
    first_room: int
    holding: frozenset[str]
    positions: int
    ends: tuple[tuple[int, int], ...]

    def space(self, identity: str) -> Space:
        """What the caller could take now."""
        return Space(self.room if identity in self.holding else self.first_room, self.positions, self.ends)


class Scheduler:
    """Shares the model fairly between callers, and puts prompt chunks between decode steps.

    The next prompt chunk, and a free slot if it needs one, goes to the caller for whom the least work was done. A
    caller with nothing waiting that sends a request starts level with the waiting callers: idle time earns no credit.
    The requests of one caller are served by their priority, lower numbers first, and else in their order; but one that
    has waited for `patience` seconds comes before all others.

    A sequence whose turn it is and whose positions do not fit the memory stops all that wait behind it, so that it
    cannot starve.

    Invariants: `holders[i]` is the sequence in slot i; at most one sequence per caller is in prefill; a caller is known
    exactly as long as it has sequences; only callers who held no slot get a reserved one; while sequences decode, a
    decode step follows each prompt chunk that runs the model.
    """

    def __init__(
        self, cache: KVCache, prompt_chunk: int, step_seconds: float = math.inf, patience: float = math.inf
    ) -> None:
        """While sequences decode, a prompt chunk is short enough to take `step_seconds`, as far as `times` knows."""
        self._patience = patience
        self._cache = cache
        self._prompt_chunk = prompt_chunk
        self._step_seconds = step_seconds
        self.times = StepTimes()
        self._blocked: Caller | None = None
        self._reserved = cache.free // _SLOTS_PER_RESERVED
        self._callers: dict[str, Caller] = {}
        self._holders: list[Sequence] = []
        self._waiting = 0
        self._decode_next = False
        self._now = 0.0

    @property
    def prompt_chunk(self) -> int:
        """The most prompt tokens in a step."""
        return self._prompt_chunk

    @property
    def slots(self) -> int:
        """The number of slots: as many sequences can run at once."""
        return self._cache.slots

    @property
    def positions(self) -> int:
        """The most positions that sequences can hold together."""
        return self._cache.share.positions

    def connect(self, wake: Callable[[], None], evict: Callable[[], None]) -> None:
        """Sets what is called, on any thread, when memory is free again, or is needed by another model; see Share."""
        self._cache.share.wake, self._cache.share.evict = wake, evict

    def evict(self) -> tuple[Copy, ...]:
        """Gives up cached prefixes whose memory a sequence of another model waits for."""
        return self._cache.evict()

    @property
    def holders(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, in the order of the slots."""
        return tuple(self._holders)

    @property
    def running(self) -> int:
        """The number of sequences that hold a slot."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """The number of sequences that hold no slot yet."""
        return self._waiting

    @property
    def reuse(self) -> Reuse:
        """Prompt tokens that the prefix cache has saved so far."""
        return self._cache.reuse

    def forget_reuse(self) -> None:
        """Counts the prefix cache's savings from zero again."""
        self._cache.reuse = Reuse(0, 0)

    def load(self) -> Load:
        """How busy the scheduler is."""
        free = self._cache.free
        general = max(0, free - self._reserved)
        return Load(
            running=len(self._holders),
            waiting=self._waiting,
            room=general,
            first_room=max(general, min(1, free)),
            holding=frozenset(identity for identity, caller in self._callers.items() if caller.held),
            positions=self._cache.share.free,
            ends=tuple((holder.request.max_tokens - holder.generated, holder.positions) for holder in self._holders),
        )

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queues the sequences of one request."""
        identity = sequences[0].request.identity
        caller = self._callers.get(identity)
        if caller is None or not caller.backlogged:
            level = self._level(without=caller)
            caller = self._callers.setdefault(identity, Caller(level))
            caller.served = max(caller.served, level)
        caller.enqueue(sequences)
        self._waiting += len(sequences)

    def schedule(self, now: float = 0.0) -> Step | None:
        """The next step, or None when there is no work. `now` is of the clock that says when requests were queued."""
        self._now = now
        decoding = any(sequence.decoding for sequence in self._holders)
        if not (decoding and self._decode_next):
            chunk = self._next_chunk(decoding)
            if chunk is not None:
                self._decode_next = chunk.start < chunk.end
                return chunk
        self._decode_next = False
        return self._decode_batch() if decoding else None

    def commit_chunk(self, chunk: PromptChunk) -> None:
        """Records that a chunk's positions are in the KV cache."""
        sequence = chunk.sequence
        sequence.computed = chunk.end
        assert sequence.slot is not None
        self._cache.record(sequence.slot, chunk.end)
        caller = self._caller(sequence)
        caller.served += chunk.end - chunk.start
        if chunk.end == sequence.prompt_length:
            caller.prompting = None

    def commit_batch(self, batch: DecodeBatch) -> None:
        """Records that the last token of each row is in the KV cache.

        Of the candidates of a prompt the first keeps what it generates, and each the prompt.
        """
        for sequence in batch.sequences:
            sequence.computed += 1
            if self._cache.exact and sequence.candidate == 0:
                assert sequence.slot is not None
                self._cache.record(sequence.slot, sequence.computed)

    def remove(self, sequence: Sequence) -> tuple[Copy, ...]:
        """Removes a sequence in any state. The copies fill its slot, so that held slots stay consecutive."""
        sequence.finished = True
        caller = self._callers.get(sequence.request.identity)
        if caller is None:
            return ()
        copies: tuple[Copy, ...] = ()
        if sequence is caller.prompting:
            caller.prompting = None
        if sequence.slot is not None:
            caller.held -= 1
            copies = self._release(sequence)
        elif sequence in caller.waiting:
            if caller is self._blocked and sequence is caller.waiting[0]:
                self._blocked = None
                self._cache.share.stop_waiting()
            caller.waiting.remove(sequence)
            self._waiting -= 1
        if not (caller.waiting or caller.held):
            del self._callers[sequence.request.identity]
        return copies

    def _release(self, sequence: Sequence) -> tuple[Copy, ...]:
        assert sequence.slot is not None
        slot, sequence.slot = sequence.slot, None
        last = self._holders.pop()
        copies = self._cache.release(slot, last.computed)
        if last is not sequence:
            self._holders[slot] = last
            last.slot = slot
        return copies

    def forget(self, sequence: Sequence) -> None:
        """Marks a failing sequence's slot as holding nothing reusable: what was computed there may be wrong."""
        if sequence.slot is not None:
            self._cache.record(sequence.slot, 0)

    def _caller(self, sequence: Sequence) -> Caller:
        return self._callers[sequence.request.identity]

    def _level(self, without: Caller | None) -> int:
        """The work with which a caller starts: the least of all other waiting callers, or else of all other callers."""
        others = [caller for caller in self._callers.values() if caller is not without]
        waiting = [caller.served for caller in others if caller.backlogged]
        return min(waiting or [caller.served for caller in others], default=0)

    def _next_chunk(self, decoding: bool) -> PromptChunk | None:
        ready = [caller for caller in self._callers.values() if self._may_advance(caller)]
        for caller in sorted(ready, key=lambda candidate: candidate.served):
            copies: tuple[Copy, ...] = ()
            if caller.prompting is None and self._blocked in (None, caller):
                copies = self._admit(caller)
                self._blocked = caller if caller.prompting is None else None
            sequence = caller.prompting
            if sequence is not None:
                length = self._chunk_length(sequence, decoding)
                return PromptChunk(sequence, sequence.computed, sequence.computed + length, copies)
        return None

    def _may_advance(self, caller: Caller) -> bool:
        """Whether a caller has a sequence in prefill, or one waiting and a slot that it may take."""
        needed = self._reserved if caller.held else 0
        return caller.prompting is not None or (bool(caller.waiting) and self._cache.free > needed)

    def _chunk_length(self, sequence: Sequence, decoding: bool) -> int:
        """The length of a sequence's next prompt chunk, chosen so that no tile is left with one token.

        While sequences decode, chunks shrink with the position, so that each takes about as long as the first, and none
        is expected to take longer than `step_seconds`, unless even the smallest does.
        """
        remaining, most = sequence.prompt_length - sequence.computed, self._prompt_chunk
        if decoding:
            most = most * HALF_SPEED // (HALF_SPEED + sequence.computed)
            most = max(LEAST_CHUNK, min(most, self.times.longest_chunk(sequence.computed, self._step_seconds)))
        length = min(most, remaining)
        while length > 1 and (length % _TILE == 1 or remaining - length == 1):
            length -= 1
        return length

    def _admit(self, caller: Caller) -> tuple[Copy, ...]:
        """Gives a slot to the caller's next sequence, whose prefill begins after the copies, if its positions fit."""
        sequence = caller.next(overdue=self._now - self._patience)
        recompute = 0 if sequence.group.logits is not None else min(_RECOMPUTE, sequence.prompt_length)
        allocation = self._cache.allocate(
            sequence.tokens, sequence.request.identity, recompute, sequence.positions, sequence.wanted_scores
        )
        if allocation is None:
            return ()
        sequence.slot, sequence.scores = allocation.slot, allocation.scores
        # A single token would have a tile to itself: compute the one before it again.
        cached, rest = allocation.cached, sequence.prompt_length - allocation.cached
        sequence.computed = sequence.cached = max(0, cached - 1) if rest == 1 else cached
        self._holders.append(sequence)
        caller.prompting = caller.waiting.popleft()
        caller.held += 1
        self._waiting -= 1
        return allocation.copies

    def _decode_batch(self) -> DecodeBatch:
        rows = [sequence if sequence.decoding else None for sequence in self._holders]
        for row in rows:
            if row is not None:
                self._caller(row).served += _GENERATED_COST
        while rows[-1] is None:
            rows.pop()
        return DecodeBatch(tuple(rows))
