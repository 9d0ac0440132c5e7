"""Fills all slots of all engines, and prints the memory that this takes. Takes the service's flags."""

from __future__ import annotations

import asyncio
import json
import os
import sys

from bench.processes import memory
from service import settings
from service.serving import models
from service.telemetry import log
from service.types import Prompt
from tests.support.engines import collect
from tests.support.fakes import request

GENERATED = 8


async def fill(served):
    """As many sequences as there are slots, each as long as the context, with scores for every token."""
    engine = served.engine
    length = served.limits.context_length - GENERATED
    prompt = Prompt(tuple(range(1000, 1000 + length)), "")
    engine.start(asyncio.get_running_loop())
    slots = engine.slots
    asked = request(prompt, n=slots, max_tokens=GENERATED, echo=True, logprobs=5, stop_token_ids=frozenset())
    pieces = await collect(engine, asked)
    engine.stop()
    return slots, [each[-1].completion_tokens for each in pieces.values()]


if __name__ == "__main__":
    loaded = settings.load(sys.argv[1:])
    log.configure("info")
    served = models.load(loaded)
    filled = [asyncio.run(fill(each)) for each in served]
    slots, generated = [slots for slots, _ in filled], [tokens for _, each in filled for tokens in each]
    print(json.dumps({"slots": slots, "generated": generated, "peak": memory(os.getpid())}))
