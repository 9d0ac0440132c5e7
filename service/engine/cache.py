"""Which sequence holds which slot of the KV cache, and which prompts stay cached. Pure bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# A prompt with fewer positions than this is computed again rather than kept: that is cheaper.
_WORTH_KEEPING = 16


@dataclass(frozen=True, slots=True)
class Copy:
    """An order to copy the first `length` positions of slot `source` to slot `target`."""

    source: int
    target: int
    length: int


@dataclass(frozen=True, slots=True)
class Allocation:
    """A slot that holds the first `cached` positions of the prompt once `copies` are done, in order."""

    slot: int
    cached: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, slots=True)
class Reuse:
    """`prompt_tokens` in all prompts that got a slot; `cached_tokens` of them were found in the cache."""

    prompt_tokens: int
    cached_tokens: int


@dataclass(slots=True)
class _Slot:
    """One slot: its first `valid` positions come from `prompt`; `used` orders slots by their last use."""

    identity: str = ""
    prompt: Sequence[int] = ()
    valid: int = 0
    used: int = 0


class KVCache:
    """The slots of the KV cache, one for each running sequence; free slots are the prefix cache.

    Invariants: held slots are 0..held - 1, so that one call of the model covers them; the free slots keep the prompts
    of ended sequences until the slots are needed, the least recently used first; only positions of a prefill are ever
    reused; a request never reuses a prompt of another identity.
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
        """Gives the next slot to a sequence, with the longest prefix of its prompt that any slot has.

        The last `recompute` tokens of the prompt are always computed again. At least one slot must be free.
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
        """Frees a slot and moves the last held slot, which has `last_length` positions, into its place.

        The sequence that was in slot `held` (as it is after the call) is then in `slot`.
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
        best, longest = -1, 1  # from 2: a prompt of one token runs in another kernel, so longer prompts cannot reuse it
        for index, slot in enumerate(self._slots):
            if slot.identity == identity and slot.valid > longest:
                match = common_prefix(prompt, slot.prompt, min(limit, slot.valid))
                if match > longest:
                    best, longest = index, match
        return (best, longest) if best >= 0 else (-1, 0)

    def _keep(self, slot: int, spare: int) -> list[Copy]:
        """Moves a slot's prompt to the least recently used free slot, unless that one was used more recently."""
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
            and common_prefix(kept.prompt, other.prompt, kept.valid) == kept.valid
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
