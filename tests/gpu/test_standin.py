"""The real CUDA provider over a stand-in for CUDA itself (`make check-cuda`): what it makes of our graphs and calls.

Nothing is computed, so no result means anything; all that happens before and around the kernels is real.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from model_export.export import Options, export
from service import manifest
from service.engine.cache import Copy
from service.engine.ort.availability import cuda_obstacle, provider
from service.engine.ort.device import CUDA_PROVIDER, Cuda
from service.engine.ort.driver import Driver
from service.engine.ort.model import Model
from service.serving.gpu_memory import place, with_device
from service.settings import Settings
from tests.model_export import tiny
from tests.support.patience import PATIENCE
from tests.support.ports import free_ports
from tests.support.stack import ROOT

pytestmark = pytest.mark.standin

CONTEXT, SLOTS = 128, 8
FORMS = ["float16", "int4", "int8"]


@pytest.fixture(scope="module", autouse=True)
def standin():
    """The stand-in is preloaded, and onnxruntime uses it as CUDA."""
    assert cuda_obstacle(0) is None
    assert f"{CUDA_PROVIDER} on stand-in" in provider("auto", 0)


def made(tmp_path, family="llama", **options):
    source = tiny.hugging_face(tmp_path / "source", family=family)
    export(source, tmp_path / "model", Options(**{"max_kl": 10.0, **options}), lambda *_: lambda: None)
    return tmp_path / "model"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_every_node_goes_to_cuda(tmp_path, family, form):
    """A session that may not fall back to the CPU loads every form: all nodes have a CUDA kernel."""
    directory = made(tmp_path, family, device="cuda", quantization=form)
    session = Cuda(Driver(0), 0, 1 << 30).load(directory / "model.onnx", 1)
    assert session.get_providers()[0] == CUDA_PROVIDER
    options = session.get_provider_options()[CUDA_PROVIDER]
    assert (options["enable_cuda_graph"], options["gpu_mem_limit"]) == ("1", str(1 << 30))
    assert options["arena_extend_strategy"] == "kSameAsRequested"


@pytest.mark.parametrize("form", ["float16", "int4"])
def test_steps_are_captured_once_and_replayed(tmp_path, form, monkeypatch):
    """Each number of rows is captured once; a replayed step makes only our own copies."""
    directory, log = made(tmp_path, device="cuda", quantization=form), tmp_path / "log"
    described = manifest.load(directory)
    settings = with_device(described, Settings(model_dir=directory, max_running=SLOTS), directory)
    device, slots = place(described, settings, CONTEXT, SLOTS)
    assert (settings.device, slots) == ("cuda", SLOTS)
    model = Model(
        directory, described, slots=slots, context_length=CONTEXT, threads=1, batch_invariant=True, device=device
    )

    def notes(call):
        log.write_text("")
        call()
        return log.read_text().split("\n")[:-1]

    monkeypatch.setenv("STANDIN_LOG", str(log))
    for slot in range(SLOTS):
        for width in (2, 17, 60):
            assert "capture" not in notes(lambda w=width, s=slot: model.forward(s, [[1] * w], [0], [(0, w - 1)]))

    def step(rows):
        return notes(lambda: model.forward(0, [[5]] * rows, [60] * rows, [(row, 0) for row in range(rows)]))

    captured = {rows: step(rows).count("capture") for rows in range(1, SLOTS + 1)}
    buckets = {max(1 + described.quantization.pads_lone_row, 1 << (rows - 1).bit_length()) for rows in captured}
    assert sum(captured.values()) == len(buckets)
    for rows in range(1, SLOTS + 1):
        assert step(rows) == ["replay"]
    model.copy([Copy(0, 3, 50), Copy(3, 7, 20)])
    assert step(SLOTS) == ["replay"]


def service(directory, **environment):
    (port,) = free_ports(1)
    command = [sys.executable, "-m", "service", "--model-dir", str(directory), "--device", "cuda"]
    command += ["--port", str(port), "--metrics-port", "0", "--context-length", str(CONTEXT)]
    return command, {**os.environ, **environment}


def test_the_service_starts(tmp_path):
    """The service loads, plans its memory, warms up and serves with the CUDA provider."""
    command, environment = service(made(tmp_path, device="cuda"))
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        try:
            lines = []
            for line in running.stdout:
                lines.append(line)
                if '"serving"' in line:
                    break
            assert any("the GPU's memory holds 32 of 32 slots" in line for line in lines)
            assert '"serving"' in lines[-1], lines
        finally:
            running.terminate()
            running.communicate(timeout=PATIENCE)


def test_without_a_gpu(tmp_path):
    """With a driver but no GPU, the start ends with a message that says so."""
    command, environment = service(made(tmp_path, device="cuda"), STANDIN_NO_GPU="1")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "--device cuda is not available: NVIDIA's driver: cuInit failed: no CUDA-capable device" in done.stderr
