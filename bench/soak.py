"""`python -m bench soak --minutes 2`: a mixed load through Envoy for minutes, and the resources that it leaves behind.

A few clients send whole answers, streams, batches, requests that they cancel and invalid requests at random. The
service's memory, open files and threads are sampled meanwhile; at the end it is stopped, and its log reports the
sequences that it still held. The exit code is 1 when a bound is broken.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from bench.client import API_KEY, PeerError, percentile
from bench.drive import together
from bench.peers import services_behind_envoy
from bench.processes import memory
from deploy import local

MIB = 1 << 20
CLIENTS = 6
SAMPLE_SECONDS = 1.0
ANSWER_SECONDS = 120
# Caches, arenas and pools fill for some ninety seconds: this share of the time is not judged.
WARM_UP = 0.5

# The largest figures of a soak that pass, without its warm-up. The slope is fitted over the time after the warm-up, and
# growth is from that time's beginning to its end. The drift is the second half's 99th percentile of a whole answer's
# time over the first half's.
BOUNDS = {
    "RSS slope, MiB/min": 10.0,
    "open files, growth": 8,
    "threads, growth": 2,
    "sequences held at the end": 0,
    "p99 drift": 2.0,
}

PROMPTS = tuple("Once upon a time " * times for times in (1, 1, 2, 8, 30))
EXTRAS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0},
    {"logprobs": 3},
    {"stop": ["\n", "the"]},
    {"echo": True},
)
# Of each kind of request its share in percent, the status that it must get, and the sets of fields of which it has one.
KINDS: dict[str, tuple[int, int, list[dict[str, Any]]]] = {
    "whole": (40, 200, [{"max_tokens": 16, "temperature": 0}]),
    "stream": (25, 200, [{"stream": True, "ignore_eos": True}]),
    "batch": (10, 200, [{"prompt": [text, f"{text}there", "Hello"], "n": n} for text in PROMPTS for n in (1, 2)]),
    "leaves": (15, 200, [{"stream": part < 7, "ignore_eos": True, "max_tokens": 400} for part in range(10)]),
    "refused": (10, 400, [{"temperature": 3}, {"max_tokens": 10**6}, {"prompt": [[10**6]]}, {"stop": [""]}]),
}


@dataclass(frozen=True)
class Sample:
    """One sample of the service: seconds since the start, resident bytes, open files and threads."""

    at: float
    rss: int
    files: int
    threads: int


@dataclass
class Record:
    """The observations of a soak: outcomes by kind, and when each whole answer was asked for and how long it took.

    Times are in seconds, and moments count from `began`, on the monotonic clock.
    """

    began: float = field(default_factory=time.monotonic)
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of the points (x, y)."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def judge(record: Record, held: int, bounds: Mapping[str, float]) -> tuple[dict[str, float], list[str]]:
    """The record's figures, and in words those that exceed their bounds and the answers that were not expected."""
    start = WARM_UP * record.samples[-1].at
    samples = [sample for sample in record.samples if sample.at >= start]
    middle = (start + samples[-1].at) / 2
    first_half = [seconds for at, seconds in record.latencies if start <= at < middle]
    second_half = [seconds for at, seconds in record.latencies if at >= middle]
    if len(samples) < 4 or not first_half or not second_half:
        raise PeerError("the soak was too short to be judged: give it more --minutes")
    figures = {
        "RSS slope, MiB/min": slope([(sample.at / 60, sample.rss / MIB) for sample in samples]),
        "RSS at the end, MiB": samples[-1].rss / MIB,
        "open files, growth": samples[-1].files - samples[0].files,
        "threads, growth": samples[-1].threads - samples[0].threads,
        "sequences held at the end": held,
        "p99 of whole answers, first half, s": percentile(first_half, 99),
        "p99 drift": percentile(second_half, 99) / percentile(first_half, 99),
    }
    broken = [
        f"{name}: {figures[name]:.2f}, at most {most} allowed" for name, most in bounds.items() if figures[name] > most
    ]
    return figures, [*broken, *(f"unexpected: {what}" for what in record.unexpected[:10])]


def run(minutes: float, seed: int, bounds: Mapping[str, float]) -> bool:
    """Soaks the product for `minutes`, prints outcomes and figures, and returns whether all bounds hold."""
    model_dir = local.model_dir(local.Options.from_environment())
    flags = ["--model-dir", str(model_dir), "--max-running", "8", "--context-length", "1024"]
    with services_behind_envoy(flags) as (http_port, (service,), _):
        record = asyncio.run(_soak(http_port, service, 60 * minutes, seed))
        service.stop()
        held = _held(service.log)
    figures, broken = judge(record, held, bounds)
    print(f"{minutes:g} minutes, seed {seed}: {dict(sorted(record.outcomes.items()))}")
    for name, value in figures.items():
        print(f"{name:40} {value:10.2f}")
    for problem in broken:
        print(f"BROKEN {problem}")
    return not broken


def _held(log: Path) -> int:
    """The sequences that the service still held when it was stopped, as its log reports."""
    for line in log.read_text().splitlines():
        with suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if entry["message"] == "draining":
                return int(entry["running"]) + int(entry["waiting"])
    raise PeerError("the service's log does not report the sequences that it held when it was stopped")


def take_sample(pid: int, at: float) -> Sample:
    """The service's resources now, `at` seconds after the start."""
    files, threads = (len(list(Path(f"/proc/{pid}/{name}").iterdir())) for name in ("fd", "task"))
    return Sample(at, memory(pid, "VmRSS"), files, threads)


async def _soak(port: int, service: local.Child, seconds: float, seed: int) -> Record:
    record = Record()
    async with (
        httpx2.AsyncClient(
            base_url=f"http://127.0.0.1:{port}",
            # Every request has a connection of its own.
            headers={"Authorization": f"Bearer {API_KEY}", "Connection": "close"},
            timeout=None,
            trust_env=False,
        ) as client,
        together() as tasks,
    ):
        tasks.create_task(_watch(service, record, seconds))
        for number in range(CLIENTS):
            tasks.create_task(_send(client, record, seconds, random.Random(f"{seed} {number}")))
    await asyncio.sleep(1)  # cancelled requests are freed within a step
    return record


async def _watch(service: local.Child, record: Record, seconds: float) -> None:
    """Samples the service every SAMPLE_SECONDS. Raises PeerError when it ends."""
    while time.monotonic() < record.began + seconds:
        await asyncio.sleep(SAMPLE_SECONDS)
        if service.process.poll() is not None:
            raise PeerError("the service ended during the soak")
        record.samples.append(take_sample(service.process.pid, time.monotonic() - record.began))


async def _send(client: httpx2.AsyncClient, record: Record, seconds: float, draw: random.Random) -> None:
    """Sends one request after the other, of random kinds."""
    shares = [share for share, _, _ in KINDS.values()]
    while (now := time.monotonic() - record.began) < seconds:
        (kind,) = draw.choices(list(KINDS), shares)
        _, expected, fields = KINDS[kind]
        body = {"model": local.MODEL, "prompt": draw.choice(PROMPTS), "max_tokens": draw.randrange(4, 32)}
        body |= draw.choice(EXTRAS) | draw.choice(fields)
        try:
            async with asyncio.timeout(draw.uniform(0, 1) if kind == "leaves" else ANSWER_SECONDS):
                answer = await client.post("/v1/completions", json=body)
        except TimeoutError:
            if kind != "leaves":
                raise PeerError(f"a request got no answer within {ANSWER_SECONDS} s") from None
            record.outcomes["leaves left"] += 1
            continue
        record.outcomes[f"{kind} {answer.status_code}"] += 1
        if kind == "whole":
            record.latencies.append((now, time.monotonic() - record.began - now))
        cut_off = kind == "stream" and not answer.content.rstrip().endswith(b"[DONE]")
        if kind != "leaves" and (answer.status_code != expected or cut_off):
            record.unexpected.append(f"{kind} got {answer.status_code}: {answer.content[-200:]!r}")
