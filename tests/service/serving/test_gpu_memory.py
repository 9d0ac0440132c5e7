"""The device of a model, and the plan of its GPU memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.ort.device import Cpu, Cuda
from service.errors import ModelDirectoryError, StartupError
from service.manifest import KVLayout, Quantization
from service.serving import gpu_memory
from service.serving.memory import MIB, Model
from service.serving.memory import plan as host_plan
from service.settings import Settings
from tests.support import fakes

GIB = 1 << 30
MODEL = Path("m")


def described(devices=("cpu", "cuda")):
    """A manifest of a model with 7 billion weights of 4 bits."""
    files = {"model.onnx.data": fakes.file_entry(4 * GIB)}
    return fakes.manifest(
        context_length=8192,
        vocab_size=32000,
        kv=KVLayout(layers=32, kv_heads=8, head_dim=128, dtype="float16"),
        quantization=Quantization(weights="int4", activations="float16", source="float16", pads_lone_row=False),
        files=files | {"tokenizer.json": fakes.file_entry(MIB)},
        devices=devices,
    )


def settings(**changes):
    return Settings(model_dir="m", **changes)


def plan(allowed, slots=32, context_length=8192, **changes):
    given = settings(context_length=context_length, **changes)
    return gpu_memory.plan(described(), given, context_length, slots, allowed)


def test_kv_cache_by_hand():
    """The KV cache is allocated for the largest call, whose rows are the power of two that holds all sequences."""
    slot = 8192 * 2 * 32 * 8 * 128 * 2
    assert plan(80 * GIB, slots=5).kv == 8 * slot
    assert plan(80 * GIB, slots=32).kv == 33 * slot
    assert plan(80 * GIB, slots=1).kv == 2 * slot


def test_as_many_slots_as_fit():
    """The plan has as many slots as fit, and the graphs get the rest of the budget."""
    assert plan(80 * GIB).slots == 32
    smaller = plan(24 * GIB)
    assert smaller.slots == 16
    assert smaller.kv + smaller.logits + smaller.session + gpu_memory._CONTEXT == 24 * GIB
    assert smaller.session > 4.4 * GIB
    with pytest.raises(StartupError, match=r"does not hold one sequence of 8192 tokens: .*--gpu-memory-mib"):
        plan(6 * GIB)
    with pytest.raises(StartupError, match=r"does not hold one sequence of 16384 tokens: .*--context-length"):
        plan(8 * GIB, context_length=16384, prompt_chunk=16)
    assert plan(6 * GIB, context_length=1024, prompt_chunk=16).slots >= 1


def test_a_context_that_is_not_asked_for_is_as_long_as_fits():
    """If not even one slot of the model's own context fits, there is one slot, as long as the memory."""
    without = Settings(model_dir="m", prompt_chunk=16)
    fitting = gpu_memory.plan(described(), without, 1 << 20, 32, 8 * GIB)
    assert fitting.slots == 1
    assert 512 <= fitting.context_length < 16384
    assert fitting.kv == 2 * fitting.context_length * 131_072
    assert fitting.kv + fitting.logits + fitting.session + gpu_memory._CONTEXT == 8 * GIB


def test_logits_by_hand():
    """The largest call's logits count with two float32 copies, a float16 copy, and the outgrown result buffer."""
    vocabulary, copies = 32000, 4 + 4 + 2
    assert plan(80 * GIB, prompt_chunk=128).logits == vocabulary * (128 * (4 + copies) + 64 * 4)
    assert plan(80 * GIB, prompt_chunk=512, slots=4).logits == vocabulary * (512 * (4 + copies) + 256 * 4)


def test_the_budget():
    """The budget is the configured size, which must be free, or else a share of the free memory."""
    assert gpu_memory.budget(settings(), 10 * GIB) == 9 * GIB
    assert gpu_memory.budget(settings(gpu_memory_mib=2048), 10 * GIB) == 2 * GIB
    with pytest.raises(StartupError, match="gpu_memory_mib 20480 is more than the 10240 MiB that are free on the GPU"):
        gpu_memory.budget(settings(gpu_memory_mib=20480), 10 * GIB)


def test_the_host_plan_has_no_kv_cache_for_a_gpu():
    """When the model runs on the GPU, the plan of host memory has no KV cache."""
    on_cpu, on_gpu = (
        host_plan([Model("m", described(), settings(device=name))], 1 << 50)[0] for name in ("cpu", "cuda")
    )
    assert on_cpu.kv > 32 * GIB
    assert (on_gpu.kv, on_gpu.share, on_gpu.positions) == (0, None, 32 * 8192)


@pytest.mark.parametrize(
    ("setting", "obstacle", "devices", "device"),
    [
        ("auto", None, ("cpu", "cuda"), "cuda"),
        ("auto", "no GPU", ("cpu", "cuda"), "cpu"),
        ("auto", None, ("cpu",), "cpu"),
        ("cuda", None, ("cpu", "cuda"), "cuda"),
        ("cpu", None, ("cpu", "cuda"), "cpu"),
    ],
)
def test_the_device(monkeypatch, setting, obstacle, devices, device):
    """A model exported for CUDA runs on the GPU if there is one, unless the settings ask for the CPU."""
    monkeypatch.setattr(gpu_memory, "cuda_obstacle", lambda index: obstacle)
    assert gpu_memory.with_device(described(devices), settings(device=setting), MODEL).device == device


def test_cuda_that_is_not_available(monkeypatch):
    """If there is no GPU, or the model was not exported for one, the error says what to do."""
    monkeypatch.setattr(gpu_memory, "cuda_obstacle", lambda index: f"GPU {index} is not there")
    with pytest.raises(StartupError, match="--device cuda is not available: GPU 3 is not there"):
        gpu_memory.with_device(described(), settings(device="cuda", device_id=3), MODEL)
    monkeypatch.setattr(gpu_memory, "cuda_obstacle", lambda index: None)
    message = "m has operators that CUDA has no kernel for; export the model again: .* --device cuda"
    with pytest.raises(ModelDirectoryError, match=message):
        gpu_memory.with_device(described(("cpu",)), settings(device="cuda"), MODEL)


@pytest.mark.parametrize("others", [0, 1])
def test_one_model_of_a_process_is_on_a_gpu(others):
    """Two models on GPUs are refused by name, whether on one GPU or two; other models may run on the CPU."""
    first, other, cpu = settings(device="cuda"), settings(device="cuda", device_id=others), settings(device="cpu")
    advice = r'device = "cpu" in tables \[models\.NAME\] .*--device cpu; or .*--device-id'
    with pytest.raises(StartupError, match=rf"^a and c would .*{advice}"):
        gpu_memory.check_one_on_gpu({"a": first, "b": cpu, "c": other})
    with pytest.raises(StartupError, match=r"^a, b and c would "):
        gpu_memory.check_one_on_gpu({"a": first, "b": other, "c": first})
    gpu_memory.check_one_on_gpu({"a": cpu, "b": other, "c": cpu})
    gpu_memory.check_one_on_gpu({"a": cpu, "b": cpu})


def test_placing(monkeypatch):
    """A device for the GPU has the planned slots and memory; a device for the CPU keeps all slots."""

    class Driver:
        name = "A GPU"

        def __init__(self, index):
            self.index = index

        def free(self):
            return 24 * GIB

    monkeypatch.setattr(gpu_memory, "Driver", Driver)
    given = settings(device="cuda", device_id=1)
    (host,) = host_plan([Model("m", described(), given)], 1 << 50)
    device, slots, length = gpu_memory.place(described(), given, host)
    assert isinstance(device, Cuda)
    assert (device.index, slots, length) == (1, plan(int(0.9 * 24 * GIB)).slots, 8192)
    device, slots, length = gpu_memory.place(described(), settings(device="cpu"), host)
    assert isinstance(device, Cpu)
    assert (slots, length) == (32, 8192)
