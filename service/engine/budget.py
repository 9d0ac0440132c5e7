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

    Invariant: at every step of a model, what the shares hold and keep is at most `total` together.
    """

    def __init__(self, total: int = sys.maxsize) -> None:
        self.total = total
        self.lock = threading.Lock()
        self.shares: list[Share] = []
        # Shares whose next sequence does not fit, in the order in which they began to wait.
        self.waiting: list[Share] = []


class Share:
    """What one model has of a budget, in positions of its KV cache. Only its step thread calls the methods.

    A position has `position_bytes`, and positions are taken in multiples of `granule`. The owner may set two callbacks,
    which are called on any thread and must return at once: `wake` when a sequence of this model that waits may fit, and
    `evict` with a number of positions when a sequence of another model needs what this model only keeps.
    """

    def __init__(self, budget: Budget, position_bytes: int = 1, granule: int = 1) -> None:
        self._budget = budget
        self._position_bytes = position_bytes
        self._granule = granule
        self.wake: Callable[[], None] = lambda: None
        self.evict: Callable[[int], None] = lambda positions: None
        self._held = 0
        self._kept = 0
        budget.shares.append(self)

    @property
    def positions(self) -> int:
        """The positions of the whole budget."""
        return self._budget.total // (self._position_bytes * self._granule) * self._granule

    @property
    def free(self) -> int:
        """The positions that sequences could take now: those that nobody holds."""
        budget = self._budget
        with budget.lock:
            held = sum(share._held * share._position_bytes for share in budget.shares)
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
            held = sum(share._held * share._position_bytes for share in budget.shares)
            kept = sum(share._kept * share._position_bytes for share in budget.shares)
            missing = held + kept + needed - budget.total
            is_next = not budget.waiting or budget.waiting[0] is self
            if is_next and missing <= self._kept * self._position_bytes:
                self._held += self.rounded(positions)
                self._end_wait()
                return max(0, math.ceil(missing / self._position_bytes))
            if self not in budget.waiting:
                budget.waiting.append(self)
            if is_next and held + needed <= budget.total:
                for share in budget.shares:
                    if share is not self and share._kept:
                        share.evict(math.ceil(missing / share._position_bytes))
            return None

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
