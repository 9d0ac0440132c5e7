"""What a long step shows while it runs."""

from __future__ import annotations

import io
import sys

import pytest

from model_export.progress import Lines, progress


def test_lines_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    """A line every 30 seconds says how far the step is and how long the rest may take."""
    now = 0.0
    step = Lines("building", 80, lambda: now)
    for _ in range(80):
        now += 2.5
        step.advance()
    step.advance()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    assert lines[0] == "model_export: building: 15 %, 00:30 passed, about 02:50 left"
    assert lines[-1] == "model_export: building: 90 %, 03:00 passed, about 00:20 left"


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal a bar says the same."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    advance = progress("verifying", 2)
    advance()
    advance.__self__.refresh()
    assert "verifying:  50%|" in terminal.getvalue()
    assert " left" in terminal.getvalue()
    advance.__self__.close()


def test_nothing_in_a_short_log(capsys: pytest.CaptureFixture[str]) -> None:
    """A short step prints nothing where standard error is no terminal."""
    advance = progress("verifying", 2)
    advance()
    advance()
    assert capsys.readouterr() == ("", "")
