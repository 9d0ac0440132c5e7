"""The engine through many steps of random callers and faults; and that the simulation notices what is wrong."""

from __future__ import annotations

import os
import random

import pytest

from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.errors import EngineDiedError
from service.text.transcript import Piece, StopMatcher, Transcript
from tests.simulation.callers import STATES, Violation
from tests.simulation.episodes import episode, simulate


@pytest.mark.parametrize(
    ("steps", "seed"),
    [
        # Of few steps not every seed has all ends; this one does.
        (200_000, 11),
        pytest.param(1_000_000, None, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
    ],
)
def test_many_steps(steps, seed):
    """Whatever callers do and whatever fails: everyone gets what is theirs, once, and nothing is left behind."""
    seed = int(os.environ.get("SIMULATION_SEED", seed or random.SystemRandom().randrange(10**6)))
    print(f"python -m tests.simulation --seed {seed} --steps {steps}")
    totals = simulate(seed, steps)
    print(totals)
    assert totals["steps"] >= steps
    ends = {"finished", "refused", "deadline", "EngineFaultError", "UnavailableError", "SlowReaderError", "died"}
    assert ends | {f"left {state}" for state in STATES} | {"left after pieces", "cached tokens"} <= totals.keys()


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
        prompting = self._prompting
        copies = super().remove(sequence)
        self._prompting = prompting
        return copies


class KeepsQueued(Scheduler):
    """Leaves those in the queue who have gone."""

    def remove(self, sequence):
        if sequence.slot is None:
            sequence.finished = True
            return ()
        return super().remove(sequence)


class LastFirst(Scheduler):
    """Serves who came last."""

    def _next_chunk(self, decoding):
        if self._prompting is None:
            self._waiting.reverse()
        chunk = super()._next_chunk(decoding)
        if chunk is None or chunk.sequence.computed == chunk.start == 0:
            self._waiting.reverse()
        return chunk


class DecodesForever(Scheduler):
    """Takes in nobody while anybody is served."""

    def _next_chunk(self, decoding):
        return None if decoding else super()._next_chunk(decoding)


class SkipsARow(Scheduler):
    """Never advances the second slot beside the first."""

    def _decode_batch(self):
        batch = super()._decode_batch()
        return type(batch)((batch.rows[0], None, *batch.rows[2:])) if batch.rows[0] and batch.rows[1:] else batch


class IgnoresIdentity(KVCache):
    """Reuses what others have asked."""

    def _longest_match(self, prompt, identity, limit):
        best = (-1, 0)
        for other in {slot.identity for slot in self._slots}:
            best = max(best, super()._longest_match(prompt, other, limit), key=lambda match: match[1])
        return best


class ReusesTooMuch(KVCache):
    """Takes one position more for common than is."""

    def _longest_match(self, prompt, identity, limit):
        source, length = super()._longest_match(prompt, identity, limit)
        kept = self._slots[source].valid if source >= 0 else 0
        return source, min(length + 1, limit, kept) if source >= 0 else length


class MovesWithoutCopy(KVCache):
    """Fills a hole among the slots without their contents."""

    def release(self, slot, last_length):
        super().release(slot, last_length)
        return ()


class CopiesTooLittle(KVCache):
    """Loses the last position of what it moves."""

    def release(self, slot, last_length):
        return super().release(slot, last_length - 1)


class SaysNothingOfFaults(Engine):
    """Ends a request that fails without a word."""

    def _fail(self, generation, error):
        self._end_request(generation)


class SaysItTwice(Engine):
    """Sends a request's last piece again."""

    def _send(self, sequence, delta):
        super()._send(sequence, delta)
        if delta is not None and delta.finish_reason is not None:
            self._outbox.append(lambda: sequence.generation.deliver(delta))


class FailsTheBatch(Engine):
    """Ends all that was in a step that failed."""

    def _advance(self, step):
        rows = step.rows if hasattr(step, "rows") else (step.sequence,)
        failed = self.faults.failed_steps
        super()._advance(step)
        if self.faults.failed_steps > failed:
            for row in rows:
                if row is not None:
                    self._fail(row.generation, RuntimeError("a neighbour failed"))


class ServesOn(Engine):
    """Takes a model that fails on everything for requests that are at fault."""

    def _blame(self, sequence):
        self._failures = 0
        return super()._blame(sequence)


class DiesOfOne(Engine):
    """Takes a request that the model fails on for a model that is gone."""

    def _blame(self, sequence):
        raise EngineDiedError("a request failed")


class TakesNothingBack(Engine):
    """Does not hear that a caller leaves."""

    def _abort(self, generation):
        pass


class BeginsAfterTheEnd(Engine):
    """Takes in requests after its stop."""

    def _begin_request(self, request, generation):
        stopping, self._stopping = self._stopping, False
        super()._begin_request(request, generation)
        self._stopping = stopping


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
        *(IgnoresIdentity, ReusesTooMuch, MovesWithoutCopy, CopiesTooLittle),
        *(
            SaysNothingOfFaults,
            SaysItTwice,
            FailsTheBatch,
            ServesOn,
            DiesOfOne,
            TakesNothingBack,
            BeginsAfterTheEnd,
            KeepsRequests,
        ),
    ],
)
def test_a_fault_of_ours_is_found(letters, mutant):
    """Each of these small mistakes breaks an invariant within a few episodes."""
    part = next(name for name, base in PARTS.items() if issubclass(mutant, base))
    with pytest.raises(Violation, match=r"python -m tests\.simulation --episode \d+ --steps 1000"):
        episodes(letters, **{part: mutant})


PARTS = {"engine": Engine, "scheduler": Scheduler, "cache": KVCache}


@pytest.mark.parametrize(
    ("owner", "name", "mistake"),
    [
        (StopMatcher, "held", lambda self, text: 0),
        (StopMatcher, "find", lambda self, text: None),
        (Transcript, "finish", lambda self: Piece("", ())),
    ],
)
def test_a_fault_of_the_text_is_found(letters, monkeypatch, owner, name, mistake):
    """Stop texts that leak, and text that is lost at the end."""
    monkeypatch.setattr(owner, name, mistake)
    with pytest.raises(Violation):
        episodes(letters)
