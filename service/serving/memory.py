"""Computes the most memory that the process can take, and how many KV cache slots fit. All sizes are in bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from service.errors import StartupError
from service.host.memory import available
from service.manifest import TOKENIZER_FILE, WEIGHTS_FILE, Manifest
from service.settings import Settings

MIB = 1 << 20

# The share of the machine's memory for the models, unless the settings name a size. The system, its page cache and
# other processes need the rest.
DEFAULT_SHARE = 0.75

# The factors below are upper bounds of measurements with onnxruntime 1.32 on x86-64.
# Interpreter, libraries, and messages being received and sent.
_PROCESS = 256 * MIB
# Per byte of tokenizer.json: vocabulary and merges as objects, and the parsed file while they are built.
_TOKENIZER_FACTOR = 20
# onnxruntime packs the matrices into memory of its own, and keeps the token embeddings of the mapped file as well.
_WEIGHTS_FACTOR = 1.5
# A CPU multiplies float16 matrices in float32, and keeps both copies.
_FLOAT16_FACTOR = 3.0
# Activations of one position, per square root of the weights of a layer. The arena grows by doubling.
_ACTIVATIONS_FACTOR = 64
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "int4-int8": 0.5}
# The float64 rows that the sampler works on, counted in float32 rows of logits.
_SAMPLER_ROWS = 8
# A token of a waiting sequence: its id as an object, once in the prompt and once in the sequence, and its text.
_WAITING_TOKEN = 64
# A token of a running sequence: its log probability and alternatives as objects, and again in the answer.
_RUNNING_TOKEN = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """The most memory that one model takes while `slots` sequences run, each as long as the context.

    `kv_slot` is the KV cache of one slot; the model has one slot more than `slots`. `other` is everything else: the
    process itself, tokenizer, activations, and the tokens of running and waiting sequences.
    """

    slots: int
    weights: int
    kv_slot: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.weights + (self.slots + 1) * self.kv_slot + self.logits + self.other


@dataclass(frozen=True, slots=True)
class Claim:
    """Memory that one model claims: `least` for one sequence, `most` for `max_running`, or exactly `reserved`."""

    name: str
    least: int
    most: int
    reserved: int | None = None


def claim(
    name: str, manifest: Manifest, settings: Settings, context_length: int, *, reserved: int | None, models: int
) -> Claim:
    """The claim of one of `models` models that share the process."""
    least, most = (
        _plan(manifest, settings, context_length, slots, models).total for slots in (1, settings.max_running)
    )
    return Claim(name, least, most, reserved)


def divide(claims: Sequence[Claim], allowed: int) -> list[int]:
    """Each model's part of `allowed`, in the order of the claims; the sum never exceeds `allowed`.

    A model with a reserved size gets exactly that. Each of the others gets its `least`, and the remainder is divided in
    proportion to `most - least`. Raises StartupError when that does not fit.
    """
    reserving = [claim for claim in claims if claim.reserved is not None]
    sharing = [claim for claim in claims if claim.reserved is None]
    shared = allowed - sum(claim.reserved or 0 for claim in reserving)
    if shared < 0:
        sizes = ", ".join(f"{claim.name} {mib(claim.reserved or 0)} MiB" for claim in reserving)
        raise StartupError(
            f"the memory_mib of the models' tables exceed the memory: {sizes}, together {mib(allowed - shared)} MiB,"
            f" and {allowed // MIB} MiB are allowed; lower them, or allow more (--memory-mib)"
        )
    spare = shared - sum(claim.least for claim in sharing)
    if spare < 0 and len(claims) > 1:
        sizes = ", ".join(f"{claim.name} {mib(claim.least)} MiB" for claim in sharing)
        raise StartupError(
            f"the memory does not hold one sequence of each model: that takes {sizes}, and {shared // MIB} MiB are"
            f" {'left by models with a memory_mib in their table' if reserving else 'allowed'}; lower context_length,"
            f" prompt_chunk or max_waiting, serve fewer models, or allow more (--memory-mib)"
        )
    wanted = sum(claim.most - claim.least for claim in sharing)

    def part(claim: Claim) -> int:
        if claim.reserved is not None:
            return claim.reserved
        extra = spare * (claim.most - claim.least) // wanted if wanted else spare // len(sharing)
        return claim.least + extra

    return [part(claim) for claim in claims]


def plan(manifest: Manifest, settings: Settings, context_length: int, allowed: int, models: int = 1) -> Plan:
    """The plan with the most slots, up to `max_running`, that fits into `allowed` bytes.

    When several `models` share the process, the memory of the process itself is split evenly between them. Raises
    StartupError when not even one slot fits.
    """
    for slots in range(settings.max_running, 0, -1):
        planned = _plan(manifest, settings, context_length, slots, models)
        if planned.total <= allowed:
            return planned
    raise StartupError(
        f"the memory does not hold one sequence of {context_length} tokens: that takes {mib(planned.total)} MiB"
        f" ({mib(planned.weights)} weights, 2 x {mib(planned.kv_slot)} KV cache, {mib(planned.logits)} logits,"
        f" {mib(planned.other)} other), and {allowed // MIB} MiB are allowed; lower context_length (--context-length),"
        f" prompt_chunk (--prompt-chunk) or max_waiting (--max-waiting), or allow more (--memory-mib)"
    )


def _plan(manifest: Manifest, settings: Settings, context_length: int, slots: int, models: int) -> Plan:
    stored = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(".onnx.data"))
    rows = max(settings.prompt_chunk, slots) + _SAMPLER_ROWS
    tokens = context_length * (slots * _RUNNING_TOKEN + settings.max_waiting * _WAITING_TOKEN)
    tokenizer = _TOKENIZER_FACTOR * manifest.files[TOKENIZER_FILE].bytes
    return Plan(
        slots=slots,
        weights=int(stored * (_FLOAT16_FACTOR if manifest.quantization.weights == "float16" else _WEIGHTS_FACTOR)),
        kv_slot=0 if settings.device == "cuda" else context_length * manifest.kv.bytes_per_token,
        logits=rows * manifest.vocab_size * 4,
        other=_PROCESS // models + tokenizer + (settings.prompt_chunk + slots + 1) * activations(manifest) + tokens,
    )


def activations(manifest: Manifest) -> int:
    """Bytes of the intermediate results of one position."""
    parameters = manifest.files[WEIGHTS_FILE].bytes / _BYTES_PER_WEIGHT[manifest.quantization.weights]
    return _ACTIVATIONS_FACTOR * math.isqrt(int(parameters / manifest.kv.layers))


def mib(size: int) -> int:
    """The size in MiB, rounded up."""
    return math.ceil(size / MIB)


def budget(settings: Settings, root: Path = Path("/")) -> int:
    """Bytes that the process may take: `memory_mib`, or else the default share of the available memory."""
    if settings.memory_mib is not None:
        return settings.memory_mib * MIB
    return int(DEFAULT_SHARE * available(root))
