"""The models to serve. At the start each is checked, named, given a device and a part of the memory, and loaded."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from service import manifest as manifests
from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.ort.device import check_kernels
from service.engine.ort.model import Model
from service.engine.scheduler import LEAST_CHUNK, Scheduler
from service.errors import ModelDirectoryError, StartupError
from service.manifest import Manifest
from service.rpc.parse import Limits
from service.rpc.servicer import ServedModel
from service.serving import gpu_memory, memory
from service.serving.fingerprint import fingerprint, parts
from service.settings import ModelSettings, Settings
from service.telemetry.log import get_logger
from service.telemetry.metrics import Reading
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

_log = get_logger(__name__)

# Tokens that each request of the warm-up generates, so that prefill and decode have both run.
_WARM_UP_TOKENS = 2
# The longest that a full prompt chunk may take in the warm-up.
_WARM_UP_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class ReadModel:
    """A model directory whose manifest has been read, and the settings to serve it with."""

    directory: Path
    settings: Settings
    manifest: Manifest
    aliases: tuple[str, ...] = ()
    memory_mib: int | None = None


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A model, its device chosen, and its part of the memory; the process may take `allowed` bytes in all."""

    read: ReadModel
    plan: memory.Plan
    allowed: int


def read(model: ModelSettings) -> ReadModel:
    """Reads a model directory's manifest; the files must be there in full, and their contents are not looked at yet.

    Raises ModelDirectoryError when something is missing, in the directory or of the kernels that it needs, and
    StartupError when the settings ask for a context that the model does not support.
    """
    manifest = manifests.read(model.directory)
    if manifest.kernels == "own":
        check_kernels(model.directory)
    length = model.settings.context_length
    if length is not None and length > manifest.context_length:
        raise StartupError(f"context_length {length} is above the {manifest.context_length} of {model.directory}")
    return ReadModel(model.directory, model.settings, manifest, model.aliases, model.memory_mib)


def check_parsed_files(model: ReadModel) -> None:
    """Raises ModelDirectoryError when graphs or tokenizer are not those that the manifest describes."""
    with manifests.hashes_checked(manifests.parsed_files(model.directory, model.manifest)):
        pass
    manifests.check_external_data(model.directory, model.manifest)


def weights_checked(models: Iterable[ReadModel]) -> AbstractContextManager[None]:
    """Checks the weights of models beside the body of a `with`, which raises ModelDirectoryError at its end."""
    weights = (manifests.weights_files(model.directory, model.manifest) for model in models)
    return manifests.hashes_checked(dict(chain.from_iterable(files.items() for files in weights)))


def choose_devices(models: Sequence[ReadModel]) -> list[ReadModel]:
    """The models with `device` resolved to `cpu` or `cuda`. Raises StartupError when a device is not available."""
    chosen = [
        replace(model, settings=gpu_memory.with_device(model.manifest, model.settings, model.directory))
        for model in models
    ]
    gpu_memory.check_one_on_gpu({str(model.directory): model.settings for model in chosen})
    return chosen


def aliases(models: Sequence[ReadModel], extra_aliases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Each model's aliases, by its id: from its manifest, its settings, and the `extra_aliases` that name its id.

    Raises StartupError when two models claim a name, or when an extra alias names an unknown id.
    """
    known = {model.manifest.id for model in models}
    for alias, target in extra_aliases.items():
        if target not in known:
            raise StartupError(
                f"alias {alias}={target}: no model has this id (--alias); there are {', '.join(sorted(known))}"
            )
    claimed: dict[str, ReadModel] = {}
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


def divide_memory(models: Sequence[ReadModel], settings: Settings) -> list[PlannedModel]:
    """Divides the memory between models whose devices are chosen. Raises StartupError when it is too little."""
    wanted = [
        memory.Model(
            str(model.directory),
            model.manifest,
            model.settings,
            reserved=None if model.memory_mib is None else model.memory_mib * memory.MIB,
        )
        for model in models
    ]
    allowed = memory.allowed(settings)
    plans = memory.plan(wanted, allowed)
    return [PlannedModel(model, plan, allowed) for model, plan in zip(models, plans, strict=True)]


def load(settings: Settings) -> tuple[ServedModel, ...]:
    """Plans, checks and loads the models that the settings name; their engines are not started. Raises StartupError.

    Graphs and tokenizers are checked before they are parsed, and the weights while they are loaded.
    """
    found = [read(model) for model in settings.configured_models()]
    names = aliases(found, settings.alias)
    planned = divide_memory(choose_devices(found), settings)
    for model in planned:
        _log_plan(model)
    for each in found:
        check_parsed_files(each)
    with weights_checked(found):
        return tuple(_load(model, names[model.read.manifest.id]) for model in planned)


def _log_plan(planned: PlannedModel) -> None:
    plan, own = planned.plan, planned.read.manifest.context_length
    sizes = {f"{name}_mib": memory.mib(getattr(plan, name)) for name in ("total", "weights", "kv", "logits", "other")}
    fields: dict[str, str | int] = {"model": planned.read.manifest.id, "kernels": planned.read.manifest.kernels}
    fields |= {"positions": plan.positions, "max_model_len": plan.context_length, "slots": plan.slots}
    fields |= {f"requests_of_{memory.TYPICAL}_tokens": plan.typical_requests} | sizes
    if planned.read.settings.context_length is None and plan.context_length < own:
        _log.warning(f"the memory holds fewer positions than the model's own context of {own}", **fields)
    else:
        _log.info("the memory is planned", **fields)


def _load(planned: PlannedModel, aliases: tuple[str, ...]) -> ServedModel:
    directory, manifest, settings = planned.read.directory, planned.read.manifest, planned.read.settings
    device, slots, length = gpu_memory.place(manifest, settings, planned.plan)
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
    # A GPU has reserved the memory of all slots, so their number is the only limit.
    share = planned.plan.share or Share(Budget(slots * length))
    engine = Engine(
        model,
        tokenizer,
        Scheduler(
            KVCache(slots, share, exact=manifest.kernels == "own"),
            settings.prompt_chunk,
            settings.step_seconds,
            patience=settings.max_queue_seconds / 2,
        ),
        max_waiting=settings.max_waiting,
        max_waiting_tokens=planned.plan.waiting_tokens,
        send_timeout=settings.send_timeout_seconds,
        max_queue_seconds=settings.max_queue_seconds,
        name=manifest.id,
    )
    return ServedModel(
        manifest,
        tokenizer,
        engine,
        Limits(length, settings.max_stops, settings.parse_special, settings.max_logprobs),
        aliases,
        _chat_template(directory, manifest),
        fingerprint(parts(manifest, settings)),
        settings.always_fingerprint,
    )


def _chat_template(directory: Path, manifest: Manifest) -> str | None:
    """The model's chat template; None if it has none. Raises ModelDirectoryError if it is too large or not UTF-8."""
    entry = manifest.files.get(manifests.CHAT_TEMPLATE_FILE)
    if entry is None:
        return None
    path, limit = directory / manifests.CHAT_TEMPLATE_FILE, manifests.LARGEST_CHAT_TEMPLATE
    if entry.bytes > limit:
        raise ModelDirectoryError(f"{path} has {entry.bytes} bytes, expected at most {limit}")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ModelDirectoryError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None


def warm_up_requests(model: ServedModel) -> Iterator[Request]:
    """The service's own requests that warm up a model; each has to be answered before the next is taken.

    A single token, the smallest prompt chunk, and a full one if it will take at most _WARM_UP_SECONDS: on a slow model
    that would delay the start by more than it saves the first caller. From each the engine learns how long a larger
    chunk may take before it counts as a hang.
    """
    full = min(model.engine.prompt_chunk, model.limits.context_length - _WARM_UP_TOKENS)
    small = min(full, LEAST_CHUNK)
    yield _warm_up_request(model, 0, 1)
    began = time.monotonic()
    yield _warm_up_request(model, 1, small)
    if small < full and (time.monotonic() - began) * full / small <= _WARM_UP_SECONDS:
        yield _warm_up_request(model, 2, full)


def _warm_up_request(model: ServedModel, number: int, length: int) -> Request:
    """A prompt of one token again and again: another one for each `number`, so that the prefix cache has none of it."""
    token = ((model.manifest.special_tokens.default_prompt or 0) + number) % model.manifest.vocab_size
    return Request(
        id="warm-up",
        model=model.manifest.id,
        created=0,
        identity="warm-up",
        prompts=(Prompt((token,) * length, "", implied=length),),
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
        positions=engine.positions,
        free_positions=engine.free_positions,
        looked_up_tokens=reuse.prompt_tokens,
        cached_tokens=reuse.cached_tokens,
        failed_steps=faults.failed_steps,
        not_finite=faults.not_finite,
        slow_readers=faults.slow_readers,
    )
