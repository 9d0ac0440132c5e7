"""Tells processes that still do something from those that only wait, by what Linux counts for each of them."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Over at least SAMPLE_SECONDS, the share of a core, or the bytes read per second, from which on something happens. The
# timers and health checks of an idle service take less than a hundredth of a core.
SAMPLE_SECONDS = 1.0
BUSY_SHARE = 0.05
BUSY_READING = 1 << 20

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Work:
    """What processes have done since they began: seconds of CPU time, and bytes read, from a cache or a disk."""

    cpu_seconds: float = 0.0
    read_bytes: int = 0

    @classmethod
    def of(cls, pids: Sequence[int]) -> "Work":
        """The work of these processes together; one that has ended has done none."""
        return cls(sum(map(_cpu_seconds, pids)), sum(map(_read_bytes, pids)))


def _cpu_seconds(pid: int) -> float:
    try:
        # The second field, the name in parentheses, may contain spaces.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS  # utime and stime: fields 14 and 15


def _read_bytes(pid: int) -> int:
    try:
        counts = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    except OSError:  # ended, or it belongs to another user
        return 0
    # `rchar` counts what `read` returned, also from a cache; `read_bytes` what came from a disk, also for mapped files.
    return int(counts["rchar"]) + int(counts["read_bytes"])


class Progress:
    """Follows the work of processes. `work` is what they have done, as of the latest sample."""

    def __init__(self, measure: Callable[[], Work], clock: Callable[[], float] = time.monotonic) -> None:
        self._measure = measure
        self._clock = clock
        self._sampled = self._latest = clock()
        self.work = measure()

    def idle_seconds(self) -> float:
        """Seconds since something has happened. Takes a sample, unless the latest is not SAMPLE_SECONDS old."""
        now = self._clock()
        seconds = now - self._sampled
        if seconds >= SAMPLE_SECONDS:
            before, self.work, self._sampled = self.work, self._measure(), now
            used = self.work.cpu_seconds - before.cpu_seconds
            read = self.work.read_bytes - before.read_bytes
            if used >= BUSY_SHARE * seconds or read >= BUSY_READING * seconds:
                self._latest = now
        return now - self._latest
