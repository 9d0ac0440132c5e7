"""The engine: what the event loop may touch of it. The model is advanced on a thread of its own; see `steps`."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from service.engine.admission import Admission, Pace, Work
from service.engine.cache import Reuse
from service.engine.generation import Generation
from service.engine.ort.model import Model
from service.engine.roster import Roster
from service.engine.scheduler import Scheduler
from service.engine.steps import STOPPED, Steps
from service.errors import SlowReaderError, UnavailableError
from service.telemetry.log import get_logger
from service.telemetry.observer import Observer
from service.text.tokenizer import Tokenizer
from service.types import Request

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sequences in the engine: `running` hold a slot of keys and values, `waiting` do not yet."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Faults:
    """What went wrong since the start.

    Calls of the model that failed, sequences whose logits were not numbers, and requests whose callers read too slowly.
    """

    failed_steps: int = 0
    not_finite: int = 0
    slow_readers: int = 0


class Engine:
    """Continuous batching: requests join and leave between steps of the model.

    All of it belongs to the event loop's thread. `steps` is the step thread's half: two queues join them, commands to
    it and calls back, and what it publishes. `died` is set when the step thread has ended by an error: there is no
    answer from this engine any more. `clock` counts seconds; a caller that takes nothing for `send_timeout` of them
    while pieces wait for it is given up. `name` is the model's, for the log.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        max_waiting: int,
        max_queue_seconds: float = math.inf,
        send_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "",
    ) -> None:
        self.slots = scheduler.slots
        self.prompt_chunk = scheduler.prompt_chunk
        self.died = asyncio.Event()
        self._roster = Roster(Admission(max_waiting, max_queue_seconds))
        self.steps = Steps(model, tokenizer, scheduler, roster=self._roster, clock=clock, name=name)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.send_timeout = send_timeout
        self._clock = clock
        self._log = _log.bind(model=name)
        self._slow_readers = 0

    # --- its life ---

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the step thread; pieces are delivered on `loop`."""
        self.steps.post = loop.call_soon_threadsafe
        self._thread.start()

    def request_stop(self) -> None:
        """Has what is unfinished end with UnavailableError after the current step, and what comes be refused."""
        self.steps.commands.put(self.steps.stop)

    def stop(self) -> None:
        """Ends the step thread after its current step; what is unfinished ends with UnavailableError."""
        self.request_stop()
        self._thread.join()
        self.steps.turn()  # refuses what has come too late

    def _run(self) -> None:
        """The step thread."""
        try:
            self.steps.run()
        except Exception:
            self._log.critical("the engine has died", exc_info=True)
            assert self.steps.post is not None
            self.steps.post(self._bury)

    def _bury(self) -> None:
        """After the step thread has died of an error: ends every request, also those that it has not seen."""
        self.stop()
        self.died.set()

    async def warm_up(self, request: Request) -> None:
        """Answers a request of the service's own, so that no caller pays for what the first one costs.

        It is excluded from metrics and from wait estimates. It queues behind earlier requests and is never refused for
        overload. Raises EngineFaultError when the model fails.
        """
        with self._submit(request) as generation:
            async for _ in generation:
                pass
        self.admission.pace = Pace()
        self.steps.commands.put(self.steps.forget_reuse)

    def observe(self, observer: Observer) -> None:
        """Has `observer` hear of each step from here on."""
        self.steps.commands.put(partial(self.steps.observe, observer))

    def abandon(self) -> None:
        """Tells every caller that there will be no answer, when the step thread hangs and never will."""
        for generation in self._roster:
            generation.fail(UnavailableError(STOPPED))

    # --- requests ---

    def check(self, identity: str, deadline: float | None = None) -> None:
        """Raises what `submit` would, at once and before there is a request to submit."""
        published = self.steps.published
        if published.stopping:
            raise UnavailableError(STOPPED)
        load = published.load
        self.admission.check(identity, load.room_for(identity), load.next_end, deadline)

    def submit(self, request: Request, deadline: float | None = None) -> Generation:
        """Starts a request that its caller gives `deadline` seconds, or as long as it takes.

        Raises OverloadedError when too much waits already, DeadlineError when the deadline is shorter than the
        estimated wait, UnavailableError after `stop`. None of these reaches the step thread.
        """
        self.check(request.identity, deadline)
        return self._submit(request)

    def _submit(self, request: Request) -> Generation:
        candidates = len(request.prompts) * request.best_of
        generation = Generation(candidates, self._abort, self.send_timeout, self._clock)
        self._roster.enter(generation, request.identity, _work(request))
        self.steps.commands.put(partial(self.steps.begin, request, generation))
        return generation

    def _abort(self, generation: Generation) -> None:
        if isinstance(generation.error, SlowReaderError):
            self._slow_readers += 1
            self._log.warning("a request is given up: its caller reads too slowly")
        self._roster.ended(generation)
        self.steps.commands.put(partial(self.steps.end, generation))

    # --- what it tells ---

    @property
    def turn(self) -> int | None:
        """The number of the step that is under way, if one is: the same number for long means that it hangs."""
        return self.steps.turns if self.steps.in_turn else None

    @property
    def stats(self) -> Stats:
        """How many sequences there were at the latest step."""
        load = self.steps.published.load
        return Stats(load.running, load.waiting)

    @property
    def requests(self) -> int:
        """How many requests have not ended."""
        return len(self._roster)

    @property
    def faults(self) -> Faults:
        """What went wrong since the start."""
        published = self.steps.published
        return Faults(published.failed_steps, published.not_finite, self._slow_readers)

    @property
    def reuse(self) -> Reuse:
        """What the cache has saved since the start."""
        return self.steps.published.reuse

    @property
    def admission(self) -> Admission:
        """Who may queue, and what was learnt of the engine's pace."""
        return self._roster.admission


def _work(request: Request) -> Iterator[Work]:
    """The work of each of a request's sequences; candidates of one prompt share its computation."""
    for prompt in request.prompts:
        for candidate in range(request.best_of):
            yield Work(1, 0 if candidate else len(prompt.token_ids), request.max_tokens)
