"""The benchmark's arithmetic on numbers that a reader can check, and its loads on the real engine."""

from __future__ import annotations

import asyncio
import json
import os
from argparse import Namespace
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE

import kernels
from bench import client, drive, keystrokes, loads, peers, processes, products
from bench.client import Job, PeerError, Piece, Run, Stream, Timing, percentile, timed
from bench.loads import Load
from bench.peers import Served
from bench.report import PRODUCT, Figure, Outcome, Results
from service.manifest import TOKENIZER_FILE, FillInTheMiddle
from tests.support.patience import PATIENCE


class Clock:
    """A clock that advances only when every task sleeps: to the earliest time at which one wakes."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[float] = []

    async def sleep(self, seconds: float) -> None:
        due = self.now + seconds
        self._due.append(due)
        try:
            while True:
                for _ in range(10):  # all other tasks run until they sleep
                    await asyncio.sleep(0)
                if due == min(self._due):
                    break
        finally:
            self._due.remove(due)
        self.now = due


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the benchmark reads."""
    made = Clock()
    for module in (client, drive):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def paced(clock: Clock, gaps: dict[int, list[float]]) -> Stream:
    """A peer that sends one token after each gap; a prompt's first token selects its list of gaps, in seconds."""

    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        for count, gap in enumerate(gaps[job.prompts[0][0]], 1):
            await clock.sleep(gap)
            yield Piece("x", count)

    return stream


async def test_times_of_a_stream(clock: Clock) -> None:
    """The first token, the gaps and the time per token are those of the stream."""
    timing = await timed(paced(clock, {7: [0.1, 0.02, 0.06]}), Job(((7,),), 3))
    assert timing.first == pytest.approx(0.1)
    assert timing.gaps == pytest.approx([0.02, 0.06])
    assert timing.seconds_per_token == pytest.approx(0.04)
    assert timing.text == "xxx"


async def test_a_short_answer_is_an_error(clock: Clock) -> None:
    """Rates of answers with other lengths would not compare."""
    with pytest.raises(PeerError, match="2 tokens, 3 were asked for"):
        await timed(paced(clock, {7: [0, 0]}), Job(((7,),), 3))


async def test_a_closed_loop_keeps_its_concurrency(clock: Clock) -> None:
    """Two requests run at a time, and the next begins when one ends: 0.2 s beside 0.05 s and then 0.05 s."""
    served = Served(paced(clock, {1: [0.2], 2: [0.05], 3: [0.05]}))
    load = Load([Job(((first,),), 1) for first in (1, 2, 3)], {}, concurrency=2)
    run = await drive.drive(served, load, Tokenizer(BPE()))
    assert run.seconds == pytest.approx(0.2)
    began = sorted(timing.began - min(timing.began for timing in run.timings) for timing in run.timings)
    assert began == pytest.approx([0, 0, 0.05])


async def test_counters_are_read_around_a_load(clock: Clock) -> None:
    """Of 0.2 s, 0.15 in the model; of processor time, 40 ms of the event loop for two tokens."""
    counters = {"model": lambda: 7 + 0.75 * clock.now, "event loop": lambda: 3 + 0.2 * clock.now}
    served = Served(paced(clock, {1: [0.2], 2: [0.2]}), counters=counters)
    names = ("in the model", "event loop, processor time a token", "Envoy, processor time a token")
    load = Load([Job(((first,),), 1) for first in (1, 2)], {name: loads.METRICS[name] for name in names}, concurrency=2)
    figures = {figure.name: figure.value for figure in (await drive.measure(served, load, Tokenizer(BPE()))).figures}
    assert figures == pytest.approx({names[0]: 75, names[1]: 20})


def test_processor_time_is_counted() -> None:
    """Work of this thread counts for it and for the whole process, to a few ticks of the system's clock."""
    main, whole = (processes.processor_seconds(os.getpid(), main_thread=only) for only in (True, False))
    while processes.processor_seconds(os.getpid(), main_thread=True) < main + 0.05:
        sum(range(100_000))
    assert processes.processor_seconds(os.getpid()) > whole + 0.02


@pytest.mark.skipif(kernels.why_not() is not None, reason="own kernels do not run here")
def test_products_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of rows is measured, beside the instruction alone."""
    for name, value in {"OUTPUTS": 512, "REPEATS": 3, "PEAK_TURNS": 20_000}.items():
        monkeypatch.setattr(products, name, value)
    for rows, outcome in zip(products.ROWS, products.measure(1), strict=True):
        figures = {figure.name: figure.value for figure in outcome.figures}
        assert outcome.size == rows
        assert min(figures.values()) > 0
        assert figures["products of Q8_0, share of that"] == pytest.approx(
            100 * figures["products of Q8_0"] / figures[products.PEAK]
        )


def test_percentiles() -> None:
    """Values between neighbours are interpolated; the percentile of one value is that value."""
    assert percentile([3.0], 95) == 3
    assert percentile([0.0, 10.0], 95) == pytest.approx(9.5)
    assert percentile([5.0, 1.0, 3.0], 50) == 3


def test_ratios_are_taken_within_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Above 1 the product wins, for rates and for times; the median is over the ratios of the rounds."""
    results = Results(tmp_path / "out", {"rounds": 3})
    for number, (ours, theirs) in enumerate([(10, 5), (30, 10), (80, 20)], 1):
        for peer, value in ((PRODUCT, ours), ("other", theirs)):
            rate, time = Figure("a rate", value, "1/s", "more"), Figure("a time", value, "s", "less")
            results.add(number, peer, "closed", Outcome([rate, time]))
    results.finish()
    printed = capsys.readouterr().out
    assert "ours is 3.00 times as good (2.00..4.00)" in printed
    assert "ours is 0.33 times as good (0.25..0.50)" in printed
    (raw,) = (tmp_path / "out").iterdir()
    assert len(json.loads(raw.read_text())["measured"]) == 6


@pytest.fixture
def plan(model_dir: Path) -> Namespace:
    """A short load."""
    return Namespace(
        tokenizer=Tokenizer.from_file(str(model_dir / TOKENIZER_FILE)),
        context=64,
        concurrency=(2,),
        requests_each=1,
        prompt_tokens=16,
        new_tokens=4,
        rate=50.0,
        arrivals=4,
        ttft_objective=60.0,
        itl_objective=60.0,
        seed=1,
        limit=PATIENCE,
    )


@pytest.mark.parametrize("load", ["closed", "open"])
async def test_loads_on_the_real_engine(load: str, plan: Namespace, model_dir: Path, tmp_path: Path) -> None:
    """Every request of a load is answered in full, and every figure is a number above zero."""
    setup = peers.Setup(model_dir, tmp_path / "unused.gguf", threads=2, slots=4, context=64, cache=tmp_path)
    with peers.bare_engine(setup) as served:
        ((name, outcome),) = await drive.run(served, [load], plan)
    assert name == load
    assert len(outcome.timings) == 4
    assert all(figure.value > 0 for figure in outcome.figures)


def test_goodput_counts_what_came_in_time(plan: Namespace) -> None:
    """Of four answers one ended before the queue was full, and one's first token came too late."""
    settled, began = loads.SETTLE_SECONDS, 100.0

    def answer(first: float, end: float) -> Timing:
        return Timing(began + end - 5, (began + end - 5 + first, began + end), 2, 0, "")

    answers = [answer(1, settled - 1), answer(2, settled + 1), answer(3, settled + 2), answer(60, settled + 3)]
    run = Run(began, answers, refusals=[0.001, 0.003])
    metrics = loads.offered(plan, 2.0, rate=4.0).metrics
    figures = {name: value(run) for name, (_, _, value) in metrics.items()}
    assert figures["goodput"] == pytest.approx(2 / (loads.ARRIVAL_SECONDS - settled))
    assert figures["refused"] == pytest.approx(2 / 6)
    assert figures["time to first token, p50"] == pytest.approx(2.5)
    assert figures["answer, p95"] == pytest.approx(5.0)
    assert figures["refusal, p95"] == pytest.approx(2.9)


def test_ratios_of_replicas_are_taken_within_a_round(tmp_path: Path) -> None:
    """The second round was half as fast for both: the ratio is the same."""
    results = Results(tmp_path, {})
    for number, peer, value in [(1, "one", 10.0), (1, "two", 15.0), (2, "one", 5.0), (2, "two", 7.5)]:
        results.add(number, peer, "callers", Outcome([Figure("output rate", value, "tokens/s", "more")]))
    assert results.ratios(("callers", "output rate"), (None, "two"), (None, "one")) == [1.5, 1.5]


async def test_sessions_count_what_caches_held(plan: Namespace) -> None:
    """A cache that holds half of each prompt gives a hit rate of one half; every chat keeps its session and grows."""
    seen: dict[str | None, list[int]] = {}

    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        length = len(job.prompts[0])
        seen.setdefault(job.session, []).append(length)
        yield Piece("x" * 10, job.new_tokens, length // 2)

    ((_, outcome),) = await drive.run(Served(stream), ["sessions"], plan)
    del seen[None]  # the warm-up
    assert outcome.figures[0].value == pytest.approx(0.5, abs=0.01)
    assert len(seen) == loads.CHATS
    assert all(len(lengths) == loads.CHAT_TURNS and lengths == sorted(set(lengths)) for lengths in seen.values())


def test_a_keystroke_ends_the_request_before(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that come before the next keystroke count, those of the last request all; the rest is work thrown away."""
    monkeypatch.setattr(keystrokes, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(keystrokes, "asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": clock.sleep}))
    stream = paced(clock, {0: [0.7, 0.1], 1: [0.1, 0.1], 2: [0.3], 3: [0.1, 0.5]})
    first, *strokes = asyncio.run(keystrokes.type_line(stream, [(0,), (1,), (2,), (3,)], 0.15))
    assert (first.finished, len(first.at)) == (True, 2)
    assert [len(stroke.at) for stroke in strokes] == [1, 0, 2]
    assert [stroke.finished for stroke in strokes] == [False, False, True]
    found = {figure.name: figure.value for figure in keystrokes.figures(strokes, strokes[-1:], 0.6)}
    assert found["keystrokes with a suggestion before the next"] == pytest.approx(200 / 3)
    assert found["last keystroke to first token, mean"] == pytest.approx(100)
    assert found["tokens sent and thrown away, a keystroke"] == pytest.approx(1 / 3)
    assert found["processor time, a keystroke"] == pytest.approx(200)


def test_prompts_while_a_line_is_typed() -> None:
    """The window keeps its place, and the marks stand where the model wants them."""
    text = "".join(f"line {number} with some more words in it\n" for number in range(100))
    edits = list(keystrokes.edits(text, lambda part: list(part.encode())))
    assert len(edits) == keystrokes.LINES
    first = edits[0][0]
    assert keystrokes.BEFORE - 40 < len(first) <= keystrokes.BEFORE
    for before, line, after in edits:
        assert before.startswith(first)
        assert before + line in text
        assert text.endswith(after)
    for order, expected in (("psm", (7, 1, 8, 2, 9)), ("spm", (8, 2, 7, 1, 9))):
        marks = FillInTheMiddle(prefix=7, suffix=8, middle=9, order=order)
        assert keystrokes.prompt([1], [2], marks) == expected
    assert keystrokes.prompt([1], [2], None) == (1,)
