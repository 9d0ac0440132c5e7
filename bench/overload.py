"""How our service bears more than it can do: goodput and latency against the offered load, through REST and Envoy."""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import peers
from bench.client import Job, RefusedError, Stream, Timing, percentile, timed
from bench.drive import closed_loop, together
from bench.loads import Plan, jobs, warm_up
from bench.peers import Setup
from bench.processes import memory
from bench.report import headless_pyplot, machine

SLOTS = 16
PROMPT_TOKENS = 64
NEW_TOKENS = 32
# The wait that the service may allow, and the time to the first token that an answer must keep to count.
QUEUE_SECONDS = 4.0
OBJECTIVE_SECONDS = 2 * QUEUE_SECONDS
LOADS = (0.5, 0.8, 1.0, 1.5, 2.0, 3.0)
# Arrivals last so long, and answers count that end after the first part of it: then the queue is as full as it gets.
ARRIVAL_SECONDS = 22.0
SETTLE_SECONDS = 7.0


@dataclass(frozen=True)
class Point:
    """One offered load, `load` times the sustainable one; rates in requests per second, times in seconds.

    `goodput` counts answers whose first token came within OBJECTIVE_SECONDS. `first_p50`, `first_p95` and
    `whole_p95` are of all that was admitted, `refusal_p95` of what was not. `resident` are bytes of the service.
    """

    load: float
    offered: float
    goodput: float
    refused: float
    first_p50: float
    first_p95: float
    whole_p95: float
    refusal_p95: float
    resident: int


def run(setup: Setup, plan: Plan, out: Path) -> None:
    """Finds the sustainable rate, offers LOADS times as much, prints the points and saves them and a plot."""
    setup = replace(setup, slots=SLOTS, queue_seconds=QUEUE_SECONDS)
    with peers.rest_through_envoy(setup) as served:
        points = asyncio.run(_measure(served.stream, plan, served.processes["service"]))
    _print(points)
    _save(points, out)


async def _measure(stream: Stream, plan: Plan, pid: int) -> list[Point]:
    await warm_up(stream, plan)
    work = jobs(plan, "sustainable", 4 * SLOTS, PROMPT_TOKENS, NEW_TOKENS)
    seconds, _ = await closed_loop(stream, work, SLOTS)
    sustainable = len(work) / seconds
    print(f"sustainable: {sustainable:.2f} requests/s", file=sys.stderr, flush=True)
    points = []
    for load in LOADS:
        print(f"offered: {load} times as much", file=sys.stderr, flush=True)
        points.append(await _offer(stream, plan, load, sustainable * load, pid))
    return points


async def _offer(stream: Stream, plan: Plan, load: float, rate: float, pid: int) -> Point:
    """Requests arrive at random moments for ARRIVAL_SECONDS, and nobody who is refused comes again."""
    pick = random.Random(f"{plan.seed} overload {load}")
    moments = [pick.expovariate(rate)]
    while moments[-1] < ARRIVAL_SECONDS:
        moments.append(moments[-1] + pick.expovariate(rate))
    work = jobs(plan, f"overload {load}", len(moments), PROMPT_TOKENS, NEW_TOKENS)
    began = time.perf_counter()
    async with asyncio.timeout(plan.limit):
        results = await together(_arrive(stream, at, job) for at, job in zip(moments, work, strict=True))
    answers = [each for each in results if isinstance(each, Timing)]
    refusals = [each for each in results if isinstance(each, float)]
    return summed_up(load, rate, answers, refusals, began=began, resident=memory(pid))


async def _arrive(stream: Stream, at: float, job: Job) -> Timing | float:
    """One request: its timing, or the seconds that its refusal took."""
    await asyncio.sleep(at)
    sent = time.perf_counter()
    try:
        return await timed(stream, job)
    except RefusedError:
        return time.perf_counter() - sent


def summed_up(
    load: float, offered: float, answers: Sequence[Timing], refusals: Sequence[float], *, began: float, resident: int
) -> Point:
    """The point that these answers make; rates are over the time from SETTLE_SECONDS to ARRIVAL_SECONDS."""
    low, high = began + SETTLE_SECONDS, began + ARRIVAL_SECONDS
    good = sum(low <= each.at[-1] < high and each.first <= OBJECTIVE_SECONDS for each in answers)
    firsts = [each.first for each in answers]
    return Point(
        load=load,
        offered=offered,
        goodput=good / (high - low),
        refused=len(refusals) / (len(answers) + len(refusals)),
        first_p50=percentile(firsts, 50),
        first_p95=percentile(firsts, 95),
        whole_p95=percentile([each.at[-1] - each.began for each in answers], 95),
        refusal_p95=percentile(refusals, 95) if refusals else 0.0,
        resident=resident,
    )


def _print(points: Sequence[Point]) -> None:
    best = max(point.goodput for point in points)
    heads = ("load", "offered/s", "goodput/s", "of the best", "refused", "first p50, s", "p95, s", "whole p95, s")
    print("".join(f"{head:>16}" for head in (*heads, "refusal p95, ms", "resident, MiB")))
    for each in points:
        shares = f"{each.goodput / best:16.0%}{each.refused:16.0%}"
        times = f"{each.first_p50:16.2f}{each.first_p95:16.2f}{each.whole_p95:16.2f}{1000 * each.refusal_p95:16.1f}"
        print(f"{each.load:16.1f}{each.offered:16.2f}{each.goodput:16.2f}{shares}{times}{each.resident >> 20:16}")


def _save(points: Sequence[Point], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = time.strftime("overload-%Y%m%d-%H%M%S", time.gmtime())
    raw, plot = out / f"{name}.json", out / f"{name}.png"
    raw.write_text(json.dumps({"machine": machine(), "measured": [asdict(point) for point in points]}) + "\n")
    figure, (rates, times) = headless_pyplot().subplots(1, 2, figsize=(10, 4))
    loads = [point.load for point in points]
    rates.plot(loads, [point.goodput for point in points], marker="o", label="goodput")
    rates.plot(loads, [point.offered for point in points], linestyle=":", color="gray", label="offered")
    rates.set(xlabel="offered load, times the sustainable one", ylabel="requests/s", ylim=(0, None))
    rates.legend()
    times.plot(loads, [point.first_p50 for point in points], marker="o", label="first token, p50")
    times.plot(loads, [point.first_p95 for point in points], marker="s", label="first token, p95")
    times.axhline(OBJECTIVE_SECONDS, linestyle=":", color="gray", label="objective")
    times.set(xlabel="offered load, times the sustainable one", ylabel="seconds, of what was admitted", ylim=(0, None))
    times.legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=120)
    print(f"\nraw measurements: {raw}\nplot: {plot}")
