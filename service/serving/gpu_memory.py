"""Where a model runs, and how much of a GPU's memory it takes there. All sizes in bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service.engine.ort.device import Cpu, Cuda, Device, kv_slots, lacks_cuda, no_cuda, power_of_two
from service.engine.ort.driver import Driver
from service.errors import ModelDirectoryError, StartupError
from service.manifest import Manifest
from service.serving.memory import MIB, activations, mib
from service.settings import Settings
from service.telemetry.log import get_logger

_log = get_logger(__name__)

# Of the memory that is free at the start, where nothing else is asked for.
DEFAULT_SHARE = 0.9

# The sizes below are estimates: none has been measured on a GPU.
# The driver's context, and what onnxruntime and its libraries load into it.
_CONTEXT = 768 * MIB
# A GPU's weights are those of the file, and what alignment adds.
_WEIGHTS_FACTOR = 1.1
# Copies of a row of logits in float32: the result, two while its shortlist is made, and one in float16 before. While
# results grow, the old ones are there as well, of half as many rows at most.
_RESULT_BYTES = 4
_LOGITS_BYTES = _RESULT_BYTES + 4 + 4 + 2


@dataclass(frozen=True, slots=True)
class GpuPlan:
    """What a model takes of a GPU while `slots` sequences run; keys and values are reserved whole at the start.

    `session` is what the graphs may take for weights and activations: all that the rest leaves of the budget.
    """

    slots: int
    kv: int
    logits: int
    session: int


def settled(manifest: Manifest, settings: Settings, directory: Path) -> Settings:
    """The settings with `device` as it is to be, `cpu` or `cuda`: the GPU, where there is one and the model is for it.

    Raises StartupError when CUDA is asked for and cannot be had, ModelDirectoryError when the model is not for it.
    """
    return settings.model_copy(update={"device": _settle(manifest, settings, directory)})


def _settle(manifest: Manifest, settings: Settings, directory: Path) -> str:
    if settings.device == "cpu":
        return "cpu"
    lacking = lacks_cuda(settings.device_id)
    if lacking is not None:
        if settings.device == "cuda":
            raise StartupError(no_cuda(lacking))
        return "cpu"
    if "cuda" in manifest.devices:
        return "cuda"
    problem = _not_for_cuda(directory)
    if settings.device == "cuda":
        raise ModelDirectoryError(no_cuda(problem))
    _log.warning(f"the GPU stays unused: {problem}")
    return "cpu"


def _not_for_cuda(directory: Path) -> str:
    hint = "export the model again: python -m model_export SOURCE DIRECTORY --device cuda"
    return f"{directory} has operators that CUDA has no kernel for; {hint}"


def check_apart(models: Mapping[str, Settings]) -> None:
    """Raises StartupError when more than one of a process's models, by their directories, are to be on a GPU.

    onnxruntime captures what one computes for later replay in CUDA's global mode: while it does, no thread of the
    process may take memory of any GPU.
    """
    names = [name for name, settings in models.items() if settings.device == "cuda"]
    if len(names) > 1:
        raise StartupError(
            f"{', '.join(names[:-1])} and {names[-1]} would be on a GPU, and one process can have one model there:"
            ' give all but one device = "cpu" in tables [models.NAME] of the settings file, or all by --device cpu; or'
            " run one service per GPU, each with its --device-id"
        )


def place(manifest: Manifest, settings: Settings, context_length: int, slots: int) -> tuple[Device, int]:
    """The device that settled settings name, and how many of the slots fit there; StartupError when none does."""
    if settings.device != "cuda":
        return Cpu(), slots
    driver = Driver(settings.device_id)
    allowed = budget(settings, driver.free())
    made = plan(manifest, settings, context_length, slots, allowed)
    fields = {"model": manifest.id, "gpu": driver.name, "slots": made.slots, "max_running": settings.max_running}
    fields |= {f"{name}_mib": mib(getattr(made, name)) for name in ("kv", "logits", "session")}
    if made.slots < slots:
        _log.warning("the GPU's memory holds fewer slots than the process", budget_mib=allowed // MIB, **fields)
    else:
        _log.info("the GPU's memory holds all slots", budget_mib=allowed // MIB, **fields)
    return Cuda(driver, settings.device_id, made.session), made.slots


def budget(settings: Settings, free: int) -> int:
    """What the model may take of a GPU with so much memory free."""
    if settings.gpu_memory_mib is None:
        return int(DEFAULT_SHARE * free)
    if settings.gpu_memory_mib * MIB > free:
        message = f"gpu_memory_mib {settings.gpu_memory_mib} is more than the GPU has free, which is {free // MIB}"
        raise StartupError(f"{message}; allow less (--gpu-memory-mib), or end what else uses it")
    return settings.gpu_memory_mib * MIB


def plan(manifest: Manifest, settings: Settings, context_length: int, slots: int, allowed: int) -> GpuPlan:
    """The plan of the most slots, up to `slots`, that stays within `allowed`. Raises StartupError when none does."""
    stored = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(".onnx.data"))
    kv_slot = context_length * manifest.kv.bytes_per_token
    for count in range(slots, 0, -1):
        kv = kv_slots(count, is_gpu=True) * kv_slot
        positions = power_of_two(settings.prompt_chunk) + power_of_two(count)
        rows = max(power_of_two(settings.prompt_chunk), power_of_two(count))
        logits = (rows * _LOGITS_BYTES + rows // 2 * _RESULT_BYTES) * manifest.vocab_size
        needed = math.ceil(stored * _WEIGHTS_FACTOR) + positions * activations(manifest)
        session = allowed - _CONTEXT - kv - logits
        if session >= needed:
            return GpuPlan(count, kv, logits, session)
    raise StartupError(
        f"the GPU's memory does not hold one sequence of {context_length} tokens: that takes"
        f" {mib(_CONTEXT + kv + logits + needed)} MiB ({mib(needed)} weights and activations, {mib(kv)} keys and"
        f" values, {mib(logits)} logits, {mib(_CONTEXT)} CUDA itself), and {allowed // MIB} MiB are allowed; lower"
        " context_length (--context-length) or prompt_chunk (--prompt-chunk), or allow more (--gpu-memory-mib)"
    )
