"""The requests that have not ended, as the event loop knows them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from service.engine.admission import Admission, Ticket, Work
from service.engine.generation import Generation


class Roster:
    """The requests in the engine: each from its admission until its last piece, its failure, or its caller's leaving.

    Only the event loop's thread uses it; the step thread's outbox calls it there. A request may be reported as ended
    more than once.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._tickets: dict[Generation, Ticket] = {}

    def enter(self, generation: Generation, identity: str, work: Iterable[Work], priority: int = 0) -> None:
        """Queues a request, with the work of each of its sequences."""
        self._tickets[generation] = self.admission.enter(identity, work, priority)

    def started(self, generation: Generation) -> None:
        """Records that the next waiting sequence of a request has a slot."""
        generation.start()
        if generation in self._tickets:
            self.admission.started(self._tickets[generation])

    def ended(self, generation: Generation) -> None:
        """Removes a request, and its sequences that still wait."""
        ticket = self._tickets.pop(generation, None)
        if ticket is not None:
            self.admission.leave(ticket)

    def __iter__(self) -> Iterator[Generation]:
        return iter(tuple(self._tickets))

    def __len__(self) -> int:
        return len(self._tickets)
