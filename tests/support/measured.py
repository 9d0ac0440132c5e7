"""What a command takes: time, and memory at the peak."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench.client import PeerError
from bench.processes import memory
from tests.support.stack import ROOT

MIB = 1 << 20
# How often memory is looked at, in seconds: the export's phases last longer.
INTERVAL = 0.05


@dataclass(frozen=True)
class Taken:
    """Seconds, bytes, and what the command printed.

    `own` is memory that the system cannot take back, `resident` also counts pages of files, such as weights.
    """

    seconds: float
    own: int
    resident: int
    output: str

    def __str__(self) -> str:
        own, resident = self.own / MIB, self.resident / MIB
        return f"{self.seconds:.0f} s, peak {own:.0f} MiB of its own, {resident:.0f} MiB with pages of files"


def taken(command: Sequence[str]) -> Taken:
    """Runs a command in the repository. Raises CalledProcessError with its output when it fails."""
    began, own, resident = time.monotonic(), 0, 0
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                with contextlib.suppress(OSError, PeerError):  # it has just ended
                    own = max(own, memory(process.pid, "RssAnon"))
                    resident = max(resident, memory(process.pid, "VmHWM"))
                time.sleep(INTERVAL)
        seconds = time.monotonic() - began
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return Taken(seconds, own, resident, text)
