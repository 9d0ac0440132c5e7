"""The tiers of the tests: each is reported as run, skipped or failed, and none starts too late."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiers
from tests.support.stack import ROOT
from tests.tiers import TIERS, Tier

MAKEFILE = """\
good:
\t@echo WORD=$(WORD)
bad:
\t@exit 3
"""


@pytest.fixture
def makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project with a target that succeeds and one that fails."""
    (tmp_path / "Makefile").write_text(MAKEFILE)
    monkeypatch.setattr(tiers, "ROOT", tmp_path)


def told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *chosen: Tier, flags: str = "") -> tuple:
    """The exit code, and the lines about tiers without their seconds."""
    monkeypatch.setattr(tiers, "TIERS", chosen)
    monkeypatch.setattr(sys, "argv", ["tiers.py", *flags.split()])
    code = tiers.main()
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith(("tier ", "WORD="))]
    return code, [re.sub(r", \d+ s$", "", line) for line in lines]


@pytest.mark.usefixtures("makefile")
def test_each_is_told(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A failed tier fails the whole, and those after it run all the same."""
    skipped = Tier("good", lacking=lambda: "there is no such machine")
    assert told(monkeypatch, capfd, Tier("bad"), skipped, Tier("good", ("WORD=done",))) == (
        1,
        ["tier bad: failed (2)", "tier good: skipped (there is no such machine)", "WORD=done", "tier good: run"],
    )
    assert told(monkeypatch, capfd, Tier("good"), skipped)[0] == 0


@pytest.mark.usefixtures("makefile")
def test_none_begins_too_late(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """After the limit nothing is begun, which is said and is no failure; with --all there is no limit."""
    monkeypatch.setattr(tiers, "LATEST_START", -1)
    assert told(monkeypatch, capfd, Tier("bad")) == (0, ["tier bad: not run: no time left"])
    assert told(monkeypatch, capfd, Tier("bad"), flags="--all") == (1, ["tier bad: failed (2)"])


@pytest.mark.usefixtures("makefile")
def test_some_run_only_when_asked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Tiers beyond the daily ones are left to --all."""
    assert told(monkeypatch, capfd, Tier("bad", only_all=True)) == (0, [])
    assert told(monkeypatch, capfd, Tier("bad", only_all=True), flags="--all")[0] == 1


def test_every_tier_is_a_target_and_documented() -> None:
    """The Makefile has each, docs/testing.md says what it is for, and `.ci/run` runs them by this list."""
    documented = (ROOT / "docs" / "testing.md").read_text()
    for tier in TIERS:
        known = subprocess.run(
            ["make", "--dry-run", "--question", tier.target], cwd=ROOT, capture_output=True, check=False
        )
        assert b"No rule to make target" not in known.stderr
        assert f"`make {tier.target}" in documented
    assert "python3 tests/tiers.py\n" in (ROOT / ".ci" / "run").read_text()
