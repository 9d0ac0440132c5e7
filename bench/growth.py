"""How our service grows: throughput and memory by concurrency, prompt length, and batch size of one request."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import peers
from bench.client import Job
from bench.drive import closed_loop
from bench.loads import Plan, jobs, warm_up
from bench.peers import Served, Setup
from bench.processes import memory
from bench.report import headless_pyplot, machine
from service import manifest

SLOTS = 64
SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPT_TOKENS = 128
NEW_TOKENS = 64
PROMPT_LENGTHS = (128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Point:
    """One measurement: what was grown to which `size`, and the figures there.

    `output_rate` is in generated tokens per second, prompts included in the time; `token_seconds` the time that all
    choices of a request took for one token each, from its first piece on. `resident` is the service's memory in bytes
    afterwards: it keeps what it once took.
    """

    curve: str
    size: int
    round: int
    output_rate: float
    first_seconds: float
    token_seconds: float
    resident: int


# A size, the requests to measure it by, and how many of them run at once.
Step = tuple[int, list[Job], int]


def run(setup: Setup, plan: Plan, rounds: int, chosen: Sequence[str], out: Path) -> None:
    """Measures the chosen of CURVES, each on a service started for it alone; prints medians, saves points and plot."""
    setup = replace(setup, slots=SLOTS)
    points = []
    for number in range(1, rounds + 1):
        for name in chosen:
            print(f"round {number} of {rounds}: {name}", file=sys.stderr, flush=True)
            steps = CURVES[name](setup, plan)
            with peers.grpc_direct(setup) as served:
                points += asyncio.run(_draw(served, plan, name, steps, number))
    medians = _medians(points)
    _print(medians)
    _save(points, medians, out)


async def _draw(served: Served, plan: Plan, curve: str, steps: list[Step], number: int) -> list[Point]:
    await warm_up(served.stream, plan)
    points = []
    for size, work, concurrency in steps:
        async with asyncio.timeout(plan.limit):
            seconds, timings = await closed_loop(served.stream, work, concurrency)
        points.append(
            Point(
                curve=curve,
                size=size,
                round=number,
                output_rate=sum(timing.tokens for timing in timings) / seconds,
                first_seconds=statistics.median(timing.first for timing in timings),
                token_seconds=statistics.median(timing.at[-1] - timing.at[0] for timing in timings) / (NEW_TOKENS - 1),
                resident=memory(served.processes["service"], "VmRSS"),
            )
        )
    return points


def _concurrency(_: Setup, plan: Plan) -> list[Step]:
    return [(size, _apart(plan, size, PROMPT_TOKENS), size) for size in SIZES]


def _prompt_length(setup: Setup, plan: Plan) -> list[Step]:
    longest = manifest.load(setup.model_dir).context_length - NEW_TOKENS
    lengths = [length for length in PROMPT_LENGTHS if length < longest]
    return [(length, _apart(plan, 1, length), 1) for length in (*lengths, longest)]


def _prompts(_: Setup, plan: Plan) -> list[Step]:
    return [(size, [_together(plan, size)], 1) for size in SIZES]


def _choices(_: Setup, plan: Plan) -> list[Step]:
    singles = jobs(plan, "growth choices", len(SIZES), PROMPT_TOKENS, NEW_TOKENS)
    return [(size, [replace(single, n=size)], 1) for size, single in zip(SIZES, singles, strict=True)]


CURVES = {"concurrency": _concurrency, "prompt-length": _prompt_length, "prompts": _prompts, "choices": _choices}


def _apart(plan: Plan, count: int, prompt_tokens: int) -> list[Job]:
    """Requests of one prompt each."""
    return jobs(plan, f"growth {count} {prompt_tokens}", count, prompt_tokens, NEW_TOKENS)


def _together(plan: Plan, count: int) -> Job:
    """One request of several prompts."""
    single = jobs(plan, f"growth together {count}", count, PROMPT_TOKENS, NEW_TOKENS)
    return Job(tuple(job.prompts[0] for job in single), NEW_TOKENS)


def _medians(points: list[Point]) -> list[Point]:
    """Each figure's median over the rounds, on its own; `round` is 0."""
    by_place: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        by_place.setdefault((point.curve, point.size), []).append(point)
    return [
        Point(
            curve,
            size,
            round=0,
            output_rate=statistics.median(point.output_rate for point in group),
            first_seconds=statistics.median(point.first_seconds for point in group),
            token_seconds=statistics.median(point.token_seconds for point in group),
            resident=int(statistics.median(point.resident for point in group)),
        )
        for (curve, size), group in by_place.items()
    ]


def _print(points: list[Point]) -> None:
    for curve in dict.fromkeys(point.curve for point in points):
        print(f"\n{curve:>24}{'output tokens/s':>18}{'first token, s':>18}{'a token, ms':>14}{'resident, MiB':>16}")
        for point in points:
            if point.curve == curve:
                gap, resident = 1000 * point.token_seconds, point.resident / 2**20
                print(f"{point.size:24}{point.output_rate:18.1f}{point.first_seconds:18.3f}{gap:14.1f}{resident:16.0f}")


def _save(points: list[Point], medians: list[Point], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = time.strftime("growth-%Y%m%d-%H%M%S", time.gmtime())
    raw = out / f"{name}.json"
    raw.write_text(json.dumps({"machine": machine(), "measured": [asdict(point) for point in points]}) + "\n")
    plot = out / f"{name}.png"
    _draw_plot(medians, plot)
    print(f"\nraw measurements: {raw}\nplot: {plot}")


def _draw_plot(points: list[Point], path: Path) -> None:
    """One panel for each curve: the output rate on the left axis, resident memory on the right one."""
    curves = list(dict.fromkeys(point.curve for point in points))
    figure, panels = headless_pyplot().subplots(1, len(curves), figsize=(5 * len(curves), 4), squeeze=False)
    for panel, curve in zip(panels[0], curves, strict=True):
        mine = [point for point in points if point.curve == curve]
        sizes = [point.size for point in mine]
        panel.plot(sizes, [point.output_rate for point in mine], marker="o", color="tab:blue")
        panel.set(xlabel=curve, ylim=(0, None))
        panel.set_ylabel("output tokens/s", color="tab:blue")
        panel.set_xscale("log", base=2)
        memory_axis = panel.twinx()
        memory_axis.plot(sizes, [point.resident / 2**20 for point in mine], marker="s", color="tab:orange")
        memory_axis.set_ylabel("resident, MiB", color="tab:orange")
        memory_axis.set_ylim(0, None)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
