"""Decides which sequence advances by how many tokens. Pure: it plans and records, and never computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

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
_HALF_SPEED = 1280

# A generated token takes about as long as three of a prompt (default model, CPU, 8 and more rows).
_GENERATED_COST = 3
# Of so many slots one is kept for callers who hold none: a long answer cannot be interrupted, only not begun.
_SLOTS_PER_RESERVED = 16

Step = PromptChunk | DecodeBatch


@dataclass(frozen=True, slots=True)
class Load:
    """How busy a scheduler is: sequences that are `running`, with a slot, and `waiting`, without one yet.

    A caller among those `holding` slots could take `room` more, any other `first_room`. After `next_end` decode steps
    at the latest the first running sequence has ended.
    """

    running: int
    waiting: int
    room: int
    first_room: int
    holding: frozenset[str]
    next_end: int

    def room_for(self, identity: str) -> int:
        """How many slots the caller could take now."""
        return self.room if identity in self.holding else self.first_room


@dataclass(slots=True)
class _Caller:
    """What one caller has in the scheduler; `served` is the work done for it, in prompt tokens."""

    served: int
    waiting: deque[Sequence] = field(default_factory=deque)
    prompting: Sequence | None = None
    held: int = 0

    @property
    def backlogged(self) -> bool:
        """Whether there are prompts to compute."""
        return bool(self.waiting) or self.prompting is not None


class Scheduler:
    """Shares the model between callers, each served in order, with prompts in chunks between decode steps.

    Every prompt chunk, and with it a free slot, goes to the caller for whom the least work was done. Who comes, or
    comes back with nothing waiting, starts level with those who wait: time away earns nothing.

    Invariants: `holders[i]` is the sequence in slot i; at most one holder per caller is still computing its prompt;
    a caller is known exactly as long as it has sequences; the reserved slots are held by callers who held none when
    they got them; while sequences decode, no two prompt chunks that compute follow each other.
    """

    def __init__(self, cache: KVCache, prompt_chunk: int) -> None:
        self._cache = cache
        self._prompt_chunk = prompt_chunk
        self._reserved = cache.free // _SLOTS_PER_RESERVED
        self._callers: dict[str, _Caller] = {}
        self._holders: list[Sequence] = []
        self._waiting = 0
        self._decode_next = False

    @property
    def prompt_chunk(self) -> int:
        """The most prompt tokens of a step."""
        return self._prompt_chunk

    @property
    def slots(self) -> int:
        """How many sequences can hold a slot."""
        return self._cache.slots

    @property
    def holders(self) -> tuple[Sequence, ...]:
        """The sequences that hold a slot, by slot."""
        return tuple(self._holders)

    @property
    def running(self) -> int:
        """Sequences that hold a slot."""
        return len(self._holders)

    @property
    def waiting(self) -> int:
        """Sequences that do not hold a slot yet."""
        return self._waiting

    @property
    def reuse(self) -> Reuse:
        """What the cache has saved so far."""
        return self._cache.reuse

    def forget_reuse(self) -> None:
        """Counts what the cache saves from here on."""
        self._cache.reuse = Reuse(0, 0)

    def load(self) -> Load:
        """How busy it is."""
        free = self._cache.free
        general = max(0, free - self._reserved)
        return Load(
            running=len(self._holders),
            waiting=self._waiting,
            room=general,
            first_room=max(general, min(1, free)),
            holding=frozenset(identity for identity, caller in self._callers.items() if caller.held),
            next_end=min((each.request.max_tokens - each.generated for each in self._holders), default=0),
        )

    def add(self, sequences: Seq[Sequence]) -> None:
        """Queues the sequences of one request."""
        identity = sequences[0].request.identity
        caller = self._callers.get(identity)
        if caller is None or not caller.backlogged:
            level = self._level(without=caller)
            caller = self._callers.setdefault(identity, _Caller(level))
            caller.served = max(caller.served, level)
        caller.waiting.extend(sequences)
        self._waiting += len(sequences)

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
        caller = self._caller(sequence)
        caller.served += chunk.end - chunk.start
        if chunk.end == sequence.prompt_length:
            caller.prompting = None

    def remove(self, sequence: Sequence) -> tuple[Copy, ...]:
        """Ends a sequence in whatever state it is; the copies close the hole that it leaves among the slots."""
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
        """Sees to it that nothing is reused of what was computed for a sequence that fails: it may be wrong."""
        if sequence.slot is not None:
            self._cache.record(sequence.slot, 0)

    def _caller(self, sequence: Sequence) -> _Caller:
        return self._callers[sequence.request.identity]

    def _level(self, without: _Caller | None) -> int:
        """Where a caller with nothing waiting starts: the least done for any other who waits, else for any other."""
        others = [caller for caller in self._callers.values() if caller is not without]
        waiting = [caller.served for caller in others if caller.backlogged]
        return min(waiting or [caller.served for caller in others], default=0)

    def _next_chunk(self, decoding: bool) -> PromptChunk | None:
        able = [caller for caller in self._callers.values() if self._may_advance(caller)]
        if not able:
            return None
        caller = min(able, key=lambda each: each.served)
        copies: tuple[Copy, ...] = ()
        if caller.prompting is None:
            caller.prompting, copies = self._admit(caller.waiting.popleft())
            caller.held += 1
            self._waiting -= 1
        sequence = caller.prompting
        length = self._chunk_length(sequence, decoding)
        return PromptChunk(sequence, sequence.computed, sequence.computed + length, copies)

    def _may_advance(self, caller: _Caller) -> bool:
        """Whether a caller has a prompt in its slot, or one waiting and a slot that it may take."""
        needed = self._reserved if caller.held else 0
        return caller.prompting is not None or (bool(caller.waiting) and self._cache.free > needed)

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
        for row in rows:
            if row is not None:
                self._caller(row).served += _GENERATED_COST
        while rows[-1] is None:
            rows.pop()
        return DecodeBatch(tuple(rows))
