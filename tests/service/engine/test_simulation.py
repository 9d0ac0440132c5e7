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
from service.engine.steps import Steps
from service.errors import EngineDiedError
from service.text.transcript import Piece, StopMatcher, Transcript
from tests.simulation import mistakes
from tests.simulation.callers import STATES, Violation
from tests.simulation.episodes import episode, simulate


@pytest.mark.parametrize(
    ("steps", "seed"),
    [
        # Of few steps not every seed has all ends; this one does.
        (40_000, 3),
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


MISTAKES = [each for each in vars(mistakes).values() if getattr(each, "__module__", "") == mistakes.__name__]


@pytest.mark.parametrize("mutant", MISTAKES)
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
