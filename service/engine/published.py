"""What the step thread shows to other threads: records that are replaced and never changed."""

from __future__ import annotations

from dataclasses import dataclass

from service.engine.cache import Reuse
from service.engine.generation import Generation
from service.engine.scheduler import Load


@dataclass(frozen=True, slots=True, eq=False)
class RunningStep:
    """A step that runs: the requests in it, and the seconds that it is expected to take; 0 if nothing is known yet."""

    requests: tuple[Generation, ...]
    expected: float


@dataclass(frozen=True, slots=True)
class Published:
    """The step thread's state for other threads to read: replaced, never changed, at every step."""

    load: Load
    reuse: Reuse
    failed_steps: int
    not_finite: int
    stopping: bool
