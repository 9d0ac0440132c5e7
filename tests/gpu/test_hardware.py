"""On an NVIDIA GPU (`make test-gpu`): the same model there and on the CPU, in every way that the service uses it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from deploy import envoy_config, local
from model_export.export import Options, export
from model_export.graph import cuda
from service import manifest
from service.engine.cache import Copy, KVCache
from service.engine.engine import Engine
from service.engine.ort.availability import cuda_obstacle
from service.engine.ort.device import Cpu, Cuda
from service.engine.ort.driver import Driver
from service.engine.ort.model import Model
from service.engine.sampler import Shortlist, whole
from service.engine.scheduler import Scheduler
from service.text.tokenizer import Tokenizer
from service.types import Prompt, SamplingParams
from tests.support.engines import collect
from tests.support.fakes import request
from tests.support.patience import PATIENCE
from tests.support.stack import ROOT

pytestmark = pytest.mark.gpu

CONTEXT, SLOTS = 512, 12
FORMS = ["float16", "int8"]
# Nats per token between the GPU's distribution and the CPU's, of the same weights in float16.
CLOSE = 0.01
TEXT = "The lighthouse keeper climbed the stairs each evening, lit the lamp, and wrote down which ships went by. "


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """A GPU, or a failure that says what is missing: these tests are never skipped silently."""
    lacking = cuda_obstacle(0)
    if lacking is not None:
        pytest.fail(f"there is no GPU to test on: {lacking}")


@pytest.fixture(scope="session", params=FORMS)
def directory(request, tmp_path_factory) -> Path:
    """The default model, exported for CUDA in each form."""
    folder = tmp_path_factory.mktemp("gpu") / request.param
    export(local.default_weights(), folder, Options(device="cuda", quantization=request.param), lambda *_: lambda: None)
    return folder


def load(directory, device):
    described = manifest.load(directory)
    return Model(
        directory, described, slots=SLOTS, context_length=CONTEXT, threads=4, batch_invariant=True, device=device
    )


def on_gpu():
    return Cuda(Driver(0), 0, 8 << 30)


class Uncaptured(Cuda):
    """The GPU without captured graphs."""

    def run(self, session, binding, graph):
        super().run(session, binding, None)


@pytest.fixture(scope="session")
def models(directory):
    """The model on the GPU and on the CPU."""
    return load(directory, on_gpu()), load(directory, Cpu())


@pytest.fixture(scope="session")
def tokens(directory):
    """A text of 300 tokens."""
    described = manifest.load(directory)
    tokenizer = Tokenizer(directory / "tokenizer.json", described.special_tokens, described.vocab_size)
    return list(tokenizer.encode(TEXT * 20))[:300]


def prompt(model, slot, tokens, chunk=1000):
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        rows = model.forward(slot, [part], [start], [(0, len(part) - 1)])
    return whole(rows[0]).copy()


def decode(model, rows, past):
    at = [(index, 0) for index, row in enumerate(rows) if row is not None]
    got = model.forward(0, [[] if row is None else [row] for row in rows], past, at)
    return np.stack([whole(row).copy() for row in got])


def close(one, other):
    """The KL divergence between two rows' distributions, in nats."""
    p, q = (row.astype(np.float64) - np.logaddexp.reduce(row.astype(np.float64)) for row in (one, other))
    return float((np.exp(p) * (p - q)).sum()) < CLOSE


def greedy(model, tokens, count):
    made = [int(prompt(model, 0, tokens).argmax())]
    for step in range(count - 1):
        made.append(int(decode(model, [made[-1]], [len(tokens) + step])[0].argmax()))
    return made


LISTING = """
from onnxruntime.capi import onnxruntime_pybind11_state as state
for each in state.get_all_opkernel_def():
    if each.provider == "CUDAExecutionProvider":
        print(f"{each.domain}:{each.op_name}")
"""


def test_the_list_of_kernels_is_what_is_registered():
    """cuda_kernels.json agrees with the kernels that this onnxruntime lists for its CUDA provider."""
    done = subprocess.run([sys.executable, "-c", LISTING], capture_output=True, text=True, check=False)
    if done.returncode:  # it asks every provider of the build, and fails if one cannot be loaded, such as TensorRT
        pytest.skip(f"onnxruntime does not list its kernels here: exit code {done.returncode}")
    assert set(json.loads(cuda.KERNELS.read_text())["operators"]) <= set(done.stdout.split())


def test_every_node_is_on_the_gpu(directory):
    """All nodes of the graph are assigned to CUDA by onnxruntime itself."""
    session = on_gpu().load(directory / "model.onnx", 1)
    assert session.get_providers()[0] == "CUDAExecutionProvider"
    assert cuda.unsupported(ir.load(directory / "model.onnx")) == []


def test_prompts(models, tokens):
    """Prefill in one call, and in chunks of any size, is close to the CPU's."""
    on_gpu, on_cpu = models
    expected = prompt(on_cpu, 0, tokens)
    for slot, chunk in enumerate([1000, 128, 100, 33]):
        assert close(prompt(on_gpu, slot, tokens, chunk), expected), f"chunks of {chunk}"


def test_greedy_text(models, tokens):
    """In each decode step the GPU chooses the CPU's token, or one that is about as likely on the CPU."""
    on_gpu, on_cpu = models
    made = greedy(on_gpu, tokens[:50], 40)
    logits = prompt(on_cpu, 0, tokens[:50])
    for step, token in enumerate(made):
        assert logits.max() - logits[token] < 0.1, f"step {step}"
        logits = decode(on_cpu, [token], [50 + step])[0]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12])
def test_a_ragged_batch(models, tokens, count):
    """Rows of different lengths, some of them idle, are close to the CPU's."""
    lengths = [20 + 17 * slot for slot in range(count)]
    for model in models:
        for slot, length in enumerate(lengths):
            prompt(model, slot, tokens[slot : slot + length])
    rows = [None if count > 2 and slot == 1 else 100 + slot for slot in range(count)]
    for one, other in zip(*(decode(model, rows, lengths) for model in models), strict=True):
        assert close(one, other)


def test_kept_prompts_outlast_padded_steps(models, tokens):
    """Slots outside a batch keep their KV cache, and their sequences continue unchanged."""
    on_gpu, _ = models
    for model in models:
        for slot in range(8):
            prompt(model, slot, tokens[: 40 + slot])
    for step in range(20):
        decode(on_gpu, [1, None, 2, 3, 4], [40 + step, 41, 42 + step, 43 + step, 44 + step])
    for slot in (1, 5, 6, 7):
        rows = [whole(model.forward(slot, [[9, 8]], [40 + slot], [(0, 1)])[0]).copy() for model in models]
        assert close(*rows), f"slot {slot}"


def test_copies(models, tokens):
    """A sequence continues in another slot after a copy of its slot."""
    on_gpu, on_cpu = models
    expected = prompt(on_cpu, 0, tokens)
    prompt(on_gpu, 0, tokens[:290])
    on_gpu.copy([Copy(0, 7, 290), Copy(7, 3, 290)])
    assert close(whole(on_gpu.forward(3, [tokens[290:]], [290], [(0, 9)])[0]), expected)


def test_captured_or_not(directory, tokens):
    """Captured graphs give bit-equal results to calls without capture, also when replayed for longer texts."""
    captured, anew = load(directory, on_gpu()), load(directory, Uncaptured(Driver(0), 0, 8 << 30))
    for length in (20, 150):
        for model in (captured, anew):
            for slot in range(3):
                prompt(model, slot, tokens[slot : slot + length])
        for step in range(5):
            rows, past = [5, 6, 7], [length + step] * 3
            assert np.array_equal(decode(captured, rows, past), decode(anew, rows, past))


def test_results_that_have_grown(directory, tokens):
    """Captured steps stay bit-equal to calls without capture after a long prompt's scores needed larger buffers."""
    captured, anew = load(directory, on_gpu()), load(directory, Uncaptured(Driver(0), 0, 8 << 30))
    scores = [(0, at) for at in range(100)]
    for step in range(6):
        if step == 3:
            scored = [model.forward(11, [tokens[:100]], [0], scores) for model in (captured, anew)]
            assert captured._results.rows >= len(scores) > SLOTS
            for one, other in zip(*scored, strict=True):
                assert np.array_equal(whole(one), whole(other))
        rows, past = [5, 6, 7], [step] * 3
        assert np.array_equal(decode(captured, rows, past), decode(anew, rows, past)), f"step {step}"


def test_the_shortlist(models, tokens):
    """The host receives the likeliest tokens of the whole row and its log-sum-exp."""
    on_gpu, _ = models
    (row,) = on_gpu.forward(0, [tokens[:60]], [0], [(0, 59)])
    assert isinstance(row, Shortlist)
    logits = row.whole().astype(np.float64)
    assert np.allclose(np.sort(logits)[::-1][: len(row.ids)], row.logits)
    assert np.array_equal(logits[row.ids].astype(np.float32), row.logits)
    assert row.normalizer == pytest.approx(np.logaddexp.reduce(logits), abs=1e-4)


async def test_the_engine(directory, tokens):
    """Many concurrent requests, with copied slots for `n` and common prefixes, end with the same results as alone."""
    described = manifest.load(directory)
    tokenizer = Tokenizer(directory / "tokenizer.json", described.special_tokens, described.vocab_size)
    engine = Engine(load(directory, on_gpu()), tokenizer, Scheduler(KVCache(SLOTS), 128), max_waiting=1000)
    engine.start(asyncio.get_running_loop())
    few = {"max_tokens": 24, "stop_token_ids": frozenset()}
    ways = [{}, {"logprobs": 5}, {"n": 3, "sampling": SamplingParams(temperature=0.7, top_k=20, seed=1)}]
    made = [
        request(Prompt(tuple(tokens[: 20 + at]), ""), **few, **ways[at % 3], identity=f"caller {at % 4}")
        for at in range(40)
    ]
    try:
        pieces = await asyncio.gather(*(collect(engine, each) for each in made))
        assert engine.reuse.cached_tokens > 0
        assert (engine.faults.failed_steps, engine.faults.not_finite) == (0, 0)
    finally:
        engine.stop()
    for each, got in zip(made, pieces, strict=True):
        assert len(got) == each.n
        assert all(deltas[-1].completion_tokens == 24 for deltas in got.values())


def test_the_service(directory):
    """`--device cuda` starts, says which GPU it is on, and answers."""
    http, admin, port = envoy_config.free_ports(3)
    environment = {**os.environ, "MODEL_DIR": str(directory), "HTTP_PORT": str(http), "GRPC_PORT": str(port)}
    command = [sys.executable, "deploy/local.py", "--", "--device", "cuda"]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment | {"ADMIN_PORT": str(admin)}, stdout=subprocess.PIPE, text=True
    ) as running:
        try:
            assert running.stdout is not None
            assert any(line.startswith("ready") for line in running.stdout)
            with urllib.request.urlopen(f"http://127.0.0.1:{http}/v1/models") as answer:
                assert json.load(answer)["data"]
        finally:
            running.send_signal(signal.SIGINT)
            running.communicate(timeout=PATIENCE)
