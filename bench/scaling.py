"""How our service grows by replicas: throughput, and the prefix cache's hits with and without affinity."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import loads, peers
from bench.drive import closed_loop
from bench.loads import Plan
from bench.peers import Served, Setup
from bench.report import machine

SLOTS = 16
REQUESTS = 32
PROMPT_TOKENS = 64
NEW_TOKENS = 32
RATE, HITS = "output rate", "sessions prefix-cache hit rate"


@dataclass(frozen=True)
class Point:
    """One figure of one round, for so many replicas that share the cores, with or without affinity."""

    round: int
    replicas: int
    affinity: bool
    figure: str
    value: float
    unit: str


def run(setup: Setup, plan: Plan, rounds: int, replicas: Sequence[int], out: Path) -> None:
    """Measures every number of replicas, several of them also with affinity; prints medians and ratios, saves all."""
    setup = replace(setup, slots=SLOTS)
    variants = [(count, affinity) for count in replicas for affinity in ((False, True) if count > 1 else (False,))]
    points = []
    for number in range(1, rounds + 1):
        for count, affinity in variants:
            print(f"round {number} of {rounds}: {title(count, affinity)}", file=sys.stderr, flush=True)
            with peers.replicas_through_envoy(setup, count, affinity) as served:
                figures = asyncio.run(_measure(served, plan))
            points += [Point(number, count, affinity, *figure) for figure in figures]
    _print(points, variants)
    _save(points, out)


async def _measure(served: Served, plan: Plan) -> list[tuple[str, float, str]]:
    """Throughput of SLOTS callers who never pause, each request a session of its own, and the load `sessions`."""
    await loads.warm_up(served.stream, plan)
    fresh = loads.jobs(plan, "scaling", REQUESTS, PROMPT_TOKENS, NEW_TOKENS)
    work = [replace(job, session=f"one-{number}") for number, job in enumerate(fresh)]
    async with asyncio.timeout(plan.limit):
        seconds, done = await closed_loop(served.stream, work, SLOTS)
    outcome = await loads.sessions(served.stream, plan)
    rate = sum(timing.tokens for timing in done) / seconds
    return [(RATE, rate, "tokens/s"), *((each.name, each.value, each.unit) for each in outcome.figures)]


def title(replicas: int, affinity: bool) -> str:
    return f"{replicas} {'replica' if replicas == 1 else 'replicas'}{', affinity' if affinity else ''}"


def ratios(points: Iterable[Point], figure: str, variant: tuple[int, bool], to: tuple[int, bool]) -> list[float]:
    """Of each round: this variant's figure by the other's."""
    values = {(each.round, each.replicas, each.affinity): each.value for each in points if each.figure == figure}
    rounds = sorted({number for number, *_ in values})
    return [values[number, *variant] / values[number, *to] for number in rounds]


def _print(points: Sequence[Point], variants: Sequence[tuple[int, bool]]) -> None:
    values: dict[tuple[str, int, bool], list[float]] = {}
    for each in points:
        values.setdefault((each.figure, each.replicas, each.affinity), []).append(each.value)
    for figure, unit in dict.fromkeys((each.figure, each.unit) for each in points):
        print(f"\n{figure}, {unit}: median, and the rounds' median ratio to {title(*variants[0])}")
        for variant in variants:
            ratio = statistics.median(ratios(points, figure, variant, variants[0]))
            print(f"{title(*variant):>24}{statistics.median(values[figure, *variant]):12.2f}{ratio:8.2f}")
    for count, affinity in variants:
        if affinity:
            gain = ratios(points, HITS, (count, True), (count, False))
            spread = f"({min(gain):.2f}..{max(gain):.2f})"
            print(f"\nwith affinity {count} replicas find {statistics.median(gain):.2f} times as much {spread}")


def _save(points: Sequence[Point], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    raw = out / time.strftime("scaling-%Y%m%d-%H%M%S.json", time.gmtime())
    raw.write_text(json.dumps({"machine": machine(), "measured": [asdict(point) for point in points]}) + "\n")
    print(f"\nraw measurements: {raw}")
