"""The event loop's half of the engine. The model runs on the step thread; see `steps`."""

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
from service.engine.published import RunningStep
from service.engine.roster import Roster
from service.engine.scheduler import Scheduler
from service.engine.steps import STOPPED, Steps
from service.errors import EngineDiedError, EngineFaultError, InvalidRequestError, SlowReaderError, UnavailableError
from service.telemetry.log import get_logger
from service.telemetry.observer import Observer
from service.text.tokenizer import Tokenizer
from service.types import Request

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Stats:
    """Sequences in the engine: `running` ones hold a slot of the KV cache, `waiting` ones do not yet."""

    running: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Faults:
    """Faults since the start.

    `failed_steps` counts calls of the model that failed, `not_finite` sequences whose logits were not finite numbers,
    and `slow_readers` requests that were ended because their callers read too slowly.
    """

    failed_steps: int = 0
    not_finite: int = 0
    slow_readers: int = 0


class Engine:
    """Continuous batching: requests join and leave between steps of the model.

    Only the event loop's thread uses it. `steps` is the step thread's half. Two queues join the halves, commands to the
    step thread and calls back to the event loop; the step thread also publishes one record that this half reads.
    `died` is set when an error has ended the step thread: this engine answers nothing from then on. `clock` counts
    seconds. A request whose caller takes no piece for `send_timeout` seconds, while pieces wait, is ended. `name` is
    the model's, for the log.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        max_waiting: int,
        max_queue_seconds: float = math.inf,
        max_waiting_tokens: float = math.inf,
        send_timeout: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        name: str = "",
    ) -> None:
        self.slots = scheduler.slots
        self.positions = scheduler.positions
        self.prompt_chunk = scheduler.prompt_chunk
        self.died = asyncio.Event()
        self._roster = Roster(Admission(max_waiting, max_queue_seconds, max_waiting_tokens))
        self.steps = Steps(model, tokenizer, scheduler, roster=self._roster, clock=clock, name=name)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.send_timeout = send_timeout
        self._clock = clock
        self._log = _log.bind(model=name)
        self._slow_readers = 0
        self._observer = Observer()

    def start(self, loop: asyncio.AbstractEventLoop, observer: Observer | None = None) -> None:
        """Starts the step thread. Pieces are delivered on `loop`, and steps are reported to `observer`."""
        self._observer = observer or self._observer
        self.steps.observe(self._observer)
        self.steps.post = loop.call_soon_threadsafe
        self._thread.start()

    def request_stop(self) -> None:
        """Ends unfinished requests with UnavailableError after the current step, and refuses new ones."""
        self.steps.commands.put(self.steps.stop)

    def stop(self) -> None:
        """Ends the step thread after its current step; unfinished requests end with UnavailableError."""
        self.request_stop()
        self._thread.join()
        self.steps.turn()  # refuses requests that arrived after the last step

    def _run(self) -> None:
        """The step thread."""
        try:
            self.steps.run()
        except Exception as error:
            self._log.critical("the engine has died", exc_info=True)
            assert self.steps.post is not None
            if not isinstance(error, EngineDiedError):  # which no single request has caused
                self.steps.post(self._blame_running)
            self.steps.post(self._end_dead_engine)

    def _end_dead_engine(self) -> None:
        """Ends every request after an error has ended the step thread, also those still in the queue to it."""
        self.stop()
        self.died.set()

    async def warm_up(self, request: Request) -> None:
        """Runs a request of the service's own, so that no caller waits for what happens only once.

        It is excluded from metrics and from wait estimates. It queues behind earlier requests and is never refused for
        overload. Raises EngineFaultError when the model fails.
        """
        self.steps.commands.put(partial(self.steps.observe, Observer()))
        with self._submit(request) as generation:
            async for _ in generation:
                pass
        self.steps.commands.put(partial(self.steps.observe, self._observer))
        self.admission.pace = Pace()
        self.steps.commands.put(self.steps.scheduler.forget_reuse)

    def abandon(self, *, hangs: bool) -> None:
        """Ends every request from the event loop, because the step thread of this engine or of another `hangs`.

        Those in a step that hangs get EngineFaultError, which asks for no retry, and all others UnavailableError.
        """
        if hangs:
            self._blame_running()
        for generation in self._roster:
            generation.fail(UnavailableError(STOPPED))

    def _blame_running(self) -> None:
        """Ends the requests in the running step: it may be one of them that ends the process, here and elsewhere."""
        running = self.steps.running
        for generation in running.requests if running else ():
            generation.fail(EngineFaultError("the process ends during a step with this request"))

    def check(self, identity: str, deadline: float | None = None, positions: float = 1, priority: int = 0) -> None:
        """Raises what `submit` would raise for a request of this caller, before the request is parsed.

        `positions` are what the request will take of the KV cache, as far as it is known.
        """
        published = self.steps.published
        if published.stopping:
            raise UnavailableError(STOPPED)
        self.admission.check(identity, published.load.space(identity), deadline, positions, priority=priority)

    def submit(self, request: Request, deadline: float | None = None) -> Generation:
        """Queues a request. `deadline` is the caller's, in seconds from now; None means no deadline.

        Raises InvalidRequestError when one of its sequences is larger than the whole KV cache, OverloadedError when the
        queue is too long, DeadlineError when the deadline is shorter than the estimated wait, UnavailableError after
        `stop`. A request that is refused never reaches the step thread.
        """
        longest = max(len(prompt.token_ids) for prompt in request.prompts) + request.max_tokens
        if longest > self.positions:
            message = (
                f"A prompt and its completion can have {self.positions} tokens together, because the KV cache has no"
                f" more positions; you asked for {longest}. Please shorten the prompt or max_tokens."
            )
            raise InvalidRequestError(message, param="prompt", code="context_length_exceeded")
        self.check(request.identity, deadline, longest, request.priority)
        return self._submit(request)

    def _submit(self, request: Request) -> Generation:
        candidates = len(request.prompts) * request.best_of
        generation = Generation(candidates, self._abort, self.send_timeout, self._clock)
        self._roster.enter(generation, request.identity, _work(request), request.priority)
        self.steps.commands.put(partial(self.steps.begin, request, generation))
        return generation

    def _abort(self, generation: Generation) -> None:
        if isinstance(generation.error, SlowReaderError):
            self._slow_readers += 1
            self._log.warning("a request was ended: its caller reads too slowly")
        self._roster.ended(generation)
        self.steps.commands.put(partial(self.steps.end, generation))

    @property
    def running_step(self) -> RunningStep | None:
        """The step that runs, or None between steps. The same one for longer than it is expected to take may hang."""
        return self.steps.running

    @property
    def free_positions(self) -> int:
        """The positions of the KV cache that no sequence held at the latest step."""
        return self.steps.published.load.positions

    @property
    def stats(self) -> Stats:
        """The numbers of sequences at the latest step."""
        load = self.steps.published.load
        return Stats(load.running, load.waiting)

    @property
    def requests(self) -> int:
        """How many requests have not ended."""
        return len(self._roster)

    @property
    def faults(self) -> Faults:
        """Faults since the start."""
        published = self.steps.published
        return Faults(published.failed_steps, published.not_finite, self._slow_readers)

    @property
    def reuse(self) -> Reuse:
        """Prompt tokens that the prefix cache has saved since the start."""
        return self.steps.published.reuse

    @property
    def admission(self) -> Admission:
        """The limits of the queue, and the measured pace of the engine."""
        return self._roster.admission


def _work(request: Request) -> Iterator[Work]:
    """The work of each of a request's sequences; the first candidate of a prompt does the prefill for all."""
    for prompt in request.prompts:
        for candidate in range(request.best_of):
            length = len(prompt.token_ids)
            yield Work(1, 0 if candidate else length, request.max_tokens, length + request.max_tokens)
