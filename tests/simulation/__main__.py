"""A world for the engine that one seed decides: its callers, its clock, its model and what goes wrong.

    python -m tests.simulation --seed 7 --steps 1000000    all of it, episode by episode
    python -m tests.simulation --episode 7003              the one that failed, with what its callers did

The engine, its scheduler, cache, committer and generations are the real ones, and are driven without a thread: a turn
of the engine, then what it sent, as late as the episode's event loop is. After every turn the world is checked.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.simulation.episodes import EPISODE, episode, letters, simulate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--steps", type=int, help=f"in all (1000000), or of the one episode ({EPISODE})")
    parser.add_argument("--episode", type=int, help="run only this one, and print the actions of its callers")
    options = parser.parse_args()
    if options.episode is not None:
        print(episode(options.episode, letters(), options.steps or EPISODE, trace=True).outcomes)
        return
    print(f"seed {options.seed}", flush=True)
    began = time.perf_counter()
    print(simulate(options.seed, options.steps or 1_000_000))
    print(f"{time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
