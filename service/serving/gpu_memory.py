"""Chooses the device of a model, and plans the GPU memory that it takes. All sizes are in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.engine.ort.availability import cuda_message, cuda_obstacle
from service.engine.ort.device import Cpu, Cuda, Device, kv_slots, power_of_two
from service.engine.ort.driver import Driver
from service.errors import ModelDirectoryError, StartupError
from service.manifest import Manifest
from service.serving.memory import LEAST_POSITIONS, MIB, Plan, activations, mib
from service.settings import Settings
from service.telemetry.log import get_logger

_log = get_logger(__name__)

# The share of the memory free at the start that a model may take, unless the settings name a size.
DEFAULT_SHARE = 0.9

# The sizes below are estimates: none has been measured on a GPU.
# The CUDA context, and what onnxruntime and its libraries load into it.
_CONTEXT = 768 * MIB
# Weights on the GPU take the size of the file plus what alignment adds.
_WEIGHTS_FACTOR = 1.1
# Copies of a row of logits: the result in float32, two more while its shortlist is made, and the float16 original.
# While the result buffer grows, the old buffer, of at most half as many rows, exists as well.
_RESULT_BYTES = 4
_LOGITS_BYTES = _RESULT_BYTES + 4 + 4 + 2


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """GPU memory of a model while `slots` sequences of `context_length` run. The KV cache is allocated at the start.

    `session` is the memory for weights and activations of the graphs: the budget minus everything else.
    """

    slots: int
    context_length: int
    kv: int
    logits: int
    session: int


def with_device(manifest: Manifest, settings: Settings, directory: Path) -> Settings:
    """The settings with `device` resolved to `cpu` or `cuda`. `auto` takes a GPU for a model that was exported for it.

    Raises StartupError when the settings ask for CUDA and it is not available, and ModelDirectoryError when they do and
    the model was not exported for CUDA.
    """
    return settings.model_copy(update={"device": _choose_device(manifest, settings, directory)})


def _choose_device(manifest: Manifest, settings: Settings, directory: Path) -> str:
    if settings.device == "cpu":
        return "cpu"
    obstacle = cuda_obstacle(settings.device_id)
    if obstacle is not None:
        if settings.device == "cuda":
            raise StartupError(cuda_message(obstacle))
        return "cpu"
    if "cuda" in manifest.devices:
        return "cuda"
    problem = _not_for_cuda(directory)
    if settings.device == "cuda":
        raise ModelDirectoryError(cuda_message(problem))
    _log.warning(f"the GPU stays unused: {problem}")
    return "cpu"


def _not_for_cuda(directory: Path) -> str:
    hint = "export the model again: python -m model_export SOURCE DIRECTORY --device cuda"
    return f"{directory} has operators that CUDA has no kernel for; {hint}"


def check_one_on_gpu(models: Mapping[str, Settings]) -> None:
    """Raises StartupError when more than one model of the process, by directory, would run on a GPU.

    onnxruntime captures CUDA graphs in CUDA's global mode. During a capture no thread of the process may allocate
    memory on any GPU.
    """
    names = [name for name, settings in models.items() if settings.device == "cuda"]
    if len(names) > 1:
        raise StartupError(
            f"{', '.join(names[:-1])} and {names[-1]} would be on a GPU, and one process can have one model there:"
            ' give all but one device = "cpu" in tables [models.NAME] of the settings file, or all by --device cpu; or'
            " run one service per GPU, each with its --device-id"
        )


def place(manifest: Manifest, settings: Settings, planned: Plan) -> tuple[Device, int, int]:
    """The device named by `settings`, and how many slots of how many positions the model has there.

    `device` must be resolved, not `auto`. Raises StartupError when not even one slot fits.
    """
    if settings.device != "cuda":
        return Cpu(), planned.slots, planned.context_length
    driver = Driver(settings.device_id)
    allowed = budget(settings, driver.free())
    on_gpu = plan(manifest, settings, planned.context_length, planned.slots, allowed)
    fields = {"model": manifest.id, "gpu": driver.name, "slots": on_gpu.slots, "max_running": settings.max_running}
    fields |= {f"{name}_mib": mib(getattr(on_gpu, name)) for name in ("kv", "logits", "session")}
    if on_gpu.slots < planned.slots or on_gpu.context_length < planned.context_length:
        message = "the GPU's memory holds fewer or shorter sequences than the settings allow"
        _log.warning(message, budget_mib=allowed // MIB, max_model_len=on_gpu.context_length, **fields)
    else:
        _log.info("the GPU's memory holds all slots", budget_mib=allowed // MIB, **fields)
    return Cuda(driver, settings.device_id, on_gpu.session), on_gpu.slots, on_gpu.context_length


def budget(settings: Settings, free: int) -> int:
    """Bytes that the model may take of `free` bytes. Raises StartupError when the setting exceeds `free`."""
    if settings.gpu_memory_mib is None:
        return int(DEFAULT_SHARE * free)
    if settings.gpu_memory_mib * MIB > free:
        message = (
            f"gpu_memory_mib {settings.gpu_memory_mib} is more than the {free // MIB} MiB that are free on the GPU"
        )
        raise StartupError(f"{message}; allow less (--gpu-memory-mib), or end the other processes on the GPU")
    return settings.gpu_memory_mib * MIB


def plan(manifest: Manifest, settings: Settings, context_length: int, slots: int, allowed: int) -> GpuPlan:
    """The plan with the most slots, up to `slots`, that fits `allowed` bytes.

    If not even one slot fits and the settings ask for no context, the slot is as long as fits. Raises StartupError when
    nothing fits.
    """
    position = manifest.kv.bytes_per_token
    for count in range(slots, 0, -1):
        kv = kv_slots(count, is_gpu=True) * context_length * position
        positions = power_of_two(settings.prompt_chunk) + power_of_two(count)
        rows = max(power_of_two(settings.prompt_chunk), power_of_two(count))
        logits = (rows * _LOGITS_BYTES + rows // 2 * _RESULT_BYTES) * manifest.vocab_size
        needed = math.ceil(manifest.weights_bytes * _WEIGHTS_FACTOR) + positions * activations(manifest)
        session = allowed - _CONTEXT - kv - logits
        if session >= needed:
            return GpuPlan(count, context_length, kv, logits, session)
    fitting = (session + kv - needed) // (kv_slots(1, is_gpu=True) * position)
    if settings.context_length is None and fitting >= LEAST_POSITIONS:
        kv = kv_slots(1, is_gpu=True) * fitting * position
        return GpuPlan(1, fitting, kv, logits, allowed - _CONTEXT - kv - logits)
    raise StartupError(
        f"the GPU's memory does not hold one sequence of {context_length} tokens: that takes"
        f" {mib(_CONTEXT + kv + logits + needed)} MiB ({mib(needed)} weights and activations, {mib(kv)} KV"
        f" cache, {mib(logits)} logits, {mib(_CONTEXT)} CUDA itself), and {allowed // MIB} MiB are allowed; lower"
        " context_length (--context-length) or prompt_chunk (--prompt-chunk), or allow more (--gpu-memory-mib)"
    )
