"""Runs the tiers of the tests one after the other; says of each whether it ran, was skipped or failed, and how long.

    python3 tests/tiers.py          what `.ci/run` runs: a tier that would begin after LATEST_START is not run
    python3 tests/tiers.py --all    every tier, without a limit: `make test-all`

Ends with 1 when a tier has failed. It needs nothing but Python: the tiers' targets install what they use.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LATEST_START = 45 * 60


def never() -> str | None:
    """Nothing keeps a tier from running."""
    return None


def no_emulator() -> str | None:
    """Why processors cannot be emulated here."""
    if platform.machine() != "x86_64":
        return f"emulation is set up on x86-64, and this is {platform.machine()}"
    return no_debian()


def no_debian() -> str | None:
    """Why Debian's packages cannot be installed here."""
    return None if shutil.which("apt-get") else "no apt-get: its tools are Debian's packages"


def no_gpu() -> str | None:
    """Why nothing can be computed on a GPU here."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver"
    return None


def no_gemma_terms() -> str | None:
    """Why Gemma may not be downloaded."""
    accepted = os.environ.get("ACCEPT_GEMMA_TERMS") == "yes"
    return None if accepted else "Gemma's terms are not accepted by ACCEPT_GEMMA_TERMS=yes"


@dataclass(frozen=True)
class Tier:
    """A target of the Makefile, with its arguments, and what keeps it from running here."""

    target: str
    arguments: tuple[str, ...] = ()
    lacking: Callable[[], str | None] = never
    only_all: bool = False


TIERS = (
    Tier("test"),
    Tier("test-attack"),
    Tier("test-simulation"),
    Tier("test-processors", lacking=no_emulator),
    Tier("test-browser", lacking=no_debian),
    Tier("test-families"),
    Tier("test-clients"),
    Tier("soak", ("MINUTES=2",)),
    Tier("test-slow", only_all=True),
    Tier("test-sizes", only_all=True),
    Tier("test-gemma", lacking=no_gemma_terms, only_all=True),
    Tier("check-cuda", only_all=True),
    Tier("test-gpu", lacking=no_gpu, only_all=True),
)


def run(tier: Tier, deadline: float) -> tuple[str, float]:
    """The result of a tier, and its seconds."""
    if reason := tier.lacking():
        return f"skipped ({reason})", 0.0
    began = time.monotonic()
    if began > deadline:
        return "not run: no time left", 0.0
    # What calls this may be make itself, whose flags are not the tiers'.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    code = subprocess.run(["make", tier.target, *tier.arguments], cwd=ROOT, env=environment, check=False).returncode
    return "run" if code == 0 else f"failed ({code})", time.monotonic() - began


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every tier, without a limit of time")
    everything = parser.parse_args().all
    deadline = float("inf") if everything else time.monotonic() + LATEST_START
    rows = []
    for tier in TIERS:
        if tier.only_all and not everything:
            continue
        outcome, seconds = run(tier, deadline)
        rows.append((tier.target, outcome, seconds))
        print(f"tier {tier.target}: {outcome}, {seconds:.0f} s", flush=True)
    print("\n" + "\n".join(f"{target:<16} {seconds:6.0f} s  {outcome}" for target, outcome, seconds in rows))
    return int(any(outcome.startswith("failed") for _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
