"""The step thread's half of the engine: schedules a step, runs the model, samples, and commits."""

from __future__ import annotations

import queue
from collections.abc import Callable
from functools import partial

from service.engine.commit import Committer
from service.engine.generation import Generation
from service.engine.ort.model import Model
from service.engine.published import Published, RunningStep
from service.engine.roster import Roster
from service.engine.sampler import Row, whole
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence, sequences_of
from service.engine.step import DecodeBatch, PromptChunk, Step
from service.engine.token_timer import TokenTimer
from service.errors import EngineDiedError, EngineFaultError, NotFiniteError, UnavailableError
from service.telemetry.log import get_logger
from service.telemetry.observer import Observer
from service.text.tokenizer import Tokenizer
from service.types import Delta, Request

_log = get_logger(__name__)

Command = Callable[[], None]

STOPPED = "The service is stopping. Please retry: another instance may answer."
_GONE = "The model does not answer. Please retry: another instance may answer."
# When the model has failed on this many requests in a row, and on the probe after each, the engine counts as dead.
# It is more than one, because memory can be short for a moment.
_MAX_FAILURES = 3


class Steps:
    """Advances all sequences together, step by step.

    Only the step thread calls its methods: `run`, and the commands that the event loop puts into `commands`; after the
    thread has ended, `Engine.stop` calls `turn` once. At the end of a turn it posts one call to the event loop with the
    results of the turn, and before the first chunk of a prompt one more. Other threads may read `published`, `running`
    (the step that runs) and `turns` (how many turns there were), and nothing else.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        *,
        roster: Roster,
        clock: Callable[[], float],
        name: str,
    ) -> None:
        self.commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self.post: Callable[..., object] | None = None
        self._observer = Observer()
        self._timer = TokenTimer(clock)
        self._model = model
        self.scheduler = scheduler
        self._committer = Committer(tokenizer)
        self._roster = roster  # used only on the event loop, here by calls in the outbox
        self._clock = clock
        self._log = _log.bind(model=name)
        self._sequences: dict[Generation, set[Sequence]] = {}
        self._outbox: list[Command] = []
        self._stopping = False
        self.running: RunningStep | None = None
        self.turns = 0
        self._failures = 0
        self._failed_steps = 0
        self._not_finite = 0
        scheduler.connect(
            wake=lambda: self.commands.put(lambda: None),  # which only ends a wait for commands
            evict=lambda: self.commands.put(lambda: model.copy(scheduler.evict())),
        )
        self._publish()

    def run(self) -> None:
        """Takes turns until `stop`; waits for a command while there is no step to take."""
        while not self._stopping:
            if not self.turn() and not self._stopping:
                self.commands.get()()
        self.turn()  # refuses requests that came with the stop

    def turn(self) -> bool:
        """Runs the waiting commands, then one step, and posts the pieces to the event loop.

        Returns whether there was a step. After `stop` a turn only refuses requests that arrived too late.
        """
        self.turns += 1
        self.running = None
        self._take_commands()
        step = None if self._stopping else self.scheduler.schedule(self._clock())
        if step is not None:
            self._publish()
            self.advance(step)
            self.running = None
        self._timer.report(self._observer)
        self._publish()
        self._flush()
        return step is not None

    def _take_commands(self) -> None:
        try:
            while True:
                self.commands.get_nowait()()
        except queue.Empty:
            return

    def _flush(self) -> None:
        """Posts everything of this step to the event loop in one call."""
        if self._outbox:
            assert self.post is not None
            outbox, self._outbox = self._outbox, []
            self.post(_run_all, outbox)

    def _publish(self) -> None:
        load, reuse = self.scheduler.load(), self.scheduler.reuse
        self.published = Published(load, reuse, self._failed_steps, self._not_finite, self._stopping)

    def begin(self, request: Request, generation: Generation) -> None:
        """Makes a request's sequences and queues them."""
        if self._stopping:
            self._outbox.append(partial(generation.fail, UnavailableError(STOPPED)))
            return
        sequences = sequences_of(request, generation)
        self._sequences[generation] = set(sequences)
        needing = [sequence for sequence in sequences if request.max_tokens or sequence.needs_prompt_scores]
        complete = [] if request.max_tokens else [each for each in sequences if not each.needs_prompt_scores]
        if needing:
            self.scheduler.add(needing)
        for sequence in complete:
            self.send(sequence, self._committer.begin(sequence))

    def end(self, generation: Generation) -> None:
        """Removes a request's sequences, highest slot first, so that none is moved before it is removed."""
        members = self._sequences.pop(generation, set())
        for sequence in sorted(members, key=lambda member: -1 if member.slot is None else member.slot, reverse=True):
            self._model.copy(self.scheduler.remove(sequence))

    def stop(self) -> None:
        """Ends every request with UnavailableError, and refuses new ones from then on."""
        self._stopping = True
        for generation in list(self._sequences):
            self.fail(generation, UnavailableError(STOPPED))

    def observe(self, observer: Observer) -> None:
        """Reports every step to `observer` from now on."""
        self._observer = observer

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [sequence for members in self._sequences.values() for sequence in members]

    def advance(self, step: Step) -> None:
        """Runs one step. When a batch fails, each of its rows is run by itself, and only rows that fail again end.

        Raises EngineDiedError when the model fails on every request.
        """
        sequences, work = step.sequences, step.work
        requests = (sequence.generation for sequence in sequences)
        self.running = RunningStep(tuple(requests), self.scheduler.times.expected(work))
        began = self._clock()
        try:
            if isinstance(step, PromptChunk):
                self._advance_prompt(step)
            else:
                self._advance_decode(step)
            if work:  # else the model was not called
                self._measure(step, work, self._clock() - began)
                self._failures = 0
        except Exception as error:
            self._note(error)
            self._log.exception("a step of the model failed", rows=len(sequences))
            if len(sequences) == 1:
                self.fail(sequences[0].generation, self.error_for(sequences[0]))
                return
            for sequence in sequences:
                if sequence.slot is not None:  # else it has ended: by a sibling's fault, or by its last token
                    self.advance(DecodeBatch((None,) * sequence.slot + (sequence,)))

    def error_for(self, sequence: Sequence) -> Exception:
        """The error for a request on which the model has just failed.

        A probe of one token decides: if the model runs it, the fault is the request's (EngineFaultError), else the
        model's (UnavailableError). Raises EngineDiedError when the probes of several requests in a row have failed.
        """
        assert sequence.slot is not None
        try:
            self._model.probe(sequence.slot)
        except Exception as error:
            self._failures += 1
            if self._failures == _MAX_FAILURES:
                raise EngineDiedError(
                    f"the model has failed on {_MAX_FAILURES} requests in a row, and on a probe after each"
                ) from error
            return UnavailableError(_GONE)
        self._failures = 0
        return EngineFaultError("the model failed")

    def fail(self, generation: Generation, error: Exception) -> None:
        """Ends a request with `error`; nothing that was computed for it stays in the prefix cache."""
        for sequence in self._sequences.get(generation, ()):
            self.scheduler.forget(sequence)
        self.end(generation)
        self._outbox.append(partial(self._roster.ended, generation))
        self._outbox.append(partial(generation.fail, error))

    def send(self, sequence: Sequence, delta: Delta | None) -> None:
        """Puts a piece into the outbox; with its last piece a sequence gives its slot back."""
        if delta is None:
            return
        self._outbox.append(partial(sequence.generation.deliver, delta))
        if delta.finish_reason is not None:
            generated, allowed = sequence.generated, sequence.request.max_tokens
            self._outbox.append(lambda: self._roster.admission.pace.ended(generated, allowed))
            self._model.copy(self.scheduler.remove(sequence))
            members = self._sequences[sequence.generation]
            members.discard(sequence)
            if not members:
                del self._sequences[sequence.generation]
                self._outbox.append(partial(self._roster.ended, sequence.generation))

    def _note(self, error: Exception) -> None:
        """Counts a fault."""
        if isinstance(error, NotFiniteError):
            self._not_finite += 1
        else:
            self._failed_steps += 1

    def _measure(self, step: Step, work: float, seconds: float) -> None:
        """Reports the time of a step to the observer, the scheduler and admission."""
        if isinstance(step, PromptChunk):
            self._observer.prefill_step(seconds)
            self.scheduler.times.prefill(work, seconds)
            self._outbox.append(lambda: self._roster.admission.pace.chunk(step.end - step.start, seconds))
        else:
            rows = len(step.sequences)
            self._observer.decode_step(rows, seconds)
            self.scheduler.times.decode(work, seconds)
            self._outbox.append(lambda: self._roster.admission.pace.step(rows, seconds))

    def _advance_prompt(self, chunk: PromptChunk) -> None:
        sequence, group = chunk.sequence, chunk.sequence.group
        if chunk.start == sequence.cached:
            self._outbox.append(partial(self._roster.started, sequence.generation))
            self._flush()  # so that admission knows during the prefill that this slot is taken
        self._model.copy(chunk.copies)
        logits: Row = group.logits
        if chunk.start < chunk.end:
            length = chunk.end - chunk.start
            scoring = sequence.needs_prompt_scores
            first = min(max(0, sequence.first_unscored - 1 - chunk.start), length - 1) if scoring else length - 1
            tokens = sequence.tokens[chunk.start : chunk.end]
            assert sequence.slot is not None
            rows = self._model.forward(sequence.slot, [tokens], [chunk.start], [(0, at) for at in range(first, length)])
            if scoring:
                self._committer.score_prompt(sequence, rows, chunk.start + first + 1)
            logits = rows[-1]
        self.scheduler.commit_chunk(chunk)
        if chunk.end == sequence.prompt_length:
            if group.unstarted == sequence.request.best_of:
                self._observer.prefill_ended(chunk.end)
            group.unstarted -= 1
            group.logits = whole(logits).copy() if group.unstarted else None
            self.send(sequence, self._committer.begin(sequence))
            self._outbox.append(sequence.generation.prefilled)
            if sequence.request.max_tokens:
                self._commit(sequence, logits)

    def _advance_decode(self, batch: DecodeBatch) -> None:
        tokens = [row.tokens[-1:] if row else [] for row in batch.rows]
        past = [row.computed if row else 0 for row in batch.rows]
        decoding = [(index, row) for index, row in enumerate(batch.rows) if row is not None]
        logits = self._model.forward(0, tokens, past, [(index, 0) for index, _ in decoding])
        self.scheduler.commit_batch(batch)
        for row, (_, sequence) in enumerate(decoding):
            self._commit(sequence, logits[row])

    def _commit(self, sequence: Sequence, logits: Row) -> None:
        """Samples one sequence's next token. An error here ends this request, and no other."""
        if sequence.finished:  # a fault of a sibling has ended the request earlier in this step
            return
        try:
            delta = self._committer.advance(sequence, logits)
            self._timer.sampled(sequence)
            self.send(sequence, delta)
        except Exception as error:
            self._note(error)
            self._log.exception("a sequence failed", request_id=sequence.request.id)
            self.fail(sequence.generation, EngineFaultError("the model failed"))


def _run_all(commands: list[Command]) -> None:
    for command in commands:
        command()
