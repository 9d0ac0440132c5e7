"""The client that drives every door: streamed completions, timed piece by piece."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

PROMPT_TOKENS = 128
NEW_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Job:
    """One request: `prompt` as token ids, and how many tokens to generate whatever they are."""

    prompt: tuple[int, ...]
    new_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """When a request began and when each of its pieces came, in seconds of one clock."""

    began: float
    pieces: tuple[float, ...]
    tokens: int

    @property
    def first(self) -> float:
        """Time to the first piece."""
        return self.pieces[0] - self.began


@dataclass(frozen=True, slots=True)
class Result:
    """A run's figures: tokens generated per second, and medians of the time to first piece and between pieces."""

    tokens_per_second: float
    first_seconds: float
    gap_seconds: float


# Gives an item per piece: the tokens generated so far where the peer tells, else 0; the last that it tells counts.
Stream = Callable[[Job], AsyncIterator[int]]


def jobs(count: int, vocabulary: int, prompt_tokens: int = PROMPT_TOKENS, new_tokens: int = NEW_TOKENS) -> list[Job]:
    """Requests with random prompts that share no beginning, the same for every peer."""
    pick = random.Random(count * 1000 + prompt_tokens)
    low = min(1000, vocabulary // 2)
    return [Job(tuple(pick.randrange(low, vocabulary) for _ in range(prompt_tokens)), new_tokens) for _ in range(count)]


async def timed(stream: Stream, job: Job) -> Timing:
    """Runs one request."""
    began, pieces, tokens = time.perf_counter(), [], 0
    async for count in stream(job):
        pieces.append(time.perf_counter())
        tokens = count or tokens
    return Timing(began, tuple(pieces), tokens)


async def closed_loop(stream: Stream, work: list[Job], concurrency: int) -> Result:
    """Keeps `concurrency` requests running until all work is done."""
    queue = list(reversed(work))
    timings: list[Timing] = []

    async def worker() -> None:
        while queue:
            timings.append(await timed(stream, queue.pop()))

    began = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(concurrency)))
    seconds = time.perf_counter() - began
    gaps = [b - a for timing in timings for a, b in zip(timing.pieces, timing.pieces[1:], strict=False)]
    return Result(
        tokens_per_second=sum(timing.tokens for timing in timings) / seconds,
        first_seconds=statistics.median(timing.first for timing in timings),
        gap_seconds=statistics.median(gaps) if gaps else 0.0,
    )


def rest(port: int, model: str) -> Stream:
    """Streams by OpenAI's API over HTTP/1.1, one connection per request."""

    async def stream(job: Job) -> AsyncIterator[int]:
        body = {
            "model": model,
            "prompt": list(job.prompt),
            "max_tokens": job.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer bench\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + data)
            status = await reader.readline()
            if b" 200 " not in status:
                raise RuntimeError(f"{status!r}: {(await reader.read(2000))!r}")
            async for count in _pieces(reader):
                yield count
        finally:
            writer.close()

    return stream


async def _pieces(reader: asyncio.StreamReader) -> AsyncIterator[int]:
    """The pieces of an event stream."""
    while line := await reader.readline():
        if not line.startswith(b"data: {"):
            continue
        event = json.loads(line[len(b"data: ") :])
        if "error" in event:
            raise RuntimeError(str(event["error"]))
        if event.get("usage"):
            yield event["usage"]["completion_tokens"]
        elif event["choices"]:
            yield 0
