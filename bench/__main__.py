"""`python -m bench`: drives REST, gRPC and the bare engine with the same client, and prints medians and paired ratios.

Each round starts every door alone, one after the other, so that a ratio compares runs that are minutes apart on the
same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from bench import load, peers
from bench.load import Job, Result, Stream
from deploy import local
from service import manifest

Peer = Callable[[], AbstractContextManager[Stream]]

PRODUCT = "REST through Envoy"


def main() -> None:
    options = _parser().parse_args()
    model_dir = local.model_dir()
    vocabulary = manifest.load(model_dir).vocab_size
    chosen = _peers(model_dir, options)
    figures: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(options.rounds):
        for name, peer in chosen.items():
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            with peer() as stream:
                for measure, value in asyncio.run(_measure(stream, vocabulary, options)).items():
                    figures[measure, name].append(value)
    _report(figures, list(chosen))


def _peers(model_dir: Path, options: argparse.Namespace) -> dict[str, Peer]:
    return {
        PRODUCT: partial(peers.rest_through_envoy, model_dir, options.threads),
        "gRPC direct": partial(peers.grpc_direct, model_dir, options.threads),
        "bare engine": partial(peers.bare_engine, model_dir, options.threads),
    }


async def _measure(stream: Stream, vocabulary: int, options: argparse.Namespace) -> dict[str, float]:
    """One peer's figures: higher is better for all of them (times as their inverse)."""
    await load.timed(stream, Job((5, 6, 7, 8), 4))
    found = {}
    long = load.jobs(2, vocabulary, prompt_tokens=512, new_tokens=1)
    first: Result = await load.closed_loop(stream, long, 1)
    found["512-token prompts per second"] = 1 / first.first_seconds
    for concurrency in options.concurrency:
        work = load.jobs(max(2, concurrency), vocabulary)
        result = await load.closed_loop(stream, work, concurrency)
        found[f"tokens/s, {concurrency} at once"] = result.tokens_per_second
    return found


def _report(figures: dict[tuple[str, str], list[float]], names: list[str]) -> None:
    """Medians per peer, and the product's ratio to each other peer, pair by pair of one round."""
    for measure in dict.fromkeys(measure for measure, _ in figures):
        print(f"\n{measure}")
        ours = figures[measure, PRODUCT]
        for name in names:
            values = figures[measure, name]
            ratios = [a / b for a, b in zip(ours, values, strict=True)]
            spread = f"{min(ratios):.2f}..{max(ratios):.2f}"
            ratio = "" if name == PRODUCT else f"   ours / this: {statistics.median(ratios):.2f} ({spread})"
            print(f"  {name:24} {statistics.median(values):8.2f}{ratio}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="how often every peer is started (%(default)s)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 8, 16, 32], help="requests at once (%(default)s)"
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of every peer (%(default)s)"
    )
    return parser


if __name__ == "__main__":
    main()
