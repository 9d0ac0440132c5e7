"""The requests in the engine, as the event loop knows them: which queue, and which have not ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from service.engine.admission import Admission, Ticket, Work
from service.engine.generation import Generation


class Roster:
    """Who is in the engine, from being let in until the last piece is sent, the request fails, or its caller leaves.

    The event loop's thread alone touches it; the step thread tells it through its outbox. A request that has ended may
    be told of again.
    """

    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self._tickets: dict[Generation, Ticket] = {}

    def enter(self, generation: Generation, identity: str, work: Iterable[Work]) -> None:
        """Queues a request, with the work of each of its sequences."""
        self._tickets[generation] = self.admission.enter(identity, work)

    def started(self, generation: Generation) -> None:
        """Notes that the first of a request's waiting sequences has got a slot."""
        generation.start()
        if generation in self._tickets:
            self.admission.started(self._tickets[generation])

    def ended(self, generation: Generation) -> None:
        """Forgets a request, and whatever still waits of it."""
        ticket = self._tickets.pop(generation, None)
        if ticket is not None:
            self.admission.leave(ticket)

    def __iter__(self) -> Iterator[Generation]:
        return iter(tuple(self._tickets))

    def __len__(self) -> int:
        return len(self._tickets)
