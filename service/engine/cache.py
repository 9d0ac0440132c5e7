"""Which sequence holds which slot of the KV cache, and which prefixes stay cached. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from service.engine.budget import Budget, Share
from service.engine.scores import Packed, Wanted, covers

# A prefix with fewer positions than this is computed again rather than kept: that is cheaper.
_WORTH_KEEPING = 16


@dataclass(frozen=True, slots=True)
class Copy:
    """An order to make slot `target` hold the first `length` positions of slot `source`, and no more.

    What else the target held is given back to the system, and if it `moves`, all that the source held as well. With the
    source as the target nothing is copied: the slot keeps its first `length` positions.
    """

    source: int
    target: int
    length: int
    moves: bool = False


@dataclass(frozen=True, slots=True)
class Allocation:
    """A slot that holds the first `cached` positions of the prompt once `copies` are done, in order.

    `scores` are those kept of the first `cached` + 1 tokens; the sequence adds to them. None if no scores are kept.
    """

    slot: int
    cached: int
    copies: tuple[Copy, ...]
    scores: list[Packed | None] | None = None


@dataclass(frozen=True, slots=True)
class Reuse:
    """`prompt_tokens` in all prompts that got a slot; `cached_tokens` of them were found in the cache."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class _Slot:
    """One slot: its first `valid` positions come from `tokens`; `used` orders slots by their last use.

    `tokens` and their kept `scores` are the sequence's own lists, so while the slot is held they may become longer.
    Then its sequence has taken memory for `taken` positions.
    """

    identity: str = ""
    tokens: Sequence[int] = ()
    scores: list[Packed | None] = field(default_factory=list)
    valid: int = 0
    used: int = 0
    taken: int = 0


class KVCache:
    """The slots of the KV cache, one for each running sequence, and the memory of their positions.

    Free slots are the prefix cache. A sequence takes memory for all its positions when it gets its slot; prefixes are
    kept in what is left.

    Where positions are `exact`, with the same bits however they were computed, those that were generated are reused
    like those of a prefill, and the scores of tokens are kept as long as the positions.

    Invariants: held slots are 0..held - 1, so that one call of the model covers them; the free slots keep the prefixes
    of ended sequences until the slots or their memory are needed, the least recently used first; a request never reuses
    positions or scores of another identity; unless they are exact, only positions of a prefill are ever reused.
    """

    def __init__(self, slots: int, share: Share | None = None, *, exact: bool = False) -> None:
        """Without a share of a budget, memory is no limit."""
        self.exact = exact
        self._slots = [_Slot() for _ in range(slots)]
        self._clock = 0
        self.share = share or Share(Budget())
        self.held = 0
        self.reuse = Reuse(0, 0)

    @property
    def slots(self) -> int:
        """How many slots there are."""
        return len(self._slots)

    @property
    def free(self) -> int:
        """How many slots are not held."""
        return len(self._slots) - self.held

    def allocate(
        self,
        tokens: Sequence[int],
        identity: str,
        recompute: int,
        positions: int | None = None,
        wanted: Wanted | None = None,
    ) -> Allocation | None:
        """Gives the next slot to a sequence, with the longest prefix of its prompt that any slot has.

        `tokens` is the prompt, to which the sequence adds what it generates. The last `recompute` tokens of the prompt
        are always computed again, and so is what `wanted` scores follow, unless they are kept. At least one slot must
        be free. The sequence takes memory for `positions`, by default those of the prompt; None means that it has to
        wait for it.
        """
        slot, prompt = self.held, len(tokens)
        taken = prompt if positions is None else positions
        missing = self.share.take(taken)
        if missing is None:
            return None
        source, cached, scores = self._longest_match(tokens, identity, prompt - recompute, wanted)
        had = self._slots[slot].valid
        in_place = source == slot
        # What follows the prefix is worth a copy of it all, where there is memory.
        keeps_rest = self.exact and had - cached >= _WORTH_KEEPING and missing <= 0
        if in_place and not keeps_rest:  # what it keeps becomes a part of what the sequence has taken
            missing -= self.share.rounded(had)
        copies, missing = self._give_up(missing, but=source)
        if not in_place or keeps_rest:
            copies += self._keep(slot, spare=source)
        if cached and not in_place:
            moves = missing > 0  # only if the source, a free slot, has the last prefix that is kept
            copies.append(Copy(source, slot, cached, moves))
            if moves:
                self._slots[source] = _Slot()
        elif cached < had:
            copies.append(Copy(slot, slot, cached))
        if cached:
            self._touch(source)
        self.reuse = Reuse(self.reuse.prompt_tokens + prompt, self.reuse.cached_tokens + cached)
        self._slots[slot] = _Slot(identity, tokens, scores, cached, taken=self.share.rounded(taken))
        self._touch(slot)
        self.held += 1
        self._settle()
        return Allocation(slot, cached, tuple(copies), scores if self.exact else None)

    def evict(self) -> tuple[Copy, ...]:
        """Gives up prefixes whose memory a sequence of another model waits for."""
        copies, _ = self._give_up(self.share.wanted())
        self._settle()
        return tuple(copies)

    def record(self, slot: int, valid: int) -> None:
        """Notes that the first `valid` positions of the slot's tokens are computed, and may be reused."""
        self._slots[slot].valid = valid

    def release(self, slot: int, last_length: int) -> tuple[Copy, ...]:
        """Frees a slot and moves the last held slot, which has `last_length` positions, into its place.

        The sequence that was in slot `held` (as it is after the call) is then in `slot`.
        """
        self.held -= 1
        last = self.held
        if slot == last:
            copies = [Copy(slot, slot, self._slots[slot].valid)]
        else:
            copies = self._keep(slot, spare=last)
            copies.append(Copy(last, slot, last_length, moves=True))
            self._slots[slot] = self._slots[last]
            self._slots[last] = _Slot()
        self._settle()
        return tuple(copies)

    def _settle(self) -> None:
        """Tells the share what the slots hold and keep."""
        held, free = self._slots[: self.held], self._slots[self.held :]
        self.share.settle(sum(slot.taken for slot in held), sum(self.share.rounded(slot.valid) for slot in free))

    def _give_up(self, positions: int, but: int = -1) -> tuple[list[Copy], int]:
        """Empties free slots, the least recently used first, without slot `but`, until that many positions are free.

        Returns the copies, and how many positions are still missing.
        """
        copies = []
        for slot in sorted(range(self.held, len(self._slots)), key=lambda slot: self._slots[slot].used):
            if positions > 0 and slot != but and self._slots[slot].valid:
                positions -= self.share.rounded(self._slots[slot].valid)
                self._slots[slot] = _Slot()
                copies.append(Copy(slot, slot, 0))
        return copies, positions

    def _longest_match(
        self, tokens: Sequence[int], identity: str, limit: int, wanted: Wanted | None
    ) -> tuple[int, int, list[Packed | None]]:
        """The slot with the most positions to reuse, at most `limit`, their number, and the scores kept with them.

        Where none has any, slot -1. A token's score goes with the position before it, which has to be computed again to
        get a score that is `wanted` and not kept.
        """
        # From 2: a prompt of one token runs in another kernel, so longer prompts cannot reuse it.
        best, longest, scores = -1, 1, list[Packed | None]()
        for index, slot in enumerate(self._slots):
            if slot.identity == identity and slot.valid > longest:
                most = min(limit, slot.valid)
                common = common_prefix(tokens, slot.tokens, most + 1)
                match = min(most, common, wanted.scored(slot.scores, common) - 1 if wanted else most)
                if match > longest:
                    best, longest, scores = index, match, slot.scores[: min(common, match + 1)]
        return (best, longest, scores) if best >= 0 else (-1, 0, scores)

    def _keep(self, slot: int, spare: int) -> list[Copy]:
        """Moves a slot's prefix to the least recently used free slot, unless that one was used more recently."""
        kept = self._slots[slot]
        if kept.valid < _WORTH_KEEPING or self._kept_elsewhere(slot):
            return []
        free = [i for i in range(self.held, len(self._slots)) if i not in (slot, spare)]
        target = min(free, key=lambda i: (self._slots[i].valid > 0, self._slots[i].used), default=None)
        if target is None or (self._slots[target].valid and self._slots[target].used > kept.used):
            return []
        self._slots[target] = kept
        return [Copy(slot, target, kept.valid)]

    def _kept_elsewhere(self, slot: int) -> bool:
        kept = self._slots[slot]
        return any(
            other.identity == kept.identity
            and other.valid >= kept.valid
            and common_prefix(kept.tokens, other.tokens, kept.valid) == kept.valid
            and covers(other.scores, kept.scores[: kept.valid])
            for index, other in enumerate(self._slots)
            if index != slot
        )

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._slots[slot].used = self._clock


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """The length of the common prefix of `a` and `b`, at most `limit`."""
    low, high = 0, max(0, min(limit, len(a), len(b)))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
