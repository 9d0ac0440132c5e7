"""Who may queue: estimates from the steps taken how long a request would wait. Pure: times are told, never taken."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.errors import DeadlineError, OverloadedError

# What one step counts when the next is observed: of what is remembered, half is the last 34 steps.
_MEMORY = 0.98
# Who is refused is never told to come back sooner, in seconds.
_LEAST_RETRY = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """Work that waits: sequences, the prompt tokens to compute for them, and the tokens that they may generate."""

    sequences: int = 0
    prompt_tokens: float = 0
    new_tokens: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.sequences + other.sequences,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
        )

    def __sub__(self, other: Work) -> Work:
        return self + Work(-other.sequences, -other.prompt_tokens, -other.new_tokens)


@dataclass(slots=True)
class _Mean:
    """A ratio of two sums in which the past counts less and less; `start` until there is something to divide by."""

    start: float
    above: float = 0.0
    below: float = 0.0

    def add(self, above: float, below: float) -> None:
        self.above = self.above * _MEMORY + above
        self.below = self.below * _MEMORY + below

    @property
    def value(self) -> float:
        return self.above / self.below if self.below else self.start


class Pace:
    """How fast the engine works and how much of `max_tokens` is used, learnt from what happens. Times in seconds."""

    def __init__(self) -> None:
        self._prompt_token = _Mean(0.0)
        self._step = _Mean(0.0)
        self._token = _Mean(0.0)
        self._used = _Mean(1.0)

    def chunk(self, tokens: int, seconds: float) -> None:
        """Notes a prompt chunk."""
        self._prompt_token.add(seconds, tokens)

    def step(self, rows: int, seconds: float) -> None:
        """Notes a decode step of so many sequences."""
        self._step.add(seconds, 1)
        self._token.add(seconds, rows)

    def ended(self, generated: int, allowed: int) -> None:
        """Notes that a sequence ended by itself after `generated` of `allowed` tokens."""
        self._used.add(generated, allowed)

    def prompts(self, tokens: float) -> float:
        """Seconds to compute so many prompt tokens."""
        return tokens * self._prompt_token.value

    def generation(self, allowed: float) -> float:
        """Seconds of the machine to generate what sequences use of so many allowed tokens, in company as of late."""
        return allowed * self._used.value * self._token.value

    def steps(self, allowed: float) -> float:
        """Seconds until a running sequence ends that may generate so many more tokens."""
        return allowed * self._used.value * self._step.value

    def total(self, work: Work) -> float:
        """Seconds of the machine that the work takes."""
        return self.prompts(work.prompt_tokens) + self.generation(work.new_tokens)


def work_ahead(mine: Work, others: Iterable[Work], pace: Pace) -> Work:
    """What is done before a caller's next request begins: all that it queued itself, and as much for every other."""
    total = mine
    seconds = pace.total(mine)
    for other in others:
        whole = pace.total(other)
        share = min(1.0, seconds / whole) if whole else 0.0
        total += Work(math.ceil(other.sequences * share), other.prompt_tokens * share, other.new_tokens * share)
    return total


def queue_seconds(ahead: Work, room: int, next_end: int, pace: Pace) -> float:
    """The estimated wait for a slot of who comes after the work `ahead`, with `room` free slots.

    Who finds room waits for the prompts ahead alone. Else the first slot becomes free within `next_end` decode steps;
    from then on slots are full, and become free at the pace at which the work is done.
    """
    seconds = pace.prompts(ahead.prompt_tokens)
    if ahead.sequences < room:
        return seconds
    seconds += pace.steps(next_end)
    if ahead.sequences:
        seconds += pace.generation(ahead.new_tokens * (ahead.sequences - room) / ahead.sequences)
    return seconds


@dataclass(eq=False, slots=True)
class Ticket:
    """A request's place in the queue: the work of each of its sequences that has no slot yet, in order."""

    identity: str
    waiting: deque[Work] = field(default_factory=deque)


class Admission:
    """The queue as callers see it: bounded by estimated seconds, and by sequences, for each of them.

    Invariants: `_queued` is the sum of all tickets by identity, without identities of which nothing waits. No caller
    may queue more sequences than there is still room for, so that one alone leaves half to all others.
    """

    def __init__(self, max_sequences: int, max_seconds: float) -> None:
        self.pace = Pace()
        self.max_sequences = max_sequences
        self.max_seconds = max_seconds
        self._queued: dict[str, Work] = {}

    @property
    def queued(self) -> dict[str, Work]:
        """The work that waits, by caller."""
        return dict(self._queued)

    def wait(self, identity: str, room: int, next_end: int) -> float:
        """Seconds that a request of this caller would wait, as estimated."""
        mine = self._queued.get(identity, Work())
        others = (work for other, work in self._queued.items() if other != identity)
        return queue_seconds(work_ahead(mine, others, self.pace), room, next_end, self.pace)

    def check(self, identity: str, room: int, next_end: int, deadline: float | None) -> None:
        """Raises OverloadedError when the queue is too long for another request, DeadlineError when it is for this one.

        `deadline` are the seconds that the caller gives the request, if it says.
        """
        seconds = self.wait(identity, room, next_end)
        if seconds > self.max_seconds:
            raise OverloadedError(
                f"The service is overloaded: the wait is about {math.ceil(seconds)} s, and at most "
                f"{self.max_seconds:g} s are allowed. Please retry later.",
                retry_after=max(_LEAST_RETRY, seconds),
            )
        mine = self._queued.get(identity, Work()).sequences
        every = sum(work.sequences for work in self._queued.values())
        if mine + every >= self.max_sequences:
            message = f"The service is overloaded: too many requests are waiting, {mine} of them yours."
            raise OverloadedError(message, retry_after=max(_LEAST_RETRY, seconds))
        if deadline is not None and deadline < seconds:
            raise DeadlineError(f"The deadline is in {deadline:.3g} s, and the wait alone is about {seconds:.3g} s.")

    def enter(self, identity: str, waiting: Iterable[Work]) -> Ticket:
        """Queues a request."""
        ticket = Ticket(identity, deque(waiting))
        self._queued[identity] = sum(ticket.waiting, self._queued.get(identity, Work()))
        self._tidy(identity)
        return ticket

    def started(self, ticket: Ticket) -> None:
        """Notes that the first waiting sequence of a request has got a slot."""
        if ticket.waiting:  # empty when the caller has left meanwhile
            self._queued[ticket.identity] -= ticket.waiting.popleft()
            self._tidy(ticket.identity)

    def leave(self, ticket: Ticket) -> None:
        """Ends a request's waiting, whatever still waits of it."""
        while ticket.waiting:
            self.started(ticket)

    def _tidy(self, identity: str) -> None:
        if not self._queued[identity].sequences:
            del self._queued[identity]
