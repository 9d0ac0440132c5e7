"""Where a model is put, and how much of a GPU it takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.engine.ort.device import Cpu, Cuda
from service.errors import ModelDirectoryError, StartupError
from service.manifest import FileEntry, KVLayout, Quantization
from service.serving import gpu_memory
from service.serving.memory import MIB
from service.serving.memory import plan as host_plan
from service.settings import Settings
from tests.support import fakes

GIB = 1 << 30
MODEL = Path("m")


def described(devices=("cpu", "cuda")):
    """A manifest of a model of 7 billion weights in 4 bits."""
    files = {"model.onnx.data": FileEntry(bytes=4 * GIB, sha256="0" * 64)}
    return fakes.manifest(
        context_length=8192,
        vocab_size=32000,
        kv=KVLayout(layers=32, kv_heads=8, head_dim=128, dtype="float16"),
        quantization=Quantization(weights="int4", activations="float16", source="float16", min_rows=1, min_logits=1),
        files=files | {"tokenizer.json": FileEntry(bytes=MIB, sha256="0" * 64)},
        devices=devices,
    )


def settings(**changes):
    return Settings(model_dir="m", **changes)


def plan(allowed, slots=32, context_length=8192, **changes):
    return gpu_memory.plan(described(), settings(**changes), context_length, slots, allowed)


def test_keys_and_values_by_hand():
    """They are reserved for the largest call: as many slots as the power of two that holds all sequences."""
    slot = 8192 * 2 * 32 * 8 * 128 * 2
    assert plan(80 * GIB, slots=5).kv == 8 * slot
    assert plan(80 * GIB, slots=32).kv == 33 * slot
    assert plan(80 * GIB, slots=1).kv == 2 * slot


def test_as_many_slots_as_fit():
    """Slots go down to what the budget holds; the graphs get all that is left."""
    assert plan(80 * GIB).slots == 32
    less = plan(24 * GIB)
    assert less.slots == 16
    assert less.kv + less.logits + less.session + gpu_memory._CONTEXT == 24 * GIB
    assert less.session > 4.4 * GIB
    with pytest.raises(StartupError, match=r"does not hold one sequence of 8192 tokens: .*--gpu-memory-mib"):
        plan(6 * GIB)
    assert plan(6 * GIB, context_length=1024, prompt_chunk=16).slots >= 1


def test_logits_by_hand():
    """The largest call's, with copies of them in float32 twice and in float16, beside the results it outgrew."""
    vocabulary, copies = 32000, 4 + 4 + 2
    assert plan(80 * GIB, prompt_chunk=128).logits == vocabulary * (128 * (4 + copies) + 64 * 4)
    assert plan(80 * GIB, prompt_chunk=512, slots=4).logits == vocabulary * (512 * (4 + copies) + 256 * 4)


def test_the_budget():
    """It is what is asked for where that is free, else most of what is."""
    assert gpu_memory.budget(settings(), 10 * GIB) == 9 * GIB
    assert gpu_memory.budget(settings(gpu_memory_mib=2048), 10 * GIB) == 2 * GIB
    with pytest.raises(StartupError, match="gpu_memory_mib 20480 is more than the GPU has free, which is 10240"):
        gpu_memory.budget(settings(gpu_memory_mib=20480), 10 * GIB)


def test_the_host_holds_no_keys_and_values_of_a_gpu():
    """Where the model is on the GPU, the process needs none of its own memory for them."""
    assert host_plan(described(), settings(device="cpu"), 8192, 1 << 50).kv_slot == GIB
    assert host_plan(described(), settings(device="cuda"), 8192, 1 << 50).kv_slot == 0


@pytest.mark.parametrize(
    ("wanted", "lacking", "devices", "found"),
    [
        ("auto", None, ("cpu", "cuda"), "cuda"),
        ("auto", "no GPU", ("cpu", "cuda"), "cpu"),
        ("auto", None, ("cpu",), "cpu"),
        ("cuda", None, ("cpu", "cuda"), "cuda"),
        ("cpu", None, ("cpu", "cuda"), "cpu"),
    ],
)
def test_the_device(monkeypatch, wanted, lacking, devices, found):
    """A GPU that there is takes a model that is for it, unless the CPU is asked for."""
    monkeypatch.setattr(gpu_memory, "lacks_cuda", lambda index: lacking)
    assert gpu_memory.with_device(described(devices), settings(device=wanted), MODEL).device == found


def test_asking_for_cuda_in_vain(monkeypatch):
    """Without a GPU, or with a model that is not for one, the start ends with what to do."""
    monkeypatch.setattr(gpu_memory, "lacks_cuda", lambda index: f"GPU {index} is not there")
    with pytest.raises(StartupError, match="--device cuda is not available: GPU 3 is not there"):
        gpu_memory.with_device(described(), settings(device="cuda", device_id=3), MODEL)
    monkeypatch.setattr(gpu_memory, "lacks_cuda", lambda index: None)
    said = "m has operators that CUDA has no kernel for; export the model again: .* --device cuda"
    with pytest.raises(ModelDirectoryError, match=said):
        gpu_memory.with_device(described(("cpu",)), settings(device="cuda"), MODEL)


@pytest.mark.parametrize("others", [0, 1])
def test_one_model_of_a_process_is_on_a_gpu(others):
    """Two are refused by name, on one GPU or on two; models on the CPU may be beside it."""
    first, other, cpu = settings(device="cuda"), settings(device="cuda", device_id=others), settings(device="cpu")
    advice = r'device = "cpu" in tables \[models\.NAME\] .*--device cpu; or .*--device-id'
    with pytest.raises(StartupError, match=rf"^a and c would .*{advice}"):
        gpu_memory.check_one_on_gpu({"a": first, "b": cpu, "c": other})
    with pytest.raises(StartupError, match=r"^a, b and c would "):
        gpu_memory.check_one_on_gpu({"a": first, "b": other, "c": first})
    gpu_memory.check_one_on_gpu({"a": cpu, "b": other, "c": cpu})
    gpu_memory.check_one_on_gpu({"a": cpu, "b": cpu})


def test_placing(monkeypatch):
    """The GPU gets its share of memory by the plan; the CPU is as it was."""

    class Driver:
        name = "A GPU"

        def __init__(self, index):
            self.index = index

        def free(self):
            return 24 * GIB

    monkeypatch.setattr(gpu_memory, "Driver", Driver)
    device, slots = gpu_memory.place(described(), settings(device="cuda", device_id=1), 8192, 32)
    assert isinstance(device, Cuda)
    assert (device.index, slots) == (1, plan(int(0.9 * 24 * GIB)).slots)
    device, slots = gpu_memory.place(described(), settings(device="cpu"), 8192, 32)
    assert isinstance(device, Cpu)
    assert slots == 32
