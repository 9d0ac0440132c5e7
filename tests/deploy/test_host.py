"""Machines that Envoy's package cannot run on are refused in one sentence, before anything is installed."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import host
from tests.support.stack import ROOT


def test_this_machine_will_do() -> None:
    """Where these tests run, nothing is lacking."""
    assert host.problem() is None


@pytest.mark.parametrize(
    ("libc", "sentence"),
    [
        ("glibc 2.30", "this system has glibc 2.30, and Envoy's package needs glibc 2.31 or later"),
        ("glibc 2.4", "this system has glibc 2.4, and Envoy's package needs glibc 2.31 or later"),
        (None, "another C library than glibc (musl, as in Alpine?), and Envoy's package needs glibc 2.31"),
        (ValueError("unrecognized configuration name"), "another C library than glibc"),
    ],
)
def test_c_libraries(monkeypatch: pytest.MonkeyPatch, libc: str | Exception | None, sentence: str) -> None:
    """Old versions of glibc and other C libraries are named, and what is needed."""

    def confstr(name: str) -> str | None:
        if isinstance(libc, Exception):
            raise libc
        return libc

    monkeypatch.setattr(os, "confstr", confstr)
    assert sentence in host.problem()


@pytest.mark.parametrize("libc", ["glibc 2.31", "glibc 2.36", "glibc 3.0"])
def test_new_enough(monkeypatch: pytest.MonkeyPatch, libc: str) -> None:
    """Versions are compared as numbers."""
    monkeypatch.setattr(os, "confstr", lambda _: libc)
    assert host.problem() is None


def test_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system, the architecture and Python are looked at, too."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "version_info", (3, 10, 4))
        assert "3.11 or later" in host.problem()
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "ppc64le")
        assert host.problem() == "this machine is ppc64le, and Envoy's package is for x86_64 and aarch64"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert host.problem() == "this system is darwin, and Envoy's package is for Linux"


def test_nothing_is_installed_there(tmp_path: Path) -> None:
    """`make run` ends with the sentence, and has made no environment."""
    (tmp_path / "deploy").mkdir()
    for name in ("Makefile", "pyproject.toml", "deploy/host.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    python = tmp_path / "python-of-musl"
    code = "import os, runpy, sys; os.confstr = lambda _: None; runpy.run_path(sys.argv[1], run_name='__main__')"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    made = subprocess.run(
        ["make", "run", f"PYTHON3={python}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert made.returncode != 0
    assert "cannot run here: this system has another C library than glibc" in made.stderr
    assert not (tmp_path / ".venv").exists()
