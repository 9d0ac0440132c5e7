"""A world for the engine that one seed decides: its callers, its clock, its model and what goes wrong.

    python -m tests.simulation --seed 7 --steps 1000000    all of it, episode by episode
    python -m tests.simulation --episode 7003              the one that failed, with what its callers did

The engine, its scheduler, cache, committer and generations are the real ones, and are driven without a thread: a turn
of the engine, then what it sent, as late as the episode's event loop is. After every turn the world is checked.
"""

from __future__ import annotations

import argparse
import logging
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from service.text.tokenizer import Tokenizer
from tests.fakes import letters_tokenizer
from tests.simulation.callers import Violation
from tests.simulation.world import World

# Steps of an episode; each has another number of slots, pace and temper.
EPISODE = 5_000


def episode(seed: int, tokenizer: Tokenizer, steps: int = EPISODE, **parts: Any) -> World:
    """Runs one episode; whatever does not hold is told with how to see it again."""
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


def simulate(seed: int, steps: int, tokenizer: Tokenizer) -> dict[str, int]:
    """Episodes until `steps` steps are done: how often what happened."""
    totals = {"steps": 0, "episodes": 0}
    while totals["steps"] < steps:
        world = episode(seed * 1000 + totals["episodes"], tokenizer, min(EPISODE, steps - totals["steps"]))
        totals["steps"] += world.steps
        totals["episodes"] += 1
        totals["cached tokens"] = totals.get("cached tokens", 0) + world.cache.reuse.cached_tokens
        for outcome, count in world.outcomes.items():
            totals[outcome] = totals.get(outcome, 0) + count
    return totals


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--steps", type=int, help=f"in all (1000000), or of the one episode ({EPISODE})")
    parser.add_argument("--episode", type=int, help="run this one alone, and print what its callers do")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = letters_tokenizer(Path(folder))
        if options.episode is not None:
            world = episode(options.episode, tokenizer, options.steps or EPISODE, trace=True)
            print(world.outcomes)
            return
        print(f"seed {options.seed}", flush=True)
        began = time.perf_counter()
        print(simulate(options.seed, options.steps or 1_000_000, tokenizer))
        print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
