"""The client that drives every peer: streamed completions, timed piece by piece.

It is small on purpose: it shares the cores with what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

API_KEY = "bench"


class PeerError(Exception):
    """A peer failed; the message is for the person at the terminal."""


class RefusedError(PeerError):
    """The peer is overloaded and refused the request before it began."""


@dataclass(frozen=True, slots=True)
class Job:
    """One request: prompts as token ids, and how many tokens each of its choices generates, whatever they are.

    `reuse` says whether the peer may take prompt tokens from its cache; our service always may. Envoy may choose a
    replica by `session`. In a conversation each of `follow_ups` is the next user's turn, as token ids: it is sent
    after the prompt, the answers and the turns before it.
    """

    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    n: int = 1
    reuse: bool = False
    session: str | None = None
    follow_ups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of an answer.

    `text` is None in a piece that only reports usage. `tokens` counts the tokens generated so far, 0 where the piece
    does not report them; `cached` counts the prompt tokens that came from the cache.
    """

    text: str | None
    tokens: int = 0
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Timing:
    """A finished request: when it began and when each of its pieces came, in seconds of one clock.

    `turn` counts from 0 within a conversation.
    """

    began: float
    at: tuple[float, ...]
    tokens: int
    cached: int
    text: str
    prompt_tokens: int = 0
    turn: int = 0

    @property
    def first(self) -> float:
        """Seconds from sending to the first piece."""
        return self.at[0] - self.began

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in pairwise(self.at)]

    @property
    def seconds_per_token(self) -> float:
        """The mean time of a token after the first one."""
        return (self.at[-1] - self.at[0]) / max(1, self.tokens - 1)


Stream = Callable[[Job], AsyncGenerator[Piece, None]]


@dataclass(frozen=True)
class Run:
    """One finished load: the timings of its answers, and the seconds that each refusal took.

    `began` is a moment of the timings' clock; `resident` is the memory of the peer's first process
    afterwards, in bytes; 0 for a peer in this process. `spent` has the seconds of the peer's counters.
    """

    began: float
    timings: Sequence[Timing]
    refusals: Sequence[float] = ()
    resident: int = 0
    spent: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return sum(timing.tokens for timing in self.timings)

    @property
    def seconds(self) -> float:
        """From the first request sent to the last token received."""
        return max(timing.at[-1] for timing in self.timings) - self.began


async def timed(stream: Stream, job: Job, turn: int = 0) -> Timing:
    """Runs one request to its end.

    Raises PeerError when the answer has fewer or more tokens than were asked for: rates would not compare.
    """
    began, at, texts, tokens, cached = time.perf_counter(), [], [], 0, 0
    async for piece in stream(job):
        if piece.text is not None:
            at.append(time.perf_counter())
            texts.append(piece.text)
        tokens, cached = piece.tokens or tokens, piece.cached or cached
    expected = len(job.prompts) * job.n * job.new_tokens
    if tokens != expected:
        raise PeerError(f"an answer has {tokens} tokens, {expected} were asked for")
    return Timing(began, tuple(at), tokens, cached, "".join(texts), sum(map(len, job.prompts)), turn)


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that `percent` of `values` do not exceed, interpolated linearly between neighbours."""
    return float(np.percentile(values, percent))


def rest(port: int, model: str, uncached: Mapping[str, Any] | None = None) -> Stream:
    """Streams by OpenAI's API over HTTP/1.1 on loopback, one connection per request.

    `uncached` are the request fields that forbid this peer to reuse earlier prompts.
    """

    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        body = {
            "model": model,
            "prompt": list(job.prompts[0]) if len(job.prompts) == 1 else [list(prompt) for prompt in job.prompts],
            "max_tokens": job.new_tokens,
            "n": job.n,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if job.reuse else uncached or {}),
        }
        data = json.dumps(body).encode()
        session_header = f"X-Session-Id: {job.session}\r\n" if job.session else ""
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {API_KEY}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
            f"Connection: close\r\n{session_header}\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with closing(writer):
            writer.write(head.encode() + data)
            status = await reader.readline()
            if b" 429 " in status:
                raise RefusedError("the peer refused a request: it is overloaded")
            if b" 200 " not in status:
                raise PeerError(f"the answer was {status!r}: {(await reader.read(2000))!r}")
            async for line in reader:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise PeerError(f"the stream ended with {event['error']}")
                    usage = event.get("usage") or {}
                    text = "".join(choice["text"] for choice in event["choices"]) if event["choices"] else None
                    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                    yield Piece(text, usage.get("completion_tokens", 0), cached)

    return stream
