"""The memory for KV caches that the models of one process share. Bookkeeping; each step thread uses its own share."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable


class Budget:
    """`total` bytes for the KV caches of all models that join. Thread-safe.

    Memory is `held` by running sequences or `kept` for prefixes, which are given up when a sequence needs it. The
    oldest sequence that does not fit waits, and those of all models wait behind it, so that none starves.

    Invariant: what the shares hold and keep is at most `total` together, but for what a model is about to give up for
    a sequence that has taken its memory, before the next step of this model.
    """

    def __init__(self, total: int = sys.maxsize) -> None:
        self.total = total
        self.lock = threading.Lock()
        self.shares: list[Share] = []
        # Shares whose next sequence does not fit, in the order in which they began to wait.
        self.waiting: list[Share] = []

    @property
    def held(self) -> int:
        """The bytes that running sequences of all models hold. The lock must be held."""
        return sum(share.held_bytes for share in self.shares)

    def missing(self, needed: int) -> int | None:
        """How many bytes of prefixes must be given up for `needed` more bytes; None while sequences hold too much.

        The lock must be held.
        """
        held = self.held
        if held + needed > self.total:
            return None
        return held + sum(share.kept_bytes for share in self.shares) + needed - self.total


class Share:
    """What one model has of a budget, in positions of its KV cache. Only its step thread calls the methods.

    A position has `position_bytes`, and positions are taken in multiples of `granule`. The owner may set two callbacks,
    which are called on any thread and must return at once: `wake` when a sequence of this model that waits may fit, and
    `evict` when a sequence of another model needs what this model only keeps: `wanted` says how much then.
    """

    def __init__(self, budget: Budget, position_bytes: int = 1, granule: int = 1) -> None:
        self._budget = budget
        self._position_bytes = position_bytes
        self._granule = granule
        self.wake: Callable[[], None] = lambda: None
        self.evict: Callable[[], None] = lambda: None
        self._held = 0
        self._kept = 0
        self._waits_for = 0
        budget.shares.append(self)

    @property
    def held_bytes(self) -> int:
        """The bytes that running sequences hold."""
        return self._held * self._position_bytes

    @property
    def kept_bytes(self) -> int:
        """The bytes that are kept for prefixes."""
        return self._kept * self._position_bytes

    @property
    def positions(self) -> int:
        """The positions of the whole budget."""
        return self._budget.total // (self._position_bytes * self._granule) * self._granule

    @property
    def free(self) -> int:
        """The positions that sequences could take now: those that nobody holds."""
        budget = self._budget
        with budget.lock:
            held = budget.held
        return (budget.total - held) // (self._position_bytes * self._granule) * self._granule

    def rounded(self, positions: int) -> int:
        """The positions whose memory `positions` take: whole pages."""
        return math.ceil(positions / self._granule) * self._granule

    def take(self, positions: int) -> int | None:
        """Takes memory for a sequence: how many kept positions of this model must be evicted first, or None.

        None means that it has to wait: behind an older sequence, or for sequences that run. It is tried again whenever
        `wake` is called, until it fits or `stop_waiting`.
        """
        budget, needed = self._budget, self.rounded(positions) * self._position_bytes
        with budget.lock:
            missing = budget.missing(needed)
            is_next = not budget.waiting or budget.waiting[0] is self
            if is_next and missing is not None and missing <= self.kept_bytes:
                self._held += self.rounded(positions)
                self._end_wait()
                return max(0, math.ceil(missing / self._position_bytes))
            self._waits_for = needed
            if self not in budget.waiting:
                budget.waiting.append(self)
            if is_next and missing is not None:
                for share in budget.shares:
                    if share is not self and share._kept:
                        share.evict()
            return None

    def wanted(self) -> int:
        """How many positions that this model keeps a sequence of another model waits for."""
        budget = self._budget
        with budget.lock:
            if not budget.waiting or budget.waiting[0] is self:
                return 0
            missing = budget.missing(budget.waiting[0]._waits_for)
            return max(0, math.ceil((missing or 0) / self._position_bytes))

    def settle(self, held: int, kept: int) -> None:
        """Notes how many positions running sequences hold, and how many are kept for prefixes."""
        with self._budget.lock:
            self._held, self._kept = held, kept
            if self._budget.waiting:
                self._budget.waiting[0].wake()

    def stop_waiting(self) -> None:
        """Gives up the place of a sequence that waits."""
        with self._budget.lock:
            self._end_wait()

    def _end_wait(self) -> None:
        waiting = self._budget.waiting
        if self in waiting:
            waiting.remove(self)
            if waiting:
                waiting[0].wake()
