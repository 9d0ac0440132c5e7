"""A process that computes or reads makes progress, and one that waits makes none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.progress import BUSY_READING, BUSY_SHARE, SAMPLE_SECONDS, Progress, Work
from tests.support.patience import eventually


class Process:
    """A process whose work is what a test says, at the times that it says."""

    def __init__(self) -> None:
        self.now = 100.0
        self.work = Work(5.0, 5 << 30)
        self.progress = Progress(lambda: self.work, lambda: self.now)

    def after(self, seconds: float, cpu_seconds: float = 0.0, read_bytes: int = 0) -> float:
        """The idle seconds after `seconds` more, in which this has been done."""
        self.now += seconds
        self.work = Work(self.work.cpu_seconds + cpu_seconds, self.work.read_bytes + read_bytes)
        return self.progress.idle_seconds()


def test_idle_seconds_add_up() -> None:
    """What was done before does not count, and neither does the little that an idle process does."""
    process = Process()
    assert process.after(10) == 10
    assert process.after(10, 0.1, 1 << 20) == 20
    assert process.progress.work == Work(5.1, (5 << 30) + (1 << 20))


@pytest.mark.parametrize("done", [(BUSY_SHARE * 3, 0), (0.0, BUSY_READING * 3)])
def test_computing_or_reading_is_progress(done: tuple[float, int]) -> None:
    """Either of them is enough."""
    process = Process()
    assert process.after(10) == 10
    assert process.after(3, *done) == 0
    assert process.after(2) == 2


def test_a_sample_takes_some_time() -> None:
    """Questions in quick succession do not take samples so short that nothing happens within them."""
    process = Process()
    part = SAMPLE_SECONDS / 4
    assert [process.after(part, BUSY_SHARE * part) for _ in range(4)] == [part, 2 * part, 3 * part, 0]


@contextmanager
def running(code: str, *arguments: str) -> Iterator[int]:
    """The id of a process that runs Python code."""
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def test_cpu_time_of_a_process() -> None:
    """A process that computes has used ever more, and the sum over processes includes it."""
    with running("while True: pass") as busy, running("input()") as waiting:
        used = Work.of([busy, waiting]).cpu_seconds
        eventually(lambda: Work.of([busy, waiting]).cpu_seconds > used + 0.2)


def test_bytes_read_by_a_process(tmp_path: Path) -> None:
    """What a process reads counts, also from the page cache."""
    file = tmp_path / "file"
    file.write_bytes(bytes(4 << 20))
    with running("import sys; open(sys.argv[1], 'rb').read(); input()", str(file)) as reading:
        eventually(lambda: Work.of([reading]).read_bytes >= 4 << 20)


def test_a_process_that_has_ended() -> None:
    """It has done nothing."""
    with running("input()") as waiting:
        pass
    assert Work.of([waiting]) == Work()
