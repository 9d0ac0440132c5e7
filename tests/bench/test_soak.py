"""The soak's arithmetic on numbers that a reader can check, and a short soak of the real product."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from bench import soak
from bench.client import PeerError
from bench.soak import BOUNDS, MIB, Record, Sample, judge, slope
from tests.support.processes import export_tiny
from tests.support.stack import MODEL


def record(rss: float = 0.0, files: float = 0.0, threads: float = 0.0, slower: float = 1.0) -> Record:
    """Two minutes with a sample a second and this growth per minute; answers of the second half are `slower`."""
    made = Record()
    for at in range(1, 121):
        grown = at / 60
        made.samples.append(
            Sample(at, round((500 + rss * grown) * MIB), 50 + round(files * grown), 20 + round(threads * grown))
        )
        # Of 120 s the first 60 warm up; of the rest the second half begins at 90.
        made.latencies.append((at, 9.0 if at < 60 else 0.5 if at < 90 else 0.5 * slower))
    return made


def broken(made: Record, held: int = 0) -> list[str]:
    bounds = {
        "RSS slope, MiB/min": 10,
        "open files, growth": 8,
        "threads, growth": 2,
        "sequences held at the end": 0,
        "p99 drift": 2,
    }
    _, problems = judge(made, held, bounds)
    return problems


def test_slope() -> None:
    """A straight line gives its own slope; noise that sums to zero does not change it."""
    assert slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2)
    assert slope([(0, 1), (1, -1), (2, -1), (3, 1)]) == pytest.approx(0)


def test_figures() -> None:
    """Every figure equals the value computed by hand."""
    figures, _ = judge(record(rss=6, files=2, threads=2, slower=1.5), 0, BOUNDS)
    assert figures["RSS slope, MiB/min"] == pytest.approx(6, rel=0.01)
    assert figures["RSS at the end, MiB"] == pytest.approx(512)
    assert figures["open files, growth"] == 54 - 52
    assert figures["threads, growth"] == 24 - 22
    assert figures["p99 of whole answers, first half, s"] == pytest.approx(0.5)
    assert figures["p99 drift"] == pytest.approx(1.5)


def test_nothing_broken() -> None:
    """A service that does not change after the warm-up passes, however slow the warm-up was."""
    assert broken(record()) == []


@pytest.mark.parametrize(
    ("made", "held", "what"),
    [
        (record(rss=11), 0, "RSS slope, MiB/min: 11.0"),
        (record(files=12), 0, "open files, growth: 12.0"),
        (record(threads=4), 0, "threads, growth: 4.0"),
        (record(slower=2.5), 0, "p99 drift: 2.5"),
        (record(), 1, "sequences held at the end: 1.0"),
    ],
)
def test_each_bound(made: Record, held: int, what: str) -> None:
    """A broken bound is named with the value and the bound."""
    (problem,) = broken(made, held)
    assert problem.startswith(what)
    assert "allowed" in problem


def test_unexpected_answers() -> None:
    """One unexpected answer breaks the soak."""
    made = record()
    made.unexpected.append("whole got 500")
    assert broken(made) == ["unexpected: whole got 500"]


def test_too_short() -> None:
    """A soak with too few samples or answers has no verdict."""
    made = record()
    made.latencies = made.latencies[:40]
    with pytest.raises(PeerError, match="too short"):
        broken(made)


def judged(bounds: Mapping[str, float]) -> bool:
    """The verdict on the shortest soak that has enough samples and answers."""
    for minutes in (0.1, 1):
        with suppress(PeerError):
            return soak.run(minutes, 1, bounds)
    return soak.run(5, 1, bounds)


def test_a_soak_of_the_product(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a short soak every kind of request gets its expected status, and no sequence is held at the end."""
    monkeypatch.setenv("MODEL_DIR", str(export_tiny(tmp_path, MODEL)))
    monkeypatch.setattr(soak, "SAMPLE_SECONDS", 0.5)
    generous = {
        **BOUNDS,
        "RSS slope, MiB/min": 1e9,
        "open files, growth": 1000,
        "threads, growth": 1000,
        "p99 drift": 1e9,
    }
    assert judged(generous), capsys.readouterr().out
    said = capsys.readouterr().out
    assert "'whole 200'" in said
    assert "sequences held at the end                      0.00" in said
