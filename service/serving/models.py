"""The models that are served: all are checked, named, given their parts of the memory, and loaded at the start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

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

# What is generated to warm up: the prompt's step, and steps of the other graph.
_WARM_UP_TOKENS = 3


@dataclass(frozen=True, slots=True)
class Checked:
    """A model directory whose files are what they should be, and what it is to be served with."""

    given: ModelSettings
    manifest: Manifest

    @property
    def context_length(self) -> int:
        """The most tokens of a sequence. Raises StartupError when it is set to more than the model can."""
        own = self.manifest.context_length
        length = self.given.settings.context_length or own
        if length > own:
            raise StartupError(f"context_length {length} is above the {own} of {self.given.directory}")
        return length


def check(given: ModelSettings) -> Checked:
    """Reads all of a model directory. Raises StartupError when it is not sound."""
    manifest = manifests.load(given.directory)
    manifests.check_external_data(given.directory, manifest)
    return Checked(given, manifest)


def settle(models: Sequence[Checked]) -> list[Checked]:
    """The models, each on the device that it is to have. Raises StartupError where one cannot be had."""
    settled = []
    for model in models:
        own = gpu_memory.settled(model.manifest, model.given.settings, model.given.directory)
        settled.append(replace(model, given=replace(model.given, settings=own)))
    gpu_memory.check_apart({str(model.given.directory): model.given.settings for model in settled})
    return settled


def aliases(models: Sequence[Checked], more: Mapping[str, str]) -> list[tuple[str, ...]]:
    """The names besides its id of each model: its manifest's, its settings', and of `more` those that lead to its id.

    Raises StartupError when a name would stand for two models, or for none.
    """
    known = {model.manifest.id for model in models}
    for alias, target in more.items():
        if target not in known:
            raise StartupError(
                f"alias {alias}={target}: no model has this id (--alias); there are {', '.join(sorted(known))}"
            )
    claimed: dict[str, Checked] = {}
    found = []
    for model in models:
        further = (alias for alias, target in more.items() if target == model.manifest.id)
        names = dict.fromkeys((model.manifest.id, *model.manifest.aliases, *model.given.aliases, *further))
        for name in names:
            other = claimed.setdefault(name, model)
            if other is not model:
                raise StartupError(
                    f"{other.given.directory} and {model.given.directory} both claim the name {name}; change its"
                    f" alias in the settings, export one of them by another (--id, --alias), or serve one alone"
                )
        found.append(tuple(names)[1:])
    return found


def plans(models: Sequence[Checked], settings: Settings) -> list[tuple[int, memory.Plan]]:
    """Each settled model's part of the memory, in bytes, and what it takes. Raises StartupError if one is too small."""
    count = len(models)
    claims = []
    for model in models:
        own = None if model.given.memory_mib is None else model.given.memory_mib * memory.MIB
        of, name = model.given.settings, str(model.given.directory)
        claims.append(memory.claim(name, model.manifest, of, model.context_length, own=own, models=count))
    made = []
    for model, part in zip(models, memory.divide(claims, memory.budget(settings)), strict=True):
        try:
            plan = memory.plan(model.manifest, model.given.settings, model.context_length, part, count)
        except StartupError as error:
            raise StartupError(f"{model.given.directory}: {error}") from None
        made.append((part, plan))
    return made


def load(settings: Settings) -> tuple[ServedModel, ...]:
    """The models that the settings name, checked and ready to start. Raises StartupError."""
    models = [check(given) for given in settings.each_model()]
    names = aliases(models, settings.alias)
    models = settle(models)
    parts = plans(models, settings)
    for model, (part, plan) in zip(models, parts, strict=True):
        _log_plan(model, part, plan)
    return tuple(_load(model, plan.slots, also) for model, (_, plan), also in zip(models, parts, names, strict=True))


def _log_plan(model: Checked, part: int, plan: memory.Plan) -> None:
    most = model.given.settings.max_running
    fields = {"model": model.manifest.id, "slots": plan.slots, "max_running": most, "budget_mib": part // memory.MIB}
    sizes = ("total", "weights", "kv_slot", "logits", "other")
    fields |= {f"{name}_mib": memory.mib(getattr(plan, name)) for name in sizes}
    if plan.slots < most:
        _log.warning("the memory budget holds fewer slots than max_running", **fields)
    else:
        _log.info("the memory budget holds all slots", **fields)


def _load(checked: Checked, slots: int, also: tuple[str, ...]) -> ServedModel:
    directory, manifest, settings = checked.given.directory, checked.manifest, checked.given.settings
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
    return ServedModel(manifest, tokenizer, engine, Limits(length, settings.max_stops), also)


def warm_up_request(model: ServedModel) -> Request:
    """A whole chunk of a prompt and a few tokens after it, for nobody."""
    length = min(model.engine.prompt_chunk, model.limits.context_length - _WARM_UP_TOKENS)
    token = model.manifest.special_tokens.default_prompt or 0  # any will do
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
    """The numbers of a model's engine at this moment."""
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
