"""Small mistakes of each part of the engine, which the simulation must find."""

from __future__ import annotations

from dataclasses import replace

from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.engine.step import DecodeBatch
from service.engine.steps import Steps
from service.errors import EngineDiedError


class KeepsSlots(Scheduler):
    """Forgets to give a slot back."""

    def remove(self, sequence):
        if sequence.slot is None or sequence.generated % 7:
            return super().remove(sequence)
        sequence.finished = True
        return ()


class KeepsPrompting(Scheduler):
    """Goes on with the prompt of a caller who has left."""

    def remove(self, sequence):
        caller = self._callers.get(sequence.request.identity)
        left = caller is not None and caller.prompting is sequence
        copies = super().remove(sequence)
        if left:
            self._callers[sequence.request.identity] = caller
            caller.prompting = sequence
        return copies


class KeepsQueued(Scheduler):
    """Leaves those in the queue who have gone."""

    def remove(self, sequence):
        if sequence.slot is None:
            sequence.finished = True
            return ()
        return super().remove(sequence)


class LastFirst(Scheduler):
    """Serves of each caller what came last."""

    def schedule(self, now=0.0):
        for caller in self._callers.values():
            caller.waiting.reverse()
        step = super().schedule(now)
        for caller in self._callers.values():
            caller.waiting.reverse()
        return step


class DecodesForever(Scheduler):
    """Admits no request while any is running."""

    def schedule(self, now=0.0):
        self._decode_next = True
        return super().schedule(now)


class SkipsARow(Scheduler):
    """Never advances the second slot beside the first."""

    def schedule(self, now=0.0):
        step = super().schedule(now)
        if not isinstance(step, DecodeBatch) or step.rows[0] is None or not any(step.rows[1:]):
            return step
        return DecodeBatch((step.rows[0], None, *step.rows[2:]))


class IgnoresIdentity(KVCache):
    """Reuses what others have asked."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        for slot in self._slots:
            slot.identity = identity
        return super().allocate(tokens, identity, recompute, positions, wanted)


class ReusesTooMuch(KVCache):
    """Takes one position more for common than is."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        allocation = super().allocate(tokens, identity, recompute, positions, wanted)
        more = allocation is not None and 0 < allocation.cached < len(tokens) - recompute
        return replace(allocation, cached=allocation.cached + 1) if more else allocation


class ReusesTheLastToken(KVCache):
    """Takes the token that was chosen last for computed."""

    def record(self, slot, valid):
        super().record(slot, min(valid + 1, len(self._slots[slot].tokens)))


class ReusesGenerated(KVCache):
    """Takes what was generated for exact whatever the model."""

    def __init__(self, slots, share, *, exact):
        super().__init__(slots, share, exact=True)


class ScoresOfTheNext(KVCache):
    """Keeps the scores of tokens with those before them."""

    def allocate(self, tokens, identity, recompute, positions, wanted):
        allocation = super().allocate(tokens, identity, recompute, positions, wanted)
        if allocation is not None and allocation.scores:
            allocation.scores[:] = [*allocation.scores[1:], allocation.scores[-1]]
        return allocation


class MovesWithoutCopy(KVCache):
    """Fills a hole among the slots without their contents."""

    def release(self, slot, last_length):
        super().release(slot, last_length)
        return ()


class CopiesTooLittle(KVCache):
    """Loses the last position of what it moves."""

    def release(self, slot, last_length):
        return super().release(slot, last_length - 1)


class EvictsNothing(KVCache):
    """Keeps all prefixes, whoever needs their memory."""

    def _give_up(self, positions, but=-1):
        return [], positions


class GivesNothingBack(KVCache):
    """Keeps the memory of what ended sequences have generated."""

    def release(self, slot, last_length):
        return tuple(copy for copy in super().release(slot, last_length) if copy.source != copy.target)


class Overtakes(Scheduler):
    """Admits whoever fits beside a sequence that does not fit yet."""

    def schedule(self, now=0.0):
        self._blocked = None
        return super().schedule(now)


class SaysNothingOfFaults(Steps):
    """Ends a request that fails without a word."""

    def fail(self, generation, error):
        self.end(generation)


class SaysItTwice(Steps):
    """Sends a request's last piece again."""

    def send(self, sequence, delta):
        super().send(sequence, delta)
        if delta is not None and delta.finish_reason is not None:
            self._outbox.append(lambda: sequence.generation.deliver(delta))


class FailsTheBatch(Steps):
    """Ends all that was in a step that failed."""

    def advance(self, step):
        rows = step.rows if isinstance(step, DecodeBatch) else (step.sequence,)
        failed = self._failed_steps
        super().advance(step)
        if self._failed_steps > failed:
            for row in rows:
                if row is not None:
                    self.fail(row.generation, RuntimeError("a neighbour failed"))


class ServesOn(Steps):
    """Takes a model that fails on everything for requests that are at fault."""

    def error_for(self, sequence):
        self._failures = 0
        return super().error_for(sequence)


class DiesOfOne(Steps):
    """Takes a request that the model fails on for a model that is gone."""

    def error_for(self, sequence):
        raise EngineDiedError("a request failed")


class BeginsAfterTheEnd(Steps):
    """Takes in requests after its stop."""

    def begin(self, request, generation):
        stopping, self._stopping = self._stopping, False
        super().begin(request, generation)
        self._stopping = stopping


class TakesNothingBack(Engine):
    """Does not hear that a caller leaves."""

    def _abort(self, generation):
        pass


class KeepsRequests(Engine):
    """Keeps a reference to every request."""

    def submit(self, request):
        generation = super().submit(request)
        self.seen = [*getattr(self, "seen", []), generation]
        return generation
