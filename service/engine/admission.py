"""Limits the queue: estimates from past steps how long a request would wait. Pure: callers pass all times in."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from service.errors import DeadlineError, OverloadedError

# Each observation multiplies the weight of all earlier ones by this: the last 34 make up half of a mean.
_DECAY = 0.98
# In seconds: the shortest time after which a refused caller is asked to retry.
_LEAST_RETRY = 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """Queued work: sequences, the prompt tokens to prefill, the most tokens to generate, and positions to take."""

    sequences: int = 0
    prompt_tokens: float = 0
    new_tokens: float = 0
    positions: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.sequences + other.sequences,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.positions + other.positions,
        )

    def __mul__(self, share: float) -> Work:
        """A share of this work, of whole sequences."""
        return Work(
            math.ceil(self.sequences * share),
            self.prompt_tokens * share,
            self.new_tokens * share,
            self.positions * share,
        )

    def __sub__(self, other: Work) -> Work:
        return self + other * -1


@dataclass(frozen=True, slots=True)
class Space:
    """What one caller could take now: `slots`, and `positions` of the KV cache.

    `ends` has for each running sequence within how many decode steps it ends, and the positions that it frees then.
    """

    slots: int
    positions: int
    ends: tuple[tuple[int, int], ...] = ()

    def steps_until(self, positions: float) -> int:
        """The decode steps until a sequence of that many positions can have a slot, or until nothing runs any more."""
        slots, free, steps = self.slots, self.positions, 0
        for end, freed in sorted(self.ends):
            if slots and free >= positions:
                break
            slots, free, steps = slots + 1, free + freed, end
        return steps


@dataclass(slots=True)
class _Mean:
    """A ratio of two exponentially weighted sums; `start` until there is something to divide by."""

    start: float
    numerator: float = 0.0
    denominator: float = 0.0

    def add(self, numerator: float, denominator: float) -> None:
        self.numerator = self.numerator * _DECAY + numerator
        self.denominator = self.denominator * _DECAY + denominator

    @property
    def value(self) -> float:
        return self.numerator / self.denominator if self.denominator else self.start


class Pace:
    """How fast the engine works, in seconds, and how much of `max_tokens` is used: both measured."""

    def __init__(self) -> None:
        self._prompt_token = _Mean(0.0)
        self._step = _Mean(0.0)
        self._token = _Mean(0.0)
        self._used = _Mean(1.0)
        self._chunk = _Mean(math.inf)

    def chunk(self, tokens: int, seconds: float) -> None:
        """Records a prompt chunk."""
        self._prompt_token.add(seconds, tokens)
        self._chunk.add(tokens, 1)

    def step(self, rows: int, seconds: float) -> None:
        """Records a decode step of `rows` sequences."""
        self._step.add(seconds, 1)
        self._token.add(seconds, rows)

    def ended(self, generated: int, allowed: int) -> None:
        """Records that a sequence ended by itself after `generated` of `allowed` tokens."""
        self._used.add(generated, allowed)

    def prompts(self, tokens: float, *, beside: bool = False) -> float:
        """Seconds for the prefill of this many tokens; `beside` running sequences a decode step follows each chunk."""
        steps = tokens / self._chunk.value * self._step.value if beside else 0.0
        return tokens * self._prompt_token.value + steps

    def generation(self, allowed: float) -> float:
        """Seconds to decode what sequences will use of `allowed` tokens, in batches as large as the recent ones."""
        return allowed * self._used.value * self._token.value

    def steps(self, allowed: float) -> float:
        """Seconds until a running sequence with `allowed` more tokens ends."""
        return allowed * self._used.value * self._step.value

    def total(self, work: Work) -> float:
        """Seconds of the model's time for this work."""
        return self.prompts(work.prompt_tokens) + self.generation(work.new_tokens)


def work_ahead(mine: Work, others: Iterable[Work], pace: Pace) -> Work:
    """The work before a caller's next request starts: all that it has queued, and as much of every other caller's."""
    total = mine
    seconds = pace.total(mine)
    for other in others:
        needed = pace.total(other)
        total += other * (min(1.0, seconds / needed) if needed else 0.0)
    return total


def queue_seconds(ahead: Work, positions: float, space: Space, pace: Pace) -> float:
    """Estimated seconds until a new request of `positions` gets a slot, given the queued work `ahead` of it.

    If slots and memory are free for all, only the prefills ahead delay it. If not, the first that waits gets a slot
    when running sequences have ended; from then on all are in use, and become free at the pace of the work.
    """
    seconds = pace.prompts(ahead.prompt_tokens, beside=bool(space.ends))
    needed = ahead.positions + positions
    if ahead.sequences < space.slots and needed <= space.positions:
        return seconds
    first = ahead.positions / ahead.sequences if ahead.sequences else positions
    seconds += pace.steps(space.steps_until(first))
    if ahead.sequences:
        without_slot = (ahead.sequences - space.slots) / ahead.sequences
        without_memory = (needed - space.positions) / needed
        seconds += pace.generation(ahead.new_tokens * min(1.0, max(0.0, without_slot, without_memory)))
    return seconds


@dataclass(eq=False, slots=True)
class Ticket:
    """A request in the queue: the work of each of its sequences that has no slot yet, in order."""

    identity: str
    priority: int = 0
    waiting: deque[Work] = field(default_factory=deque)


class Admission:
    """The limits of the queue: estimated seconds of wait, waiting sequences, and their prompt tokens, for each caller.

    Invariants: `_queued` is the sum of all tickets by identity and priority, without those that have nothing waiting. A
    caller may have at most as many sequences waiting as there are places left, so that one caller leaves half to the
    others; and of the tokens of prompts, which take memory, at most half.
    """

    def __init__(self, max_sequences: int, max_seconds: float, max_tokens: float = math.inf) -> None:
        self.pace = Pace()
        self.max_sequences = max_sequences
        self.max_seconds = max_seconds
        self.max_tokens = max_tokens
        self._queued: dict[str, dict[int, Work]] = {}

    @property
    def queued(self) -> dict[str, Work]:
        """The queued work, by caller."""
        return {identity: sum(works.values(), Work()) for identity, works in self._queued.items()}

    def wait(self, identity: str, space: Space, positions: float = 1, *, priority: int = 0) -> float:
        """Estimated seconds that a request of this caller, which takes `positions`, would wait.

        Of the caller's own work only what is as urgent or more is before it.
        """
        before = (work for other, work in self._queued.get(identity, {}).items() if other <= priority)
        mine = sum(before, Work())
        others = (work for other, work in self.queued.items() if other != identity)
        return queue_seconds(work_ahead(mine, others, self.pace), positions, space, self.pace)

    def check(
        self, identity: str, space: Space, deadline: float | None, positions: float = 1, *, priority: int = 0
    ) -> None:
        """Raises OverloadedError when the queue is too long, DeadlineError when the wait exceeds the deadline.

        `deadline` is the caller's, in seconds from now; None means no deadline. `positions` are those of the request,
        as far as they are known.
        """
        seconds = self.wait(identity, space, positions, priority=priority)
        if seconds > self.max_seconds:
            raise OverloadedError(
                f"The service is overloaded: the wait is about {math.ceil(seconds)} s, and at most "
                f"{self.max_seconds:g} s are allowed. Please retry later.",
                retry_after=max(_LEAST_RETRY, seconds),
            )
        queued = self.queued
        mine, every = queued.get(identity, Work()), sum(queued.values(), Work())
        if mine.sequences + every.sequences >= self.max_sequences:
            message = f"The service is overloaded: too many sequences are waiting, {mine.sequences} of them yours."
            raise OverloadedError(message, retry_after=max(_LEAST_RETRY, seconds))
        if mine.prompt_tokens + every.prompt_tokens >= self.max_tokens:
            message = (
                f"The service is overloaded: prompts of {every.prompt_tokens:.0f} tokens are waiting, "
                f"{mine.prompt_tokens:.0f} of them yours, and at most {self.max_tokens:.0f} may. Please retry later."
            )
            raise OverloadedError(message, retry_after=max(_LEAST_RETRY, seconds))
        if deadline is not None and deadline < seconds:
            raise DeadlineError(f"The deadline is in {deadline:.3g} s, and the wait alone is about {seconds:.3g} s.")

    def enter(self, identity: str, waiting: Iterable[Work], priority: int = 0) -> Ticket:
        """Queues a request."""
        ticket = Ticket(identity, priority, deque(waiting))
        queued = self._queued.setdefault(identity, {})
        queued[priority] = sum(ticket.waiting, queued.get(priority, Work()))
        self._tidy(ticket)
        return ticket

    def started(self, ticket: Ticket) -> None:
        """Records that the next waiting sequence of a request has a slot."""
        if ticket.waiting:  # empty when the caller has left in the meantime
            self._queued[ticket.identity][ticket.priority] -= ticket.waiting.popleft()
            self._tidy(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Removes a request's sequences that still wait."""
        while ticket.waiting:
            self.started(ticket)

    def _tidy(self, ticket: Ticket) -> None:
        queued = self._queued[ticket.identity]
        if not queued[ticket.priority].sequences:
            del queued[ticket.priority]
        if not queued:
            del self._queued[ticket.identity]
