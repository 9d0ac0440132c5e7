"""The models to serve. At the start each is checked, named, given a device and a part of the memory, and loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from service import manifest as manifests
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.ort.model import Model
from service.engine.scheduler import Scheduler
from service.errors import StartupError
from service.manifest import Manifest
from service.rpc.parse import Limits
from service.rpc.servicer import ServedModel
from service.serving import gpu_memory, memory
from service.settings import ModelSettings, Settings
from service.telemetry.log import get_logger
from service.telemetry.metrics import Reading
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

_log = get_logger(__name__)

# Tokens that the warm-up generates, so that prefill and decode have both run.
_WARM_UP_TOKENS = 3


@dataclass(frozen=True, slots=True)
class CheckedModel:
    """A model directory whose files have passed all checks, and the settings to serve it with."""

    directory: Path
    settings: Settings
    manifest: Manifest
    aliases: tuple[str, ...] = ()
    memory_mib: int | None = None

    @property
    def context_length(self) -> int:
        """The most tokens of a sequence. Raises StartupError when the setting exceeds what the model supports."""
        supported = self.manifest.context_length
        length = self.settings.context_length or supported
        if length > supported:
            raise StartupError(f"context_length {length} is above the {supported} of {self.directory}")
        return length


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A checked model, its part of the memory in bytes, and the plan that fits into that part."""

    checked: CheckedModel
    budget: int
    plan: memory.Plan


def check(model: ModelSettings) -> CheckedModel:
    """Reads and checks every file of a model directory. Raises ModelDirectoryError when one is missing or damaged."""
    manifest = manifests.load(model.directory)
    manifests.check_external_data(model.directory, manifest)
    return CheckedModel(model.directory, model.settings, manifest, model.aliases, model.memory_mib)


def choose_devices(models: Sequence[CheckedModel]) -> list[CheckedModel]:
    """The models with `device` resolved to `cpu` or `cuda`. Raises StartupError when a device is not available."""
    chosen = [
        replace(model, settings=gpu_memory.with_device(model.manifest, model.settings, model.directory))
        for model in models
    ]
    gpu_memory.check_one_on_gpu({str(model.directory): model.settings for model in chosen})
    return chosen


def aliases(models: Sequence[CheckedModel], extra_aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Each model's aliases, by its id: from its manifest, its settings, and the `extra_aliases` that name its id.

    Raises StartupError when two models claim a name, or when an extra alias names an unknown id.
    """
    known = {model.manifest.id for model in models}
    for alias, target in extra_aliases.items():
        if target not in known:
            raise StartupError(
                f"alias {alias}={target}: no model has this id (--alias); there are {', '.join(sorted(known))}"
            )
    claimed: dict[str, CheckedModel] = {}
    by_id = {}
    for model in models:
        extra = (alias for alias, target in extra_aliases.items() if target == model.manifest.id)
        names = dict.fromkeys((model.manifest.id, *model.manifest.aliases, *model.aliases, *extra))
        for name in names:
            other = claimed.setdefault(name, model)
            if other is not model:
                raise StartupError(
                    f"{other.directory} and {model.directory} both claim the name {name}; change its alias in the"
                    f" settings, export one of them under another name (--id, --alias), or serve only one of them"
                )
        by_id[model.manifest.id] = tuple(names)[1:]
    return by_id


def divide_memory(models: Sequence[CheckedModel], settings: Settings) -> list[PlannedModel]:
    """Divides the memory between models whose devices are chosen. Raises StartupError when a part is too small."""
    claims = [
        memory.claim(
            str(model.directory),
            model.manifest,
            model.settings,
            model.context_length,
            reserved=None if model.memory_mib is None else model.memory_mib * memory.MIB,
            models=len(models),
        )
        for model in models
    ]
    planned = []
    for model, budget in zip(models, memory.divide(claims, memory.budget(settings)), strict=True):
        try:
            fitting = memory.plan(model.manifest, model.settings, model.context_length, budget, len(models))
        except StartupError as error:
            raise StartupError(f"{model.directory}: {error}") from None
        planned.append(PlannedModel(model, budget, fitting))
    return planned


def load(settings: Settings) -> tuple[ServedModel, ...]:
    """Checks and loads the models that the settings name; their engines are not started. Raises StartupError."""
    checked = [check(model) for model in settings.configured_models()]
    names = aliases(checked, settings.alias)
    planned = divide_memory(choose_devices(checked), settings)
    for model in planned:
        _log_plan(model)
    return tuple(_load(model.checked, model.plan.slots, names[model.checked.manifest.id]) for model in planned)


def _log_plan(planned: PlannedModel) -> None:
    slots, max_running = planned.plan.slots, planned.checked.settings.max_running
    fields = {"model": planned.checked.manifest.id, "slots": slots, "max_running": max_running}
    fields["budget_mib"] = planned.budget // memory.MIB
    sizes = ("total", "weights", "kv_slot", "logits", "other")
    fields |= {f"{name}_mib": memory.mib(getattr(planned.plan, name)) for name in sizes}
    if slots < max_running:
        _log.warning("the memory budget holds fewer slots than max_running", **fields)
    else:
        _log.info("the memory budget holds all slots", **fields)


def _load(checked: CheckedModel, slots: int, aliases: tuple[str, ...]) -> ServedModel:
    directory, manifest, settings = checked.directory, checked.manifest, checked.settings
    length = checked.context_length
    device, slots = gpu_memory.place(manifest, settings, length, slots)
    tokenizer = Tokenizer(directory / manifests.TOKENIZER_FILE, manifest.special_tokens, manifest.vocab_size)
    model = Model(
        directory,
        manifest,
        slots=slots,
        context_length=length,
        threads=settings.threads,
        batch_invariant=settings.batch_invariant,
        device=device,
    )
    if not settings.batch_invariant:
        model.tune()
    engine = Engine(
        model,
        tokenizer,
        Scheduler(KVCache(slots), settings.prompt_chunk),
        max_waiting=settings.max_waiting,
        send_timeout=settings.send_timeout_seconds,
        max_queue_seconds=settings.max_queue_seconds,
        name=manifest.id,
    )
    return ServedModel(manifest, tokenizer, engine, Limits(length, settings.max_stops), aliases)


def warm_up_request(model: ServedModel) -> Request:
    """The service's own request that warms up a model: one full prompt chunk and a few decode steps."""
    length = min(model.engine.prompt_chunk, model.limits.context_length - _WARM_UP_TOKENS)
    token = model.manifest.special_tokens.default_prompt or 0  # any token will do
    prompt = Prompt((token,) * length, "", implied=length)
    return Request(
        id="warm-up",
        model=model.manifest.id,
        created=0,
        identity="warm-up",
        prompts=(prompt,),
        max_tokens=_WARM_UP_TOKENS,
        sampling=SamplingParams(temperature=0),
    )


def reading(model: ServedModel) -> Reading:
    """What metrics read from a model's engine at each scrape."""
    engine = model.engine
    stats, reuse, faults = engine.stats, engine.reuse, engine.faults
    return Reading(
        running=stats.running,
        waiting=stats.waiting,
        slots=engine.slots,
        slot_tokens=model.limits.context_length,
        looked_up_tokens=reuse.prompt_tokens,
        cached_tokens=reuse.cached_tokens,
        failed_steps=faults.failed_steps,
        not_finite=faults.not_finite,
        slow_readers=faults.slow_readers,
    )
