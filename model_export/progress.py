"""Shows how far a long step is and how long the rest may take: on a terminal as a bar, else as a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


def progress(label: str, total: int) -> Callable[[], object]:
    """A function to call `total` times, each after an equal part of the work that `label` names."""
    if sys.stderr.isatty():
        bar = "{l_bar}{bar}| {elapsed} passed, about {remaining} left"
        return tqdm(total=total, desc=label, bar_format=bar, leave=False).update
    return Lines(label, total, time.monotonic).advance


class Lines:
    """Prints a line to standard error at most every SECONDS_BETWEEN_LINES. `clock` gives seconds."""

    def __init__(self, label: str, total: int, clock: Callable[[], float]) -> None:
        self._label, self._total, self._clock = label, total, clock
        self._done = 0
        self._began = self._printed = clock()

    def advance(self) -> None:
        self._done += 1
        now = self._clock()
        if now - self._printed < SECONDS_BETWEEN_LINES or self._done > self._total:
            return
        self._printed = now
        passed = now - self._began
        left = passed / self._done * (self._total - self._done)
        print(
            f"model_export: {self._label}: {self._done * 100 // self._total} %, "
            f"{tqdm.format_interval(passed)} passed, about {tqdm.format_interval(left)} left",
            file=sys.stderr,
            flush=True,
        )
