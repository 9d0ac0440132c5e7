"""Runs of the simulated world: one that a seed decides, and many on all cores."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from service.text.tokenizer import Tokenizer
from tests.simulation.callers import Violation
from tests.simulation.world import World
from tests.support.fakes import letters_tokenizer

# Steps of an episode; each has another number of slots, pace and temper.
EPISODE = 5_000


def episode(seed: int, tokenizer: Tokenizer, steps: int = EPISODE, **parts: Any) -> World:
    """Runs one episode; a failure says how to repeat it."""
    logging.getLogger("service").setLevel(logging.CRITICAL + 1)  # faults are what this is about
    try:
        world = World(seed, tokenizer, **parts)
        world.run(steps)
    except Exception as error:
        again = f"python -m tests.simulation --episode {seed} --steps {steps}"
        raise Violation(f"{error!r}\nsee it again: {again}") from error
    finally:
        logging.getLogger("service").setLevel(logging.NOTSET)
    return world


def simulate(seed: int, steps: int) -> Counter[str]:
    """Episodes of `steps` steps in all, on all cores: how often what happened."""
    sizes = [min(EPISODE, steps - done) for done in range(0, steps, EPISODE)]
    seeds = [seed * 1000 + number for number in range(len(sizes))]
    totals = Counter(episodes=len(sizes))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for counts in pool.map(_counts, seeds, sizes, chunksize=8):
            totals.update(counts)
    return totals


def _counts(seed: int, steps: int) -> Counter[str]:
    world = episode(seed, letters(), steps)
    return Counter({**world.outcomes, "steps": world.steps, "cached tokens": world.cache.reuse.cached_tokens})


@cache
def letters() -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return letters_tokenizer(Path(folder))
