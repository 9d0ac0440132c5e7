"""The step thread's half of the engine: plans a step, runs the model, samples, and commits."""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from service.engine.cache import Reuse
from service.engine.commit import Committer
from service.engine.generation import Generation
from service.engine.ort.model import Model
from service.engine.roster import Roster
from service.engine.sampler import Row, whole
from service.engine.scheduler import DecodeBatch, Load, PromptChunk, Scheduler, Step
from service.engine.sequence import PromptGroup, Sequence
from service.errors import EngineDiedError, EngineFaultError, NotFiniteError, UnavailableError
from service.telemetry.log import get_logger
from service.telemetry.observer import Observer
from service.text.tokenizer import Tokenizer
from service.text.transcript import Transcript
from service.types import Delta, Request

_log = get_logger(__name__)

Command = Callable[[], None]

STOPPED = "The service is stopping. Please retry: another instance may answer."
_GONE = "The model does not answer. Please retry: another instance may answer."
# Requests in a row that the model may fail on, and on the probe after each, before the engine counts as dead: memory
# that is short for a moment is no death.
_LAST_FAILURE = 3


@dataclass(frozen=True, slots=True)
class Published:
    """What the step thread lets other threads know: a new record with every step."""

    load: Load
    reuse: Reuse
    failed_steps: int
    not_finite: int
    stopping: bool


class Steps:
    """Advances all sequences together, step by step.

    Only the step thread calls its methods: `run`, and whatever the event loop puts into `commands`. What the event loop
    has to do with the results of a turn is posted in one call at the turn's end. Other threads may read `published`,
    `turns` (how many there have been) and `in_turn`, and nothing else.
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
        self._model = model
        self.scheduler = scheduler
        self._committer = Committer(tokenizer)
        self._roster = roster  # the event loop's: what concerns it goes through the outbox
        self._clock = clock
        self._log = _log.bind(model=name)
        self._sequences: dict[Generation, set[Sequence]] = {}
        self._outbox: list[Command] = []
        self._stopping = False
        self.turns = 0
        self.in_turn = False
        self._failures = 0
        self._failed_steps = 0
        self._not_finite = 0
        self._sampled = 0
        self._gaps: list[float] = []
        self._publish()

    # --- turns ---

    def run(self) -> None:
        """Takes turns until `stop`, and waits for a command whenever there is nothing to do."""
        while not self._stopping:
            if not (self.scheduler.running or self.scheduler.waiting):
                self.commands.get()()
            self.turn()

    def turn(self) -> bool:
        """Does what has been asked for, advances what is next, and sends the pieces.

        Returns whether anything advanced. After `stop` it only refuses what has come too late.
        """
        self.turns += 1
        self.in_turn = True
        self._take_commands()
        step = None if self._stopping else self.scheduler.schedule()
        if step is not None:
            self._publish()
            self.advance(step)
        if self._sampled:
            self._observer.sampled(self._sampled, self._gaps)
            self._sampled, self._gaps = 0, []
        self._publish()
        self._flush()
        self.in_turn = False
        return step is not None

    def _take_commands(self) -> None:
        try:
            while True:
                self.commands.get_nowait()()
        except queue.Empty:
            return

    def _flush(self) -> None:
        """Sends everything of this step to the event loop in one call."""
        if self._outbox:
            assert self.post is not None
            outbox, self._outbox = self._outbox, []
            self.post(_run_all, outbox)

    def _publish(self) -> None:
        self.published = Published(
            self.scheduler.load(),
            self.scheduler.reuse,
            self._failed_steps,
            self._not_finite,
            self._stopping,
        )

    # --- commands ---

    def begin(self, request: Request, generation: Generation) -> None:
        """Takes in a request."""
        if self._stopping:
            self._outbox.append(partial(generation.fail, UnavailableError(STOPPED)))
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
            self.scheduler.add(sequences)
            return
        for sequence in sequences:
            self.send(sequence, self._committer.begin(sequence))

    def end(self, generation: Generation) -> None:
        """Ends a request's sequences, highest slot first: no hole is filled by one that is to end as well."""
        members = self._sequences.pop(generation, set())
        for sequence in sorted(members, key=lambda each: -1 if each.slot is None else each.slot, reverse=True):
            self._model.copy(self.scheduler.remove(sequence))

    def stop(self) -> None:
        """Ends every request with UnavailableError, and takes in no other."""
        self._stopping = True
        for generation in list(self._sequences):
            self.fail(generation, UnavailableError(STOPPED))

    def observe(self, observer: Observer) -> None:
        """Has `observer` hear of each step from here on."""
        self._observer = observer

    def forget_reuse(self) -> None:
        """Counts what the cache saves from here on."""
        self.scheduler.forget_reuse()

    # --- what there is ---

    @property
    def sequences(self) -> list[Sequence]:
        """Every sequence that has not ended."""
        return [sequence for members in self._sequences.values() for sequence in members]

    def sequences_of(self, generation: Generation) -> frozenset[Sequence]:
        """Those of one request that have not ended."""
        return frozenset(self._sequences.get(generation, ()))

    # --- one step ---

    def advance(self, step: Step) -> None:
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
                self.fail(sequences[0].generation, self.blame(sequences[0]))
                return
            for sequence in sequences:
                if sequence.slot is not None:  # else a sibling's fault has ended it, or its own last token
                    self.advance(DecodeBatch((None,) * sequence.slot + (sequence,)))

    def blame(self, sequence: Sequence) -> Exception:
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

    def fail(self, generation: Generation, error: Exception) -> None:
        """Ends a request with `error`; nothing is reused of what was computed for it."""
        for sequence in self._sequences.get(generation, ()):
            self.scheduler.forget(sequence)
        self.end(generation)
        self._outbox.append(partial(self._roster.ended, generation))
        self._outbox.append(partial(generation.fail, error))

    def send(self, sequence: Sequence, delta: Delta | None) -> None:
        """Notes a piece for the caller; with its last piece a sequence gives its slot back."""
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

    def _learn(self, step: Step, rows: int, seconds: float) -> None:
        if isinstance(step, DecodeBatch):
            self._observer.decode_step(rows, seconds)
            self._outbox.append(lambda: self._roster.admission.pace.step(rows, seconds))
        elif step.start < step.end:
            self._observer.prompt_step(seconds)
            self._outbox.append(lambda: self._roster.admission.pace.chunk(step.end - step.start, seconds))

    def _advance_prompt(self, chunk: PromptChunk) -> None:
        sequence, group = chunk.sequence, chunk.sequence.group
        if chunk.start == sequence.cached:
            self._outbox.append(partial(self._roster.started, sequence.generation))
            self._flush()  # arrivals during the prefill are to be estimated with this slot taken
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
        self.scheduler.commit_chunk(chunk)
        if chunk.end == sequence.prompt_length:
            if group.unstarted == sequence.request.best_of:
                self._observer.prompt_read(chunk.end)
            group.unstarted -= 1
            group.logits = whole(logits).copy() if group.unstarted else None
            self.send(sequence, self._committer.begin(sequence))
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
            self.send(sequence, delta)
        except Exception as error:
            self._note(error)
            self._log.exception("a sequence failed", request_id=sequence.request.id)
            self.fail(sequence.generation, EngineFaultError("the model failed"))

    def _time_token(self, sequence: Sequence) -> None:
        now = self._clock()
        if sequence.sampled_at is not None:
            self._gaps.append(now - sequence.sampled_at)
        sequence.sampled_at = now
        self._sampled += 1


def _run_all(commands: list[Command]) -> None:
    for command in commands:
        command()
