"""Completions at typing speed: a request at each keystroke in the middle of a file, which cancels the one before.

The file is one of this project's. One of its lines after the other is taken out and typed again, a character every
KEYSTROKE_SECONDS, once the request at the line's start is answered. After the line the last request may finish: that is
the suggestion which the person waits for.
With a model that has fill-in-the-middle tokens a prompt is what stands before the cursor and what follows it, else only
what stands before. It is sent as token ids, the same to every peer.
"""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from tokenizers import Tokenizer

from bench.client import Job, PeerError, Stream, Timing, percentile
from bench.peers import Served
from bench.processes import processor_seconds
from bench.report import Figure, Outcome
from service.manifest import FillInTheMiddle

KEYSTROKE_SECONDS = 0.15
FILE = Path(__file__).resolve().parent.parent / "service" / "engine" / "scheduler.py"
LINES = 3
# Of a long line only its first characters are typed.
CHARACTERS = 24
# What editors send of a file, in tokens; little enough that the shortest context of a tiny model has room for it.
BEFORE, AFTER = 768, 256
NEW_TOKENS = 24


@dataclass
class Keystroke:
    """One request: when its pieces came, and whether it was over before the next keystroke."""

    prompt_tokens: int
    began: float = field(default_factory=lambda: time.perf_counter())  # noqa: PLW0108, tests replace the clock
    at: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    finished: bool = False

    async def run(self, stream: Stream, job: Job) -> None:
        """Sends the request and reads its answer, until it is cancelled."""
        async for piece in stream(job):
            if piece.text is not None:
                self.at.append(time.perf_counter())
            self.tokens, self.cached = piece.tokens or self.tokens, piece.cached or self.cached
        self.finished = True

    @property
    def timing(self) -> Timing:
        """For the raw results."""
        return Timing(self.began, tuple(self.at), len(self.at), self.cached, "", self.prompt_tokens)


def edits(text: str, encode: Callable[[str], list[int]]) -> Iterator[tuple[str, str, str]]:
    """What stands before a line in the middle of a file, what of the line is typed, and what follows.

    What stands before begins at the same line for all: if it moved with the cursor, as the last so many tokens do, no
    prompt would begin like the one before. Before the first line it has at most BEFORE tokens.
    """
    lines = text.splitlines(keepends=True)
    long = [index for index, line in enumerate(lines) if len(line.strip()) >= CHARACTERS]
    middle = len(long) // 2
    begin = end = long[middle]
    while begin and len(encode("".join(lines[begin - 1 : end]))) <= BEFORE:
        begin -= 1
    for index in long[middle : middle + LINES]:
        line = lines[index]
        indent = len(line) - len(line.lstrip())
        before = "".join(lines[begin:index]) + line[:indent]
        yield before, line[indent : indent + CHARACTERS], "".join(lines[index + 1 :])


def prompt(before: Sequence[int], after: Sequence[int], marks: FillInTheMiddle | None) -> tuple[int, ...]:
    """The tokens before the cursor, and with `marks` the first ones after it."""
    after = after[:AFTER]
    if marks is None:
        return tuple(before)
    middle = () if marks.middle is None else (marks.middle,)
    parts = (marks.prefix, *before), (marks.suffix, *after)
    first, second = parts if marks.order == "psm" else reversed(parts)
    return (*first, *second, *middle)


async def type_line(stream: Stream, prompts: Sequence[tuple[int, ...]], seconds: float) -> list[Keystroke]:
    """A request for each prompt, `seconds` apart; each ends the one before.

    The first one, of a cursor that has just been put there, and the last one may finish.
    """
    strokes = [Keystroke(len(prompts[0]))]
    await strokes[0].run(stream, _job(prompts[0]))
    running: asyncio.Task[None] | None = None
    for tokens in prompts[1:]:
        if running is not None:
            await asyncio.sleep(seconds)
            await _end(running)
        strokes.append(Keystroke(len(tokens)))
        running = asyncio.create_task(strokes[-1].run(stream, _job(tokens)))
    if running is not None:
        await running
    return strokes


def _job(tokens: tuple[int, ...]) -> Job:
    return Job((tokens,), NEW_TOKENS, reuse=True)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancels a request that still runs; the error of one that failed is raised."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def typing(served: Served, plan: Namespace) -> list[Outcome]:
    """Types some lines, and sums up what the person and the machine had of it."""
    tokenizer: Tokenizer = plan.tokenizer

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    typed: list[Keystroke] = []
    last: list[Keystroke] = []
    used = sum(map(processor_seconds, served.processes))
    for before, line, after in edits(FILE.read_text(encoding="utf-8"), encode):
        following = encode(after)
        prompts = [prompt(encode(before + line[:count]), following, plan.marks) for count in range(len(line) + 1)]
        strokes = await type_line(served.stream, prompts, KEYSTROKE_SECONDS)
        typed += strokes[1:]
        last.append(strokes[-1])
    used = sum(map(processor_seconds, served.processes)) - used
    return [Outcome(figures(typed, last, used), [stroke.timing for stroke in typed if stroke.at])]


def figures(typed: Sequence[Keystroke], last: Sequence[Keystroke], processor: float) -> list[Figure]:
    """`typed` are all keystrokes, `last` those after which the person waited, `processor` the peer's seconds."""
    shown = [stroke for stroke in typed if stroke.at]
    if not shown or not all(stroke.at for stroke in last):
        raise PeerError("the peer showed nothing even to a person who waited")
    dropped = [stroke for stroke in typed if not stroke.finished]
    first = [1000 * (stroke.at[0] - stroke.began) for stroke in shown]
    waited = [1000 * (stroke.at[0] - stroke.began) for stroke in last]
    return [
        Figure("keystrokes with a suggestion before the next", 100 * len(shown) / len(typed), "%", "more"),
        Figure("keystroke to first token, p50 of those that came", percentile(first, 50), "ms", "less"),
        Figure("last keystroke to first token, mean", mean(waited), "ms", "less"),
        Figure("prompt tokens cached, last keystroke", mean(each.cached for each in last), "tokens", "more"),
        Figure("prompt tokens, last keystroke", mean(each.prompt_tokens for each in last), "tokens", ""),
        Figure(
            "tokens sent and thrown away, a keystroke", sum(len(s.at) for s in dropped) / len(typed), "tokens", "less"
        ),
        Figure("processor time, a keystroke", 1000 * processor / len(typed), "ms", "less"),
    ]
