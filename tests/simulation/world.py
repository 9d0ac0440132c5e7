"""One episode of the simulated world: the real engine, driven turn by turn, and what must hold after every turn."""

from __future__ import annotations

import gc
import random
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any
from unittest import mock

import numpy as np

from service.engine import engine as engines
from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.generation import Generation
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence as Candidate
from service.engine.steps import Steps
from service.errors import EngineDiedError, EngineFaultError, OverloadedError, SlowReaderError, UnavailableError
from service.text.tokenizer import Tokenizer
from service.types import Request
from tests.simulation.callers import IDENTITIES, STATES, Visit, check, expected, random_request
from tests.support.fakes import FakeModel

CONTEXT = 64
CHUNK = 16
SEND_TIMEOUT = 10.0
# Most turns for which a neighbour holds memory.
NEIGHBOUR_HOLDS = 30
# Turns that a prompt in a slot may have to wait for others'.
PROMPT_PATIENCE = 200


class WorldModel(FakeModel):
    """The alphabet model, which checks that each row continues its own slot's tokens, of its own caller.

    `generated` says of each position whether a decode step has computed it.
    """

    def __init__(self, slots: int, world: World) -> None:
        super().__init__(slots, CONTEXT)
        self.histories = deque(maxlen=0)  # type: ignore[assignment]
        self.owners = [""] * slots
        self.generated: list[list[bool]] = [[] for _ in range(slots)]
        self.world = world

    def forward(
        self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits_at: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        holders = self.world.scheduler.holders
        self.world.check_memory([len(slot) for slot in self.slots])
        self.world.before_step(holders[first_slot : first_slot + len(rows)], rows)
        logits = super().forward(first_slot, rows, past, logits_at)
        for index, row in enumerate(rows):
            if not row:
                continue
            slot = first_slot + index
            holder = holders[slot]
            if past[index] == 0:
                self.owners[slot] = holder.request.identity
            if not holder.decoding and any(self.generated[slot][: past[index]]):
                check(self.world.exact, "a generated position was reused, and has other bits than a prefill's")
                self.world.count("generated positions reused")
            self.generated[slot][past[index] :] = [holder.decoding] * len(row)
            check(self.owners[slot] == holder.request.identity, "another caller's prompt was reused")
            length = past[index] + len(row)
            check(
                self.slots[slot][:length] == holder.tokens[:length], "a row follows tokens that are not its own", slot
            )
        poisoned = self.world.poisoned
        if poisoned:
            for at, (row, _) in enumerate(logits_at):
                if holders[first_slot + row] in poisoned:
                    logits[at, 3] = np.nan
        return logits

    def copy(self, copies: Sequence[Any]) -> None:
        super().copy(copies)
        for item in copies:
            self.owners[item.target] = self.owners[item.source]
            self.generated[item.target] = self.generated[item.source][: item.length]


class WorldShare(Share):
    """A share that checks that nobody overtakes a sequence that waits for memory.

    `blocked` are the positions of that sequence, and `refused` says whether one had to wait since the last look.
    """

    blocked: int | None = None
    refused = False

    def take(self, positions: int) -> int | None:
        missing = super().take(positions)
        check(self.blocked in (None, positions), "overtaken by one that fits", self.blocked, positions)
        self.blocked = positions if missing is None else None
        self.refused |= missing is None
        return missing

    def stop_waiting(self) -> None:
        super().stop_waiting()
        self.blocked = None


class Neighbour:
    """Another model on the same memory, of which it has now a part and now nothing."""

    def __init__(self, budget: Budget, draw: random.Random) -> None:
        self.share = Share(budget)
        self.most = budget.total // 2
        self.draw = draw
        self.held = 0
        self.next = 0.0

    def turn(self, clock: float) -> None:
        if clock < self.next:
            return
        wanted = 0 if self.held else self.draw.randrange(1, self.most)
        if wanted and self.share.take(wanted) is None:
            return  # it has to wait, and tries again
        self.held = wanted
        self.share.settle(wanted, 0)
        self.next = clock + self.draw.randrange(1, NEIGHBOUR_HOLDS)


class World:
    """One episode."""

    def __init__(
        self,
        seed: int,
        tokenizer: Tokenizer,
        *,
        engine: type[Engine] = Engine,
        stepper: type[Steps] = Steps,
        scheduler: type[Scheduler] = Scheduler,
        cache: type[KVCache] = KVCache,
        trace: bool = False,
    ) -> None:
        self.draw = draw = random.Random(seed)
        self.tokenizer = tokenizer
        self.trace = trace
        self.clock = 0.0
        self.slots = draw.choice((1, 2, 2, 3, 4, 6))
        self.max_waiting = draw.choice((4, 16, 30))
        self.model = WorldModel(self.slots, self)
        # Every other episode has little memory: for one or two of the longest requests, and a neighbour takes of it.
        self.tight = draw.random() < 0.5
        self.budget = Budget(draw.choice((CONTEXT, 2 * CONTEXT)) if self.tight else 2 * CONTEXT * self.slots)
        self.share = WorldShare(self.budget, 1, draw.choice((1, 8)))
        self.neighbour = Neighbour(self.budget, draw) if self.tight else None
        # Every other episode has a model with the same bits for positions that are prefilled and generated.
        self.exact = draw.random() < 0.5
        self.cache = cache(self.slots, self.share, exact=self.exact)
        self.scheduler = scheduler(self.cache, draw.choice((CHUNK, CHUNK, 24)))
        with mock.patch.object(engines, "Steps", stepper):
            self.engine = engine(
                self.model,  # type: ignore[arg-type]
                tokenizer,
                self.scheduler,
                max_waiting=self.max_waiting,
                send_timeout=SEND_TIMEOUT,
                clock=lambda: self.clock,
            )
        self.posted: deque[tuple[float, Any, tuple[Any, ...]]] = deque()
        self.lag = draw.choice((0, 0, 0, 1, 3))
        self.stepper = self.engine.steps
        self.stepper.post = lambda call, *arguments: self.posted.append((self.clock + self.lag, call, arguments))
        # Steps between arrivals, from a trickle to more than can be served.
        self.gap = draw.choice((4, 12, 12, 25)) * (6 / (2 + self.slots))
        self.faults = draw.random() < 0.5
        self.next_arrival = 0.0
        self.steps = 0
        self.turns = 0
        self.visits: list[Visit] = []
        self.ended: list[Visit] = []
        self.by_generation: dict[Generation, Visit] = {}
        self.poisoned: set[Candidate] = set()
        # Of what waits: its number in the order of arrival, and the turn by which it must have a slot.
        self.arrived: dict[Candidate, tuple[int, int]] = {}
        self.arrivals = 0
        # The turn of the last admission, or in which none was due; and by slot its holder, how far, and since when.
        self.admitted = (0, 0)
        self.progress: dict[int, tuple[Candidate, int, int]] = {}
        self.last_admitted: dict[str, int] = {}
        self.started: weakref.WeakSet[Any] = weakref.WeakSet()
        self.stopped = False
        self.outcomes: dict[str, int] = {}
        add = self.scheduler.add
        self.scheduler.add = lambda sequences: (self._note_arrival(sequences), add(sequences))  # type: ignore[method-assign]

    # --- running ---

    def run(self, steps: int) -> None:
        """So many steps of the engine, then no new callers, until all is over; or its stop, or death, in the middle."""
        while self.steps < steps:
            self.turn(arrivals=True)
        fate = self.draw.random()
        if fate < 0.2:
            self._die()
        elif fate < 0.5:
            self.stopped = True
            self.engine.request_stop()
            self._arrive()  # before the engine has heard of it
        limit = self.turns + self._work_ahead() * 4 + 400 + NEIGHBOUR_HOLDS * len(self.stepper.sequences)
        while self.visits:
            self.turn(arrivals=self.stopped and self.draw.random() < 0.2)
            check(self.turns < limit, "requests never end", len(self.visits))
        self.turn(arrivals=False)
        self._check_nothing_kept()

    def _die(self) -> None:
        """The model goes, and takes the engine along; not before it has failed on some requests."""
        self.model.gone = True
        limit = self.turns + 1000
        while not self.stopped:
            try:
                self.turn(arrivals=True)
            except EngineDiedError:
                self.count("died")
                self.stopped = True
                self.engine.request_stop()
            check(self.turns < limit, "serves on with a model that is gone")
            check(self.outcomes.get("UnavailableError", 0) < 3 or self.stopped, "fails on and on")

    def turn(self, *, arrivals: bool) -> None:
        """One turn of everyone: callers come, the engine steps, pieces arrive, are read, and callers leave."""
        self.clock += 1
        while arrivals and self.next_arrival <= self.clock:
            self.next_arrival += self.draw.expovariate(1 / self.gap)
            self._arrive()
        self.turns += 1
        if self.neighbour is not None:
            self.neighbour.turn(self.clock)
        advanced = self.stepper.turn()
        self.steps += advanced
        self._deliver(until=self.clock)
        self._check()
        for visit in self.visits.copy():
            generation = visit.generation
            if generation.ready and self.clock % visit.reads_every == 0:
                self._read(visit)
            if visit.restless and not visit.outcome:
                self._leave_if_due(visit)
        if arrivals and not advanced and not self.posted and not self.scheduler.waiting:
            self.clock = max(self.clock, self.next_arrival // 1)  # nothing happens until then

    def _deliver(self, until: float) -> None:
        """Runs the event loop's calls up to that time."""
        while self.posted and self.posted[0][0] <= until:
            _, call, arguments = self.posted.popleft()
            call(*arguments)

    def _sequences(self, counts: Callable[[Request], bool]) -> int:
        """At most how many sequences there are of requests that count, running or waiting."""
        here = sum(len(visit.expected) for visit in self.visits if counts(visit.request))
        known = sum(counts(each.request) for each in self.stepper.sequences)
        return max(here, known) + self.stepper.commands.qsize()

    # --- callers ---

    def _arrive(self) -> None:
        made = random_request(self.draw)
        visit = Visit(made, expected(made, self.tokenizer), exact=self.exact)
        fate = self.draw.random()
        if fate < 0.08:
            visit.leaves_after = self.draw.randrange(8)
        elif fate < 0.25:
            visit.leaves_in = self.draw.choice(STATES)
        elif fate < 0.3:
            visit.deadline = self.clock + self.draw.randrange(80)
        elif fate < 0.33:
            visit.reads_every = self.draw.choice((8, 40))
        elif self.faults and fate < 0.4:
            visit.curse, visit.poisoned = self.draw.randrange(12), self.draw.random() < 0.5
        visit.texts = [""] * len(visit.expected)
        visit.finishes = [None] * len(visit.expected)
        try:
            visit.generation = self.engine.submit(made)
        except OverloadedError:
            mine = self._sequences(lambda request: request.identity == made.identity)
            every = self._sequences(lambda request: True)
            check(mine + every >= self.max_waiting, "refused although there was room", (mine, every))
            self.count("refused")
            return
        except UnavailableError:
            check(self.stopped, "refused although it was not stopped")
            self.count("refused")
            return
        self._say(visit, f"arrives: {made}")
        visit.iterator = aiter(visit.generation)
        self.by_generation[visit.generation] = visit
        self.started.add(visit.generation)
        self.visits.append(visit)

    def _read(self, visit: Visit) -> None:
        generation = visit.generation
        while generation.ready:
            if visit.pieces == visit.leaves_after:
                return
            try:
                visit.iterator.__anext__().send(None)
            except StopIteration as piece:
                visit.take(piece.value)
            except StopAsyncIteration:
                self._end(visit, "finished")
                return
            except Exception as error:
                visit.error = error
                self._end(visit, type(error).__name__)
                return

    def _leave_if_due(self, visit: Visit) -> None:
        if visit.pieces == visit.leaves_after:
            self._end(visit, "left after pieces")
        elif self.clock >= visit.deadline:
            self._end(visit, "deadline")
        elif visit.leaves_in is not None and self._state(visit) == visit.leaves_in:
            self._end(visit, f"left {visit.leaves_in}")

    def _state(self, visit: Visit) -> str:
        """Where the engine has got with a request."""
        members = {member for member in self.stepper.sequences if member.generation is visit.generation}
        if not members:
            return "finishing"
        slots = [each for each in members if each.slot is not None]
        if not slots:
            return "queued"
        if not all(each.decoding for each in slots):
            return "prompting"
        return "held back" if any(each.transcript.held_back for each in slots) else "decoding"

    def _end(self, visit: Visit, outcome: str) -> None:
        """A caller's end, as the servicer has it: the iterator is closed, then the generation left."""
        visit.outcome = outcome
        self._say(visit, outcome)
        self.count(outcome)
        with suppress(StopIteration):
            visit.iterator.aclose().send(None)
        visit.generation.__exit__(None, None, None)
        self.visits.remove(visit)
        self.ended.append(visit)
        if outcome == "finished":
            if visit.scores_reused:
                self.count("scores from the cache")
            found = list(zip(visit.texts, visit.finishes, strict=True))
            expected = [each[:2] for each in visit.expected]
            check(found == expected, "the answer is another one", found, expected)
        elif outcome == EngineFaultError.__name__:
            check(visit.excused, "failed by another's fault", visit.request)
        elif outcome == UnavailableError.__name__:
            check(self.stopped or self.model.gone, "unavailable although it was not stopped")
        elif outcome == SlowReaderError.__name__:
            check(visit.reads_every > SEND_TIMEOUT, "given up although it reads", visit.reads_every)
        else:
            check(visit.error is None, "an unexpected error", visit.error)

    # --- faults ---

    def before_step(self, holders: Sequence[Candidate], rows: Sequence[Sequence[int]]) -> None:
        """The fault of this call: none, that of a cursed request in it, or a random one."""
        self.poisoned.clear()
        if not self.faults:
            return
        met = [holder for holder, row in zip(holders, rows, strict=True) if row]
        for sequence in met:
            visit = self.by_generation[sequence.generation]
            if visit.curse is not None and sequence.candidate == 0 and sequence.generated >= visit.curse:
                visit.excused = True
                if not visit.poisoned:
                    raise RuntimeError("the model fails on this one")
                self.poisoned.add(sequence)
        if self.draw.random() < 0.001:
            if len(met) == 1:
                self.by_generation[met[0].generation].excused = True
            raise RuntimeError("the model fails for once")

    # --- invariants ---

    def check_memory(self, lengths: Sequence[int]) -> None:
        """The positions in all slots, and the neighbour's, fit the memory."""
        here = sum(map(self.share.rounded, lengths))
        there = self.neighbour.held if self.neighbour else 0
        check(here + there <= self.budget.total, "more memory than there is", here, there)

    def _note_arrival(self, sequences: Sequence[Candidate]) -> None:
        bound = self.turns + len(IDENTITIES) * self._work_ahead() + 64
        if self.tight:  # each that is ahead may have to wait for the neighbour
            bound += NEIGHBOUR_HOLDS * (len(self.stepper.sequences) + len(sequences)) * len(IDENTITIES)
        for sequence in sequences:
            self.arrivals += 1
            bound += _work(sequence)
            self.arrived[sequence] = (self.arrivals, bound)

    def _work_ahead(self) -> int:
        """Most steps that all that is in the engine can take."""
        return sum(map(_work, self.stepper.sequences))

    def _check(self) -> None:
        holders, cache = self.scheduler.holders, self.cache
        live = self.stepper.sequences
        held = [each for each in live if each.slot is not None]
        check(len(holders) == cache.held == len(held), "held slots", len(holders), cache.held, len(held))
        check({each.slot for each in held} == set(range(cache.held)), "slots are not the first ones")
        check(self.slots - len({each.slot for each in held}) + cache.held == self.slots, "free + held is not all")
        check(self.scheduler.waiting == len(live) - len(held), "lost from the queue", self.scheduler.waiting)
        turn, admitted = self.turns, cache.reuse.prompt_tokens
        due = self.scheduler.waiting and len(holders) < self.slots and all(each.decoding for each in holders)
        due, self.share.refused = due and not self.share.refused, False
        if admitted != self.admitted[0] or not due:
            self.admitted = (admitted, turn)
        check(turn <= self.admitted[1] + 2, "a slot is free, and somebody waits")
        for slot, holder in enumerate(holders):
            check(holder.slot == slot and not holder.finished, "a slot's holder", slot)
            if self.progress.get(slot, ())[:2] != (holder, holder.computed):
                self.progress[slot] = (holder, holder.computed, turn)
            patience = 2 + self.slots if holder.decoding else PROMPT_PATIENCE
            check(turn <= self.progress[slot][2] + patience, "a sequence does not advance", slot)
            if holder in self.arrived:
                number, _ = self.arrived.pop(holder)
                check(number > self.last_admitted.get(holder.request.identity, 0), "overtaken by a later request")
                self.last_admitted[holder.request.identity] = number
        if self.steps % 16 == 0:
            self._check_waits()

    def _check_waits(self) -> None:
        """No caller waits longer than the work before it can take, times the number of callers who share."""
        for sequence, (_, bound) in list(self.arrived.items()):
            if sequence.finished:
                del self.arrived[sequence]
            else:
                check(self.turns <= bound, "starved", sequence.request.identity, self.turns - bound)

    def _check_nothing_kept(self) -> None:
        self._deliver(until=float("inf"))
        self.stepper.turn()
        check(not self.posted, "something is sent after the end")
        stats = self.engine.stats
        check(stats.running == stats.waiting == self.cache.held == 0, "something is still held", stats)
        check(not self.stepper.sequences and not self.engine.requests, "the engine keeps something")
        while self.ended:
            self.ended.pop().check_end()
        self.by_generation.clear()
        self.progress.clear()
        self.arrived.clear()
        self.poisoned.clear()
        gc.collect()
        check(not self.started, "generations are kept", len(self.started))

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1

    def _say(self, visit: Visit, what: str) -> None:
        if self.trace:
            print(f"turn {self.turns}: {id(visit) & 0xFFFFFF:06x} {what}")


def _work(sequence: Candidate) -> int:
    """Most steps that a sequence takes: its chunks, each beside a decode step, its tokens, and its start."""
    return 2 * (sequence.prompt_length // (CHUNK // 2) + 2) + sequence.request.max_tokens
