"""The engine through many steps of random callers and faults; and that the simulation notices what is wrong."""

from __future__ import annotations

import os
import random
from dataclasses import replace

import pytest

from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.engine.scores import Wanted
from service.engine.step import DecodeBatch
from service.engine.steps import Steps
from service.errors import EngineDiedError
from service.text.transcript import Piece, StopMatcher, Transcript
from tests.simulation.callers import STATES, Violation
from tests.simulation.episodes import episode, simulate


@pytest.mark.parametrize(
    ("steps", "seed"),
    [
        # Of few steps not every seed has all ends; this one does.
        (40_000, 1),
        pytest.param(1_000_000, None, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_many_steps(steps, seed):
    """For all callers' actions and all faults, every caller gets its answer once, and nothing leaks."""
    seed = int(os.environ.get("SIMULATION_SEED", seed or random.SystemRandom().randrange(10**6)))
    print(f"python -m tests.simulation --seed {seed} --steps {steps}")
    totals = simulate(seed, steps)
    print(totals)
    assert totals["steps"] >= steps
    ends = {"finished", "refused", "deadline", "EngineFaultError", "UnavailableError", "SlowReaderError", "died"}
    reuse = {"cached tokens", "generated positions reused", "scores from the cache"}
    assert ends | {f"left {state}" for state in STATES} | {"left after pieces"} | reuse <= totals.keys()


def test_an_episode_is_decided_by_its_seed(letters):
    """The same seed gives the same world: what failed can be seen again."""
    first, again, other = (episode(seed, letters, 500) for seed in (3, 3, 4))
    assert (first.outcomes, first.model.computed, first.clock) == (again.outcomes, again.model.computed, again.clock)
    assert first.outcomes != other.outcomes


def episodes(letters, **parts):
    """A few short ones."""
    for seed in range(40):
        episode(seed, letters, 1000, **parts)


class KeepsSlots(Scheduler):
    """Forgets to give a slot back."""

    def remove(self, sequence):
        if sequence.slot is None or sequence.generated % 7:
            return super().remove(sequence)
        sequence.finished = True
        return ()


class KeepsPrompting(Scheduler):
    """Goes on with the prompt of a caller who has left."""

    def remove(self, sequence):
        caller = self._callers.get(sequence.request.identity)
        left = caller is not None and caller.prompting is sequence
        copies = super().remove(sequence)
        if left:
            self._callers[sequence.request.identity] = caller
            caller.prompting = sequence
        return copies


class KeepsQueued(Scheduler):
    """Leaves those in the queue who have gone."""

    def remove(self, sequence):
        if sequence.slot is None:
            sequence.finished = True
            return ()
        return super().remove(sequence)


class LastFirst(Scheduler):
    """Serves of each caller what came last."""

    def schedule(self, now=0.0):
        for caller in self._callers.values():
            caller.waiting.reverse()
        step = super().schedule(now)
        for caller in self._callers.values():
            caller.waiting.reverse()
        return step


class DecodesForever(Scheduler):
    """Admits no request while any is running."""

    def schedule(self, now=0.0):
        self._decode_next = True
        return super().schedule(now)


class SkipsARow(Scheduler):
    """Never advances the second slot beside the first."""

    def schedule(self, now=0.0):
        step = super().schedule(now)
        if not isinstance(step, DecodeBatch) or step.rows[0] is None or not any(step.rows[1:]):
            return step
        return DecodeBatch((step.rows[0], None, *step.rows[2:]))


class IgnoresIdentity(KVCache):
    """Reuses what others have asked."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        for slot in self._slots:
            slot.identity = identity
        return super().allocate(tokens, identity, recompute, positions, wanted)


class ReusesTooMuch(KVCache):
    """Takes one position more for common than is."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        allocation = super().allocate(tokens, identity, recompute, positions, wanted)
        more = allocation is not None and 0 < allocation.cached < len(tokens) - recompute
        return replace(allocation, cached=allocation.cached + 1) if more else allocation


class ReusesTheLastToken(KVCache):
    """Takes the token that was chosen last for computed."""

    def record(self, slot, valid):
        super().record(slot, min(valid + 1, len(self._slots[slot].tokens)))


class ReusesGenerated(KVCache):
    """Takes what was generated for exact whatever the model."""

    def __init__(self, slots, share, *, exact):
        super().__init__(slots, share, exact=True)


class ScoresOfTheNext(KVCache):
    """Keeps the scores of tokens with those before them."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        allocation = super().allocate(tokens, identity, recompute, positions, wanted)
        if allocation is not None and allocation.scores:
            allocation.scores[:] = [*allocation.scores[1:], allocation.scores[-1]]
        return allocation


class MovesWithoutCopy(KVCache):
    """Fills a hole among the slots without their contents."""

    def release(self, slot, last_length):
        super().release(slot, last_length)
        return ()


class CopiesTooLittle(KVCache):
    """Loses the last position of what it moves."""

    def release(self, slot, last_length):
        return super().release(slot, last_length - 1)


class EvictsNothing(KVCache):
    """Keeps all prefixes, whoever needs their memory."""

    def _give_up(self, positions, but=-1):
        return [], positions


class GivesNothingBack(KVCache):
    """Keeps the memory of what ended sequences have generated."""

    def release(self, slot, last_length):
        return tuple(copy for copy in super().release(slot, last_length) if copy.source != copy.target)


class Overtakes(Scheduler):
    """Admits whoever fits beside a sequence that does not fit yet."""

    def schedule(self, now=0.0):
        self._blocked = None
        return super().schedule(now)


class SaysNothingOfFaults(Steps):
    """Ends a request that fails without a word."""

    def fail(self, generation, error):
        self.end(generation)


class SaysItTwice(Steps):
    """Sends a request's last piece again."""

    def send(self, sequence, delta):
        super().send(sequence, delta)
        if delta is not None and delta.finish_reason is not None:
            self._outbox.append(lambda: sequence.generation.deliver(delta))


class FailsTheBatch(Steps):
    """Ends all that was in a step that failed."""

    def advance(self, step):
        rows = step.rows if isinstance(step, DecodeBatch) else (step.sequence,)
        failed = self._failed_steps
        super().advance(step)
        if self._failed_steps > failed:
            for row in rows:
                if row is not None:
                    self.fail(row.generation, RuntimeError("a neighbour failed"))


class ServesOn(Steps):
    """Takes a model that fails on everything for requests that are at fault."""

    def error_for(self, sequence):
        self._failures = 0
        return super().error_for(sequence)


class DiesOfOne(Steps):
    """Takes a request that the model fails on for a model that is gone."""

    def error_for(self, sequence):
        raise EngineDiedError("a request failed")


class BeginsAfterTheEnd(Steps):
    """Takes in requests after its stop."""

    def begin(self, request, generation):
        stopping, self._stopping = self._stopping, False
        super().begin(request, generation)
        self._stopping = stopping


class TakesNothingBack(Engine):
    """Does not hear that a caller leaves."""

    def _abort(self, generation):
        pass


class KeepsRequests(Engine):
    """Keeps a reference to every request."""

    def submit(self, request):
        generation = super().submit(request)
        self.seen = [*getattr(self, "seen", []), generation]
        return generation


@pytest.mark.parametrize(
    "mutant",
    [
        *(KeepsSlots, KeepsPrompting, KeepsQueued, LastFirst, DecodesForever, SkipsARow),
        *(IgnoresIdentity, ReusesTooMuch, ReusesTheLastToken, ReusesGenerated, MovesWithoutCopy, CopiesTooLittle),
        ScoresOfTheNext,
        *(EvictsNothing, GivesNothingBack, Overtakes),
        *(
            SaysNothingOfFaults,
            SaysItTwice,
            FailsTheBatch,
            ServesOn,
            DiesOfOne,
            BeginsAfterTheEnd,
            TakesNothingBack,
            KeepsRequests,
        ),
    ],
)
def test_a_fault_of_ours_is_found(letters, mutant):
    """Each of these small mistakes breaks an invariant within a few episodes."""
    part = next(name for name, base in PARTS.items() if issubclass(mutant, base))
    with pytest.raises(Violation, match=r"python -m tests\.simulation --episode \d+ --steps 1000") as found:
        episodes(letters, **{part: mutant})
    assert isinstance(found.value.__cause__, AssertionError | EngineDiedError)  # and no mistake of this file


PARTS = {"engine": Engine, "stepper": Steps, "scheduler": Scheduler, "cache": KVCache}


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (StopMatcher, "held", lambda self, text: 0),
        (StopMatcher, "find", lambda self, text: None),
        (Transcript, "finish", lambda self: Piece("", ())),
        (Wanted, "scored", lambda self, kept, length: length),
        (Wanted, "scored", lambda self, kept, length: replace(self, count=0)._scored(kept, length)),
    ],
)
def test_a_fault_of_texts_and_scores_is_found(letters, monkeypatch, owner, name, mistake):
    """Stop texts that leak, text that is lost at the end, and kept scores that are not there, or say too little."""
    monkeypatch.setattr(Wanted, "_scored", Wanted.scored, raising=False)
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(Violation):
        episodes(letters)
