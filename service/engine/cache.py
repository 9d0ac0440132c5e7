"""Who holds which slot of keys and values, and which prompts' slots are worth keeping. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Fewer positions than this are cheaper to compute again than to keep track of.
_WORTH_KEEPING = 16


@dataclass(frozen=True, slots=True)
class Copy:
    """The first `length` positions of slot `source` are to be copied to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """A slot whose first `cached` positions are the prompt's once `copies` are done, in order."""

    slot: int
    cached: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Reuse:
    """Of `prompt_tokens` that slots were given for, `cached_tokens` were in some slot already."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class _Slot:
    """What a slot's first `valid` positions were computed from; `used` orders slots by last use."""

    identity: str = ""
    prompt: Sequence[int] = ()
    valid: int = 0
    used: int = 0


class KVCache:
    """Slots of keys and values, one per sequence.

    Invariants: held slots are 0..held - 1, so that one call of the model covers them; slots from `held` on keep the
    prompts of ended sequences until their room is needed, the least recently used first; only positions that prompt
    chunks computed are ever reused; an identity never meets another identity's prompts.
    """

    def __init__(self, slots: int) -> None:
        self._slots = [_Slot() for _ in range(slots)]
        self._clock = 0
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

    def allocate(self, prompt: Sequence[int], identity: str, recompute: int) -> Allocation:
        """Gives the next slot to a sequence, with as much of its prompt as some slot already has.

        At least the last `recompute` tokens of the prompt are left to compute. The cache must not be full.
        """
        slot = self.held
        source, cached = self._longest_match(prompt, identity, len(prompt) - recompute)
        copies = []
        if source != slot:
            copies += self._keep(slot, spare=source)
            if cached:
                copies.append(Copy(source, slot, cached))
        if cached:
            self._touch(source)
        self.reuse = Reuse(self.reuse.prompt_tokens + len(prompt), self.reuse.cached_tokens + cached)
        self._slots[slot] = _Slot(identity, prompt, cached)
        self._touch(slot)
        self.held += 1
        return Allocation(slot, cached, tuple(copies))

    def record(self, slot: int, valid: int) -> None:
        """Notes that the first `valid` positions of the slot's prompt are computed."""
        self._slots[slot].valid = valid

    def release(self, slot: int, last_length: int) -> tuple[Copy, ...]:
        """Takes a slot back and fills the hole with the last held one, which has `last_length` positions.

        The sequence of slot `held` (after the call) is then in `slot`.
        """
        self.held -= 1
        last = self.held
        if slot == last:
            return ()
        copies = self._keep(slot, spare=last)
        copies.append(Copy(last, slot, last_length))
        self._slots[slot] = self._slots[last]
        self._slots[last] = _Slot()
        return tuple(copies)

    def _longest_match(self, prompt: Sequence[int], identity: str, limit: int) -> tuple[int, int]:
        best, longest = -1, 1  # a prompt of one token takes a kernel of its own: its position serves no longer prompt
        for index, slot in enumerate(self._slots):
            if slot.identity == identity and slot.valid > longest:
                match = common_prefix(prompt, slot.prompt, min(limit, slot.valid))
                if match > longest:
                    best, longest = index, match
        return (best, longest) if best >= 0 else (-1, 0)

    def _keep(self, slot: int, spare: int) -> list[Copy]:
        """Moves a slot's prompt out of the way if it is worth more than what some unheld slot keeps."""
        kept = self._slots[slot]
        if kept.valid < _WORTH_KEEPING or self._kept_elsewhere(slot):
            return []
        rooms = [i for i in range(self.held, len(self._slots)) if i not in (slot, spare)]
        room = min(rooms, key=lambda i: (self._slots[i].valid > 0, self._slots[i].used), default=None)
        if room is None or (self._slots[room].valid and self._slots[room].used > kept.used):
            return []
        self._slots[room] = kept
        return [Copy(slot, room, kept.valid)]

    def _kept_elsewhere(self, slot: int) -> bool:
        kept = self._slots[slot]
        return any(
            other.identity == kept.identity
            and other.valid >= kept.valid
            and common_prefix(kept.prompt, other.prompt, kept.valid) == kept.valid
            for index, other in enumerate(self._slots)
            if index != slot
        )

    def _touch(self, slot: int) -> None:
        self._clock += 1
        self._slots[slot].used = self._clock


def common_prefix(a: Sequence[int], b: Sequence[int], limit: int) -> int:
    """How many of the first `limit` items of `a` and `b` are equal, up to the first that is not."""
    low, high = 0, max(0, min(limit, len(a), len(b)))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
