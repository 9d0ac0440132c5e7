"""The engine: owns the model on a thread of its own, and advances all requests together step by step."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service.engine.admission import Admission, Pace, Ticket, Work
from service.engine.cache import Reuse
from service.engine.commit import Committer
from service.engine.generation import Generation
from service.engine.ort.model import Model
from service.engine.sampler import Row, whole
from service.engine.scheduler import DecodeBatch, PromptChunk, Scheduler, Step
from service.engine.sequence import PromptGroup, Sequence
from service.errors import EngineDiedError, EngineFaultError, NotFiniteError, SlowReaderError, UnavailableError
from service.telemetry.log import get_logger
from service.telemetry.observer import Observer
from service.text.tokenizer import Tokenizer
from service.text.transcript import Transcript
from service.types import Delta, Request

_log = get_logger(__name__)

Command = Callable[[], None]

_STOPPED = "The service is stopping. Please retry: another instance may answer."
_GONE = "The model does not answer. Please retry: another instance may answer."
# Requests in a row that the model may fail on, and on the probe after each, before the engine counts as dead: memory
# that is short for a moment is no death.
_LAST_FAILURE = 3


@dataclass(frozen=True, slots=True)
class Stats:
    """Sequences in the engine: `running` hold a slot of keys and values, `waiting` do not yet."""

    running: int
    waiting: int


@dataclass(slots=True)
class Faults:
    """What went wrong since the start.

    Calls of the model that failed, sequences whose logits were not numbers, and requests whose callers read too slowly.
    """

    failed_steps: int = 0
    not_finite: int = 0
    slow_readers: int = 0


class Engine:
    """Continuous batching: requests join and leave between steps of the model.

    `died` is set when the step thread has ended by an error: there is no answer from this engine any more.

    The event loop's thread submits and aborts; the step thread plans, runs and commits, and sends each step's pieces
    back in one call. Only the step thread touches sequences, scheduler and model. `clock` counts seconds; a caller
    that takes nothing for `send_timeout` of them while pieces wait for it is given up. `observer` hears of each step.
    `name` is the model's, for the log.
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
        self._model = model
        self._log = _log.bind(model=name)
        self._committer = Committer(tokenizer)
        self._scheduler = scheduler
        # The event loop's thread alone knows who queues; the step thread tells it through the outbox.
        self._admission = Admission(max_waiting, max_queue_seconds)
        self._tickets: dict[Generation, Ticket] = {}
        self._send_timeout = send_timeout
        self._clock = clock
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._sequences: dict[Generation, set[Sequence]] = {}
        self._outbox: list[Command] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._post: Callable[..., object] | None = None
        self._turns = 0
        self._in_turn = False
        self._failures = 0
        self._sampled = 0
        self._gaps: list[float] = []
        self.observer = Observer()
        self.faults = Faults()
        self.died = asyncio.Event()

    # --- the event loop's side ---

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Starts the step thread; pieces are delivered on `loop`."""
        self.attach(loop.call_soon_threadsafe)
        self._thread.start()

    def attach(self, post: Callable[..., object]) -> None:
        """Has calls for the event loop's side go through `post`. Whoever calls `step` then is the step thread."""
        self._post = post

    def stop(self) -> None:
        """Ends the step thread after its current step; what is unfinished ends with UnavailableError."""
        self._commands.put(self._stop)
        self._thread.join()
        self._take_commands()
        self._flush()

    async def warm_up(self, request: Request) -> None:
        """Answers a request of the service's own, so that no caller pays for what the first one costs.

        Nothing is learnt or counted of it: its steps are no measure of those that follow. It waits behind whoever came
        before the service was ready, and is refused for nobody's sake. Raises EngineFaultError when the model fails.
        """
        with self._submit(request) as generation:
            async for _ in generation:
                pass
        self._admission.pace = Pace()
        self._commands.put(self._scheduler.forget_reuse)

    def abandon(self) -> None:
        """Tells every caller that there will be no answer, when the step thread hangs and never will."""
        for generation in list(self._sequences):
            generation.fail(UnavailableError(_STOPPED))

    @property
    def turn(self) -> int | None:
        """The number of the step that is under way, if one is: the same number for long means that it hangs."""
        return self._turns if self._in_turn else None

    @property
    def stats(self) -> Stats:
        """How many sequences there are at this moment."""
        return Stats(self._scheduler.running, self._scheduler.waiting)

    @property
    def slots(self) -> int:
        """How many sequences can run at once."""
        return self._scheduler.slots

    @property
    def prompt_chunk(self) -> int:
        """The most prompt tokens of a step."""
        return self._scheduler.prompt_chunk

    @property
    def reuse(self) -> Reuse:
        """What the cache has saved since the start."""
        return self._scheduler.reuse

    def check(self, identity: str, deadline: float | None = None) -> None:
        """Raises what `submit` would, at once and before there is a request to submit."""
        if self._stopping:
            raise UnavailableError(_STOPPED)
        self._admission.check(identity, self._scheduler.room(identity), self._scheduler.next_end(), deadline)

    def submit(self, request: Request, deadline: float | None = None) -> Generation:
        """Starts a request that its caller gives `deadline` seconds, or as long as it takes.

        Raises OverloadedError when too much waits already, DeadlineError when the deadline is shorter than the
        estimated wait, UnavailableError after `stop`. None of these reaches the step thread.
        """
        self.check(request.identity, deadline)
        return self._submit(request)

    def _submit(self, request: Request) -> Generation:
        candidates = len(request.prompts) * request.best_of
        generation = Generation(candidates, self._abort, self._send_timeout, self._clock)
        self._tickets[generation] = self._admission.enter(request.identity, _work(request))
        self._commands.put(lambda: self._begin_request(request, generation))
        return generation

    def _abort(self, generation: Generation) -> None:
        if isinstance(generation.error, SlowReaderError):
            self.faults.slow_readers += 1
            self._log.warning("a request is given up: its caller reads too slowly")
        self._leave_queue(generation)
        self._commands.put(lambda: self._end_request(generation))

    def _started(self, generation: Generation) -> None:
        generation.start()
        ticket = self._tickets.get(generation)
        if ticket is not None:
            self._admission.started(ticket)
            if not ticket.waiting:
                del self._tickets[generation]

    def _leave_queue(self, generation: Generation) -> None:
        ticket = self._tickets.pop(generation, None)
        if ticket is not None:
            self._admission.leave(ticket)

    def _bury(self) -> None:
        """After the step thread has died of an error: ends every request, also those that it has not seen."""
        self._thread.join()
        self._commands.put(self._stop)
        self._take_commands()
        self._flush()
        self.died.set()

    # --- the step thread's side ---

    def _run(self) -> None:
        try:
            while not self._stopping:
                if not (self._scheduler.running or self._scheduler.waiting):
                    self._commands.get()()
                self.step()
        except Exception:
            self._log.critical("the engine has died", exc_info=True)
            assert self._post is not None
            self._post(self._bury)

    def step(self) -> bool:
        """One turn: does what has been asked for, advances what is next, and sends the pieces.

        Returns whether anything advanced.
        """
        self._turns += 1
        self._in_turn = True
        self._take_commands()
        step = self._scheduler.schedule()
        if step is not None:
            self._advance(step)
        if self._sampled:
            self.observer.sampled(self._sampled, self._gaps)
            self._sampled, self._gaps = 0, []
        self._flush()
        self._in_turn = False
        return step is not None

    def _take_commands(self) -> None:
        """Runs what has been asked for."""
        try:
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _stop(self) -> None:
        self._stopping = True
        for generation in list(self._sequences):
            self._fail(generation, UnavailableError(_STOPPED))

    def _begin_request(self, request: Request, generation: Generation) -> None:
        if self._stopping:
            self._outbox.append(lambda: generation.fail(UnavailableError(_STOPPED)))
            return
        sequences = []
        for prompt_index, prompt in enumerate(request.prompts):
            group = PromptGroup(prompt, unstarted=request.best_of)
            for candidate in range(request.best_of):
                transcript = Transcript(request.stop, len(prompt.text), prompt.tail)
                tokens = list(prompt.token_ids)
                sequences.append(Sequence(request, generation, group, prompt_index, candidate, transcript, tokens))
        self._sequences[generation] = set(sequences)
        if request.max_tokens or sequences[0].scores_prompt:
            self._scheduler.add(sequences)
            return
        self._outbox.append(lambda: self._leave_queue(generation))
        for sequence in sequences:
            self._send(sequence, self._committer.begin(sequence))

    def _end_request(self, generation: Generation) -> None:
        """Ends a request's sequences, highest slot first: no hole is filled by one that is to end as well."""
        members = self._sequences.pop(generation, set())
        for sequence in sorted(members, key=lambda each: -1 if each.slot is None else each.slot, reverse=True):
            self._model.copy(self._scheduler.remove(sequence))

    def _fail(self, generation: Generation, error: Exception) -> None:
        for sequence in self._sequences.get(generation, ()):
            self._scheduler.forget(sequence)
        self._end_request(generation)
        self._outbox.append(lambda: self._leave_queue(generation))
        self._outbox.append(lambda: generation.fail(error))

    def _advance(self, step: Step) -> None:
        """Runs one step. Of a batch that fails each row is tried alone: only what fails by itself ends its request.

        Raises EngineDiedError when the model fails on everything.
        """
        sequences = [step.sequence] if isinstance(step, PromptChunk) else [row for row in step.rows if row is not None]
        began = self._clock()
        try:
            if isinstance(step, PromptChunk):
                self._advance_prompt(step)
            else:
                self._advance_decode(step)
            self._learn(step, len(sequences), self._clock() - began)
            if not isinstance(step, PromptChunk) or step.start < step.end:  # else the model had no part in it
                self._failures = 0
        except Exception as error:
            self._note(error)
            self._log.exception("a step of the model failed", rows=len(sequences))
            if len(sequences) == 1:
                self._fail(sequences[0].generation, self._blame(sequences[0]))
                return
            for sequence in sequences:
                if sequence.slot is not None:  # else a sibling's fault has ended it, or its own last token
                    self._advance(DecodeBatch((None,) * sequence.slot + (sequence,)))

    def _blame(self, sequence: Sequence) -> Exception:
        """What to tell the request that the model has just failed on: its own fault, unless the model fails without it.

        Raises EngineDiedError when the model has done so for some requests in a row.
        """
        assert sequence.slot is not None
        try:
            self._model.probe(sequence.slot)
        except Exception as error:
            self._failures += 1
            if self._failures == _LAST_FAILURE:
                raise EngineDiedError(f"the model has failed on {_LAST_FAILURE} requests, and without any") from error
            return UnavailableError(_GONE)
        self._failures = 0
        return EngineFaultError("the model failed")

    def _note(self, error: Exception) -> None:
        """Counts a fault."""
        if isinstance(error, NotFiniteError):
            self.faults.not_finite += 1
        else:
            self.faults.failed_steps += 1

    def _learn(self, step: Step, rows: int, seconds: float) -> None:
        pace = self._admission.pace
        if isinstance(step, DecodeBatch):
            self.observer.decode_step(rows, seconds)
            self._outbox.append(lambda: pace.step(rows, seconds))
        elif step.start < step.end:
            self.observer.prompt_step(seconds)
            self._outbox.append(lambda: pace.chunk(step.end - step.start, seconds))

    def _advance_prompt(self, chunk: PromptChunk) -> None:
        sequence, group = chunk.sequence, chunk.sequence.group
        if chunk.start == sequence.cached:
            self._outbox.append(lambda: self._started(sequence.generation))
            self._flush()  # who comes meanwhile waits for this prompt no longer than for any step
        self._model.copy(chunk.copies)
        logits: Row = group.logits
        if chunk.start < chunk.end:
            length = chunk.end - chunk.start
            wanted = range(length) if sequence.scores_prompt else range(length - 1, length)
            tokens = sequence.tokens[chunk.start : chunk.end]
            assert sequence.slot is not None
            rows = self._model.forward(sequence.slot, [tokens], [chunk.start], [(0, at) for at in wanted])
            if sequence.scores_prompt:
                self._committer.score_prompt(sequence, rows)
            logits = rows[-1]
        self._scheduler.commit_chunk(chunk)
        if chunk.end == sequence.prompt_length:
            if group.unstarted == sequence.request.best_of:
                self.observer.prompt_read(chunk.end)
            group.unstarted -= 1
            group.logits = whole(logits).copy() if group.unstarted else None
            self._send(sequence, self._committer.begin(sequence))
            if sequence.request.max_tokens:
                self._commit(sequence, logits)

    def _advance_decode(self, batch: DecodeBatch) -> None:
        tokens = [row.tokens[-1:] if row else [] for row in batch.rows]
        past = [row.computed if row else 0 for row in batch.rows]
        decoding = [(index, row) for index, row in enumerate(batch.rows) if row is not None]
        logits = self._model.forward(0, tokens, past, [(index, 0) for index, _ in decoding])
        for _, sequence in decoding:
            sequence.computed += 1
        for row, (_, sequence) in enumerate(decoding):
            self._commit(sequence, logits[row])

    def _commit(self, sequence: Sequence, logits: Row) -> None:
        """Advances one sequence by its logits; a fault of its own ends its request alone."""
        if sequence.finished:  # a sibling's fault, earlier in this step, ended the request
            return
        try:
            delta = self._committer.advance(sequence, logits)
            self._time_token(sequence)
            self._send(sequence, delta)
        except Exception as error:
            self._note(error)
            self._log.exception("a sequence failed", request_id=sequence.request.id)
            self._fail(sequence.generation, EngineFaultError("the model failed"))

    def _time_token(self, sequence: Sequence) -> None:
        now = self._clock()
        if sequence.sampled_at is not None:
            self._gaps.append(now - sequence.sampled_at)
        sequence.sampled_at = now
        self._sampled += 1

    def _send(self, sequence: Sequence, delta: Delta | None) -> None:
        """Notes a piece for the caller; with its last piece a sequence gives its slot back."""
        if delta is None:
            return
        self._outbox.append(lambda: sequence.generation.deliver(delta))
        if delta.finish_reason is not None:
            generated, allowed = sequence.generated, sequence.request.max_tokens
            self._outbox.append(lambda: self._admission.pace.ended(generated, allowed))
            self._model.copy(self._scheduler.remove(sequence))
            members = self._sequences[sequence.generation]
            members.discard(sequence)
            if not members:
                del self._sequences[sequence.generation]

    def _flush(self) -> None:
        """Sends everything of this step to the event loop in one call."""
        if self._outbox:
            outbox, self._outbox = self._outbox, []
            assert self._post is not None
            self._post(_run_all, outbox)


def _work(request: Request) -> Iterator[Work]:
    """The work of each of a request's sequences; candidates of one prompt share its computation."""
    for prompt in request.prompts:
        for candidate in range(request.best_of):
            yield Work(1, 0 if candidate else len(prompt.token_ids), request.max_tokens)


def _run_all(commands: list[Command]) -> None:
    for command in commands:
        command()
