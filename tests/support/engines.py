"""Running engines over the fake model, and what to look at in them."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import asynccontextmanager
from dataclasses import replace

from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.engine import Engine, Stats
from service.engine.scheduler import Scheduler
from tests.support.fakes import FakeModel, ids
from tests.support.patience import PATIENCE, eventually_async


class GatedModel(FakeModel):
    """A fake model that takes a step only when `gate` allows one."""

    def __init__(self, slots=4):
        super().__init__(slots)
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)

    def forward(self, *arguments):
        self.entered.release()
        assert self.gate.acquire(timeout=PATIENCE)
        return super().forward(*arguments)

    async def reached(self):
        """Waits until a step has begun; it ends when `gate` is released."""
        assert await asyncio.to_thread(self.entered.acquire, timeout=PATIENCE)


@asynccontextmanager
async def running(tokenizer, model=None, *, max_waiting=1000, positions=sys.maxsize, share=None, exact=False, **limits):
    """An engine over a fake model, with memory for that many positions, or a share of some."""
    model = model or FakeModel()
    scheduler = Scheduler(KVCache(len(model.slots), share or Share(Budget(positions)), exact=exact), 16)
    engine = Engine(model, tokenizer, scheduler, max_waiting=max_waiting, **limits)
    engine.start(asyncio.get_running_loop())
    engine.fake = model
    try:
        yield engine
    finally:
        if isinstance(model, GatedModel):
            model.gate.release(1000)
        engine.stop()


async def collect(engine, made):
    """All pieces of a request by (prompt, candidate)."""
    pieces = {}
    with engine.submit(made) as generation:
        async for delta in generation:
            pieces.setdefault((delta.prompt_index, delta.candidate), []).append(delta)
    return pieces


async def texts(engine, made):
    """The texts of a request's choices, in order; each must end with exactly one finishing piece."""
    pieces = await collect(engine, made)
    for deltas in pieces.values():
        assert [delta.finish_reason is not None for delta in deltas] == [False] * (len(deltas) - 1) + [True]
    return ["".join(delta.text for delta in pieces[key]) for key in sorted(pieces)]


def busy(engine):
    """Makes an engine look full: no slot before three more steps, each of which takes minutes."""
    engine.admission.pace.step(1, PATIENCE)
    engine.admission.enter("another", [])
    load = replace(engine.steps.published.load, room=0, first_room=0, ends=((3, 1),))
    engine.steps.scheduler.load = lambda: load
    engine.steps.published = replace(engine.steps.published, load=load)


async def settled(engine):
    """Waits until the engine has nothing left, and checks that it keeps nothing of what has ended."""
    await eventually_async(
        lambda: engine.stats == Stats(0, 0) and not (engine.steps.sequences or engine.requests), lambda: engine.stats
    )


def check_histories(model, *prompts):
    """Every row was computed behind a beginning of a prompt, or behind a prompt and the letters that follow it."""
    for history in model.histories:
        assert any(
            history == tuple(ids(prompt))[: len(history)]
            or (
                history[: len(prompt)] == tuple(ids(prompt))
                and all(
                    (b - a) % 26 == 1 for a, b in zip(history[len(prompt) - 1 :], history[len(prompt) :], strict=False)
                )
            )
            for prompt in prompts
        ), history
