"""Plans the memory of the models of one process, and what is left for their KV caches. All sizes are in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.engine import scores
from service.engine.budget import Budget, Share
from service.engine.ort.device import granule
from service.errors import StartupError
from service.host import memory
from service.manifest import TOKENIZER_FILE, WEIGHTS_FILE, Manifest
from service.settings import Settings

MIB = 1 << 20

# The share of the machine's memory for the models, and of the memory that is free at the start, unless the settings
# name a size. The system, its page cache and other processes need the rest.
DEFAULT_SHARE = 0.75
DEFAULT_FREE_SHARE = 0.9
# A model starts when one sequence of this many positions fits, or of its whole context if that is shorter.
LEAST_POSITIONS = 512
# Prompt and completion of a typical request, in tokens.
TYPICAL = 640

# The factors below are upper bounds of measurements with onnxruntime 1.32 on x86-64; docs/sizes.md has some of them.
# Interpreter, libraries, and messages being received and sent.
_PROCESS = 256 * MIB
# Per byte of tokenizer.json: vocabulary and merges as objects, and the parsed file while they are built.
_TOKENIZER_FACTOR = 20
# By form, for each stored byte: onnxruntime packs the matrices into memory of its own, and keeps the table of token
# embeddings in the mapped file. A CPU multiplies float16 matrices in float32, and keeps both copies.
_WEIGHTS_FACTORS = {"float32": 1.25, "float16": 3.0, "int8": 1.1, "int4": 1.1}
# Own kernels read the weights where the file is mapped.
_MAPPED_FACTOR = 1.0
# Activations of one position, per square root of the weights of a layer. The arena grows by doubling.
_ACTIVATIONS_FACTOR = 64
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}
# The float64 rows that the sampler works on, counted in float32 rows of logits.
_SAMPLER_ROWS = 8
# A token of a waiting sequence: its id as an object, once in the prompt and once in the sequence, and its text. The
# queue takes no more tokens than fit.
_WAITING_TOKEN = 64
_MOST_WAITING = 256 * MIB
# A token of a running sequence: its log probability and alternatives as objects, and again in the answer. The sizes of
# answers, and of what waits for a reader, are limited.
_RUNNING_TOKEN = 2048
_MOST_RUNNING = 512 * MIB


@dataclass(frozen=True, slots=True)
class Model:
    """A model to plan for; `name` is for messages, and `reserved` the memory that its settings give to it only."""

    name: str
    manifest: Manifest
    settings: Settings
    reserved: int | None = None

    @property
    def position(self) -> int:
        """Bytes of a position in the process's memory: none if the KV cache is on a GPU.

        With our own kernels the score of its token is kept as well.
        """
        if self.settings.device == "cuda":
            return 0
        kept = scores.most_bytes(self.settings.max_logprobs) if self.manifest.kernels == "own" else 0
        return self.manifest.kv.bytes_per_token + kept

    @property
    def granule(self) -> int:
        """How many positions take memory at once."""
        return granule(self.manifest.kv)

    @property
    def longest(self) -> int:
        """The context that is asked for, or else the model's own."""
        return self.settings.context_length or self.manifest.context_length

    @property
    def least(self) -> int:
        """The positions without which the model does not start."""
        return min(LEAST_POSITIONS, self.longest)


@dataclass(frozen=True, slots=True)
class Plan:
    """The memory of one model.

    `kv`, the memory of the KV cache, holds `positions`; models without a reserved size share it. `share` is the model's
    share of it, None if the KV cache is on a GPU. `other` is the process itself, the tokenizer, activations, and the
    tokens of running and waiting sequences, of which `waiting_tokens` may wait. A sequence has at most `context_length`
    positions.
    """

    slots: int
    weights: int
    logits: int
    other: int
    kv: int
    positions: int
    context_length: int
    waiting_tokens: int
    share: Share | None

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + self.logits + self.other + self.kv

    @property
    def typical_requests(self) -> int:
        """How many requests of TYPICAL tokens run at once."""
        return min(self.slots, self.positions // TYPICAL)


def plan(models: Sequence[Model], allowed: int) -> list[Plan]:
    """The plans of models that share a process, which may take `allowed` bytes, in their order.

    A model with a reserved size gets exactly that; the others share the remainder, and what is left of it beside their
    weights is one budget for the KV caches of all. Raises StartupError when the memory does not hold the weights and a
    sequence of LEAST_POSITIONS, or of the context that the settings ask for.
    """
    reserved = sum(model.reserved or 0 for model in models)
    if reserved > allowed:
        sizes = ", ".join(f"{model.name} {mib(model.reserved)} MiB" for model in models if model.reserved)
        raise StartupError(
            f"the memory_mib of the models' tables exceed the memory: {sizes}, together {mib(reserved)} MiB,"
            f" and {allowed // MIB} MiB are allowed; lower them, or allow more (--memory-mib)"
        )
    sharing = [model for model in models if model.reserved is None]
    plans = {id(model): made for model, made in zip(sharing, _share(sharing, allowed - reserved, models), strict=True)}
    for model in models:
        if model.reserved is not None:
            (plans[id(model)],) = _share([model], model.reserved, models)
    return [plans[id(model)] for model in models]


def _share(sharing: Sequence[Model], allowed: int, models: Sequence[Model]) -> list[Plan]:
    """The plans of those of `models` that share `allowed` bytes."""
    fixed = [_fixed(model, len(models)) for model in sharing]
    left = allowed - sum(weights + logits + other for weights, logits, other in fixed)
    # A call of one row is padded by a row of a slot of its own, which takes the memory of one position.
    left -= sum(model.granule * model.position for model in sharing)
    kv = max((model.least * model.position for model in sharing), default=0)
    if left < kv:
        raise StartupError(_too_little(sharing, fixed, kv, allowed))
    budget = Budget(max(left, 0))
    return [_plan(model, parts, budget) for model, parts in zip(sharing, fixed, strict=True)]


def _too_little(sharing: Sequence[Model], fixed: Sequence[tuple[int, int, int]], kv: int, allowed: int) -> str:
    """The message when models do not fit the memory."""
    sizes = [
        f"{model.name} {mib(weights)} MiB of weights, {mib(logits)} logits, {mib(other)} other"
        for model, (weights, logits, other) in zip(sharing, fixed, strict=True)
    ]
    needed = kv + sum(map(sum, fixed)) + sum(model.granule * model.position for model in sharing)
    least = max(model.least for model in sharing)
    return (
        f"the memory does not hold {'the model' if len(sharing) == 1 else 'the models'} and one sequence of {least}"
        f" tokens: that takes {mib(needed)} MiB ({'; '.join(sizes)}; {mib(kv)} KV cache), and {allowed // MIB} MiB are"
        f" allowed; lower prompt_chunk (--prompt-chunk), max_running (--max-running) or max_waiting (--max-waiting),"
        f" {'' if len(sharing) == 1 else 'serve fewer models, '}or allow more (--memory-mib)"
    )


def _fixed(model: Model, models: int) -> tuple[int, int, int]:
    """The weights, the logits, and everything else that one of `models` models takes beside its KV cache."""
    manifest, settings = model.manifest, model.settings
    slots, chunk = settings.max_running, settings.prompt_chunk
    other = _PROCESS // models + _TOKENIZER_FACTOR * manifest.files[TOKENIZER_FILE].bytes
    other += (chunk + slots + 1) * activations(manifest)
    other += min(model.longest * slots * _RUNNING_TOKEN, _MOST_RUNNING) + _waiting_tokens(model) * _WAITING_TOKEN
    logits = (max(chunk, slots) + _SAMPLER_ROWS) * manifest.vocab_size * 4
    own = manifest.kernels == "own"
    factor = _MAPPED_FACTOR if own else _WEIGHTS_FACTORS[manifest.quantization.weights]
    return int(manifest.weights_bytes * factor), logits, other


def _waiting_tokens(model: Model) -> int:
    """The most tokens of prompts that may wait."""
    return min(model.longest * model.settings.max_waiting, _MOST_WAITING // _WAITING_TOKEN)


def _plan(model: Model, fixed: tuple[int, int, int], budget: Budget) -> Plan:
    """The plan of a model whose KV cache, of at least `model.least` positions, is in `budget`."""
    weights, logits, other = fixed
    slots, size = model.settings.max_running, model.granule * model.position
    share = Share(budget, model.position, model.granule) if size else None
    positions = slots * model.longest if share is None else share.positions
    if model.settings.context_length is not None and positions < model.longest:
        raise StartupError(
            f"{model.name}: context_length {model.longest} does not fit the memory: its KV cache takes"
            f" {mib(model.longest * model.position)} MiB, and {budget.total // MIB} MiB are left beside"
            f" {mib(weights)} MiB of weights; the longest that fits is {positions} (--context-length {positions}), or"
            f" allow more (--memory-mib)"
        )
    return Plan(
        slots=min(slots, positions // model.granule),
        weights=weights,
        logits=logits,
        other=other,
        kv=positions * model.position + size,
        positions=positions,
        context_length=min(model.longest, positions),
        waiting_tokens=_waiting_tokens(model),
        share=share,
    )


def activations(manifest: Manifest) -> int:
    """Bytes of the intermediate results of one position."""
    parameters = manifest.files[WEIGHTS_FILE].bytes / _BYTES_PER_WEIGHT[manifest.quantization.weights]
    return _ACTIVATIONS_FACTOR * math.isqrt(int(parameters / manifest.kv.layers))


def mib(size: int | None) -> int:
    """The size in MiB, rounded up."""
    return math.ceil((size or 0) / MIB)


def allowed(settings: Settings, root: Path = Path("/")) -> int:
    """Bytes that the process may take: `memory_mib`, or else a share of this machine's or container's memory.

    Raises StartupError when `memory_mib` is more than there is.
    """
    there, free = memory.available(root), memory.free(root)
    if settings.memory_mib is None:
        return int(min(DEFAULT_SHARE * there, DEFAULT_FREE_SHARE * free))
    if settings.memory_mib * MIB > there:
        raise StartupError(
            f"memory_mib {settings.memory_mib} is more than the {there // MIB} MiB of this machine, or of the process's"
            f" control group; allow less (--memory-mib)"
        )
    return settings.memory_mib * MIB
