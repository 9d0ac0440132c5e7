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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.client import PeerError, percentile, post
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


@dataclass(frozen=True)
class Bounds:
    """The largest values of a soak that pass, without its warm-up.

    `rss_slope` is in MiB per minute, fitted over the time after the warm-up. `files` and `threads` are the growth from
    beginning to end, `held` the sequences at the end. `p99_drift` is the second half's 99th percentile of a whole
    answer's time over the first half's.
    """

    rss_slope: float = 10.0
    files: int = 8
    threads: int = 2
    held: int = 0
    p99_drift: float = 2.0


@dataclass(frozen=True)
class Sample:
    """One sample of the service: seconds since the start, resident bytes, open files and threads."""

    at: float
    rss: int
    files: int
    threads: int


@dataclass
class Record:
    """The observations of a soak: outcomes by kind, and when each whole answer was asked for and how long it took."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: list[tuple[float, float]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Verdict:
    """A soak's figures, and the broken bounds in words."""

    figures: dict[str, float]
    broken: list[str]


def slope(points: Sequence[tuple[float, float]]) -> float:
    """The least-squares slope of the points (x, y)."""
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def judge(record: Record, held: int, bounds: Bounds) -> Verdict:
    """The record's figures, compared with the bounds."""
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
    limits = {
        "RSS slope, MiB/min": bounds.rss_slope,
        "open files, growth": bounds.files,
        "threads, growth": bounds.threads,
        "sequences held at the end": bounds.held,
        "p99 drift": bounds.p99_drift,
    }
    broken = [
        f"{name}: {figures[name]:.2f}, at most {most} allowed" for name, most in limits.items() if figures[name] > most
    ]
    broken += [f"unexpected: {what}" for what in record.unexpected[:10]]
    return Verdict(figures, broken)


def run(minutes: float, seed: int, bounds: Bounds) -> bool:
    """Soaks the product for `minutes`, prints outcomes and figures, and returns whether all bounds hold."""
    model_dir = local.model_dir(local.Options.from_environment())
    arguments = ["--model-dir", str(model_dir), "--max-running", "8", "--context-length", "1024"]
    with services_behind_envoy(arguments) as (http_port, (service,), _):
        record = asyncio.run(_soak(http_port, service, 60 * minutes, seed))
        service.stop()
        held = _held(service.log)
    verdict = judge(record, held, bounds)
    print(f"{minutes:g} minutes, seed {seed}: {dict(sorted(record.outcomes.items()))}")
    for name, value in verdict.figures.items():
        print(f"{name:40} {value:10.2f}")
    for problem in verdict.broken:
        print(f"BROKEN {problem}")
    return not verdict.broken


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
    record, began = Record(), time.monotonic()
    clients = [_client(port, record, began, seconds, f"{seed} {i}") for i in range(CLIENTS)]
    await together([_watch(service, record, began, seconds), *clients])
    await asyncio.sleep(1)  # cancelled requests are freed within a step
    return record


async def _watch(service: local.Child, record: Record, began: float, seconds: float) -> None:
    """Samples the service every SAMPLE_SECONDS. Raises PeerError when it ends."""
    while time.monotonic() < began + seconds:
        await asyncio.sleep(SAMPLE_SECONDS)
        if service.process.poll() is not None:
            raise PeerError("the service ended during the soak")
        record.samples.append(take_sample(service.process.pid, time.monotonic() - began))


async def _client(port: int, record: Record, began: float, seconds: float, seed: str) -> None:
    """Sends one request after the other, of random kinds."""
    draw = random.Random(seed)
    kinds = {"whole": 40, "stream": 25, "batch": 10, "leaves": 15, "refused": 10}
    while (now := time.monotonic() - began) < seconds:
        (kind,) = draw.choices(list(kinds), list(kinds.values()))
        body, expected = _request(draw, kind)
        status, data = await _exchange(port, body, leave_after=draw.uniform(0, 1) if kind == "leaves" else None)
        record.outcomes[f"{kind} {status or 'left'}"] += 1
        if kind == "whole":
            record.latencies.append((now, time.monotonic() - began - now))
        if kind != "leaves" and (status != expected or (kind == "stream" and not data.rstrip().endswith(b"[DONE]"))):
            record.unexpected.append(f"{kind} got {status}: {data[-200:]!r}")


def _request(draw: random.Random, kind: str) -> tuple[dict[str, Any], int]:
    """A request of this kind, and the status that it must get."""
    prompt = "Once upon a time " * draw.choice((1, 1, 2, 8, 30))
    body: dict[str, Any] = {"model": local.MODEL, "prompt": prompt, "max_tokens": draw.randrange(4, 32)}
    body |= draw.choice(({}, {"temperature": 0}, {"logprobs": 3}, {"stop": ["\n", "the"]}, {"echo": True}))
    if kind == "whole":
        body |= {"max_tokens": 16, "temperature": 0}
    elif kind == "batch":
        body |= {"prompt": [prompt, f"{prompt}there", "Hello"], "n": draw.randrange(1, 3)}
    elif kind in {"stream", "leaves"}:
        body |= {"stream": kind == "stream" or draw.random() < 0.7, "ignore_eos": True}
        body |= {"max_tokens": 400} if kind == "leaves" else {}
    elif kind == "refused":
        body |= draw.choice(({"temperature": 3}, {"max_tokens": 10**6}, {"prompt": [[10**6]]}, {"stop": [""]}))
        return body, 400
    return body, 200


async def _exchange(port: int, body: dict[str, Any], leave_after: float | None) -> tuple[int, bytes]:
    """The status and body of an answer; status 0 where the caller left before."""
    try:
        async with asyncio.timeout(leave_after or ANSWER_SECONDS), post(port, body) as reader:
            answer = await reader.read()
    except TimeoutError:
        if leave_after is None:
            raise PeerError(f"a request got no answer within {ANSWER_SECONDS} s") from None
        return 0, b""
    headers, _, content = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in headers.lower():
        content = unchunked(content)
    return int(headers.split(b" ", 2)[1]), content


def unchunked(data: bytes) -> bytes:
    """The content of a chunked body."""
    content = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        content, data = content + data[:length], data[length + 2 :]
    return content
