"""The whole engine over the GPU's code: the answers are the CPU's, token by token."""

from __future__ import annotations

import asyncio
import dataclasses

from service import manifest
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.ort.device import Cpu
from service.engine.ort.model import Model
from service.engine.scheduler import Scheduler
from service.text.tokenizer import Tokenizer
from service.types import Prompt, SamplingParams
from tests.support.engines import collect
from tests.support.fake_gpu import StandIn
from tests.support.fakes import request

TEXT = "the other thing is that these are there, and then the rest of them go with the others to the north"


def prompts(tokenizer):
    """Prompts of several lengths, two with a long beginning in common."""
    texts = [TEXT[:40], TEXT[:60], TEXT[10:13], TEXT[:60] + " and", TEXT[20:], "t"]
    return [Prompt(tuple(tokenizer.encode(text)), text) for text in texts]


def requests(tokenizer):
    """Requests with every kind of sampling."""
    few = {"max_tokens": 9, "stop_token_ids": frozenset()}
    ways = [
        {},
        {"logprobs": 5},
        {"sampling": SamplingParams(temperature=0.8, top_k=5, seed=3), "n": 3},
        {"sampling": SamplingParams(temperature=1, top_p=0.4, seed=4), "logprobs": 2},
        {"sampling": SamplingParams(temperature=1, seed=5)},
        {"sampling": SamplingParams(temperature=0, presence_penalty=1.5, logit_bias={7: 3.0})},
        {"echo": True, "logprobs": 1, "max_tokens": 4},
    ]
    given = prompts(tokenizer)
    return [request(given[at % len(given)], **{**few, **way}) for at, way in enumerate(ways * 2)]


async def answers(directory, device):
    """The texts of all requests together, over so few slots that sequences move and prompts are kept."""
    described = manifest.load(directory)
    tokenizer = Tokenizer(directory / "tokenizer.json", described.special_tokens, described.vocab_size)
    model = Model(directory, described, slots=5, context_length=160, threads=1, batch_invariant=True, device=device)
    engine = Engine(model, tokenizer, Scheduler(KVCache(5), 16), max_waiting=100)
    engine.start(asyncio.get_running_loop())
    try:
        made = [dataclasses.replace(each, id=str(at)) for at, each in enumerate(requests(tokenizer))]
        pieces = await asyncio.gather(*(collect(engine, each) for each in made))
        assert engine.reuse.cached_tokens > 0
        assert (engine.faults.failed_steps, engine.faults.not_finite) == (0, 0)
    finally:
        engine.stop()
    return [{key: "".join(delta.text for delta in deltas) for key, deltas in each.items()} for each in pieces]


async def test_the_same_answers_as_on_the_cpu(directory):
    """Greedy, sampled, scored and penalized, with copies and chunks: each text is what the CPU's memory gives."""
    device = StandIn()
    on_gpu = await answers(directory, device)
    on_cpu = await answers(directory, Cpu())
    same = sum(one == other for one, other in zip(on_gpu, on_cpu, strict=True))
    # Padded products sum in another order, so one near-tie among all tokens may turn.
    assert same >= len(on_cpu) - 1, [pair for pair in zip(on_gpu, on_cpu, strict=True) if pair[0] != pair[1]]
    assert {graph for graph, _ in device.runs} > {None}
