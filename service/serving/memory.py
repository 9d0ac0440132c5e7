"""How much memory the process takes at most, and how many slots of keys and values that leaves. All sizes in bytes."""

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

# Where nothing else is asked for: the rest is for the system, its page cache and what else runs.
DEFAULT_SHARE = 0.75

# The factors below are upper bounds of what was measured with onnxruntime 1.32 on x86-64.
# Interpreter, libraries, and messages on their way in and out.
_PROCESS = 256 * MIB
# Vocabulary and merges as objects, and the parsed file while they are made, per byte of tokenizer.json.
_TOKENIZER_FACTOR = 20
# onnxruntime packs the matrices anew; of the mapped file the token embeddings stay as well.
_WEIGHTS_FACTOR = 1.5
# A processor multiplies matrices of float16 as float32, and keeps them both ways.
_HALVES_FACTOR = 3.0
# A position's activations in the arena, which grows by doubling, per square root of the weights of a layer.
_ACTIVATIONS_FACTOR = 64
_BYTES_PER_WEIGHT = {"float32": 4.0, "float16": 2.0, "int8": 1.0, "int4": 0.5, "int4z": 0.5}
# Rows of float64 that choosing a token works on, in rows of logits.
_SAMPLER_ROWS = 8
# A token of a waiting sequence: its id as an object, in the prompt and in the sequence, and its text.
_WAITING_TOKEN = 64
# A token of a running sequence: its score and alternatives as objects, and again in the answer.
_RUNNING_TOKEN = 2048


@dataclass(frozen=True, slots=True)
class Plan:
    """What the process takes at most while `slots` sequences run, each as long as the context.

    `kv_slot` are the keys and values of one slot; the model has one slot more than sequences run. `other` is everything
    that has no name here: the process itself, tokenizer, activations, and the tokens of running and waiting sequences.
    """

    slots: int
    weights: int
    kv_slot: int
    logits: int
    other: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + (self.slots + 1) * self.kv_slot + self.logits + self.other


@dataclass(frozen=True, slots=True)
class Claim:
    """What a model claims of the budget: `least` for one sequence, `most` for all; or just its `own`, if it has one."""

    name: str
    least: int
    most: int
    own: int | None = None


def claim(
    name: str, manifest: Manifest, settings: Settings, context_length: int, *, own: int | None, models: int
) -> Claim:
    """A model's claim, where so many models share the process."""
    least, most = (
        _plan(manifest, settings, context_length, slots, models).total for slots in (1, settings.max_running)
    )
    return Claim(name, least, most, own)


def divide(claims: Sequence[Claim], allowed: int) -> list[int]:
    """Each model's part, together never more than `allowed`.

    Models with a budget of their own get that. Of the rest each gets its least, and what is left then in proportion to
    what more the models could use. Raises StartupError when that does not fit.
    """
    own = [each for each in claims if each.own is not None]
    shared = [each for each in claims if each.own is None]
    left = allowed - sum(each.own or 0 for each in own)
    if left < 0:
        named = ", ".join(f"{each.name} {mib(each.own or 0)} MiB" for each in own)
        raise StartupError(
            f"the models' own memory_mib come to more than all may take: {named}, together {mib(allowed - left)} MiB,"
            f" and {allowed // MIB} MiB are allowed; lower them, or allow more (--memory-mib)"
        )
    spare = left - sum(each.least for each in shared)
    if spare < 0 and len(claims) > 1:
        named = ", ".join(f"{each.name} {mib(each.least)} MiB" for each in shared)
        raise StartupError(
            f"the memory does not hold one sequence of each model: that takes {named}, and {left // MIB} MiB are"
            f" {'left beside what others have of their own' if own else 'allowed'}; lower context_length,"
            f" prompt_chunk or max_waiting, serve fewer models, or allow more (--memory-mib)"
        )
    wanted = sum(each.most - each.least for each in shared)

    def part(each: Claim) -> int:
        if each.own is not None:
            return each.own
        more = spare * (each.most - each.least) // wanted if wanted else spare // len(shared)
        return each.least + more

    return [part(each) for each in claims]


def plan(manifest: Manifest, settings: Settings, context_length: int, allowed: int, models: int = 1) -> Plan:
    """The plan of the most slots, up to `max_running`, that stays within `allowed`.

    Where several `models` share the process, each bears its part of what that takes by itself. Raises StartupError when
    not even one slot fits.
    """
    for slots in range(settings.max_running, 0, -1):
        made = _plan(manifest, settings, context_length, slots, models)
        if made.total <= allowed:
            return made
    raise StartupError(
        f"the memory does not hold one sequence of {context_length} tokens: that takes {mib(made.total)} MiB"
        f" ({mib(made.weights)} weights, 2 x {mib(made.kv_slot)} keys and values, {mib(made.logits)} logits,"
        f" {mib(made.other)} other), and {allowed // MIB} MiB are allowed; lower context_length (--context-length),"
        f" prompt_chunk (--prompt-chunk) or max_waiting (--max-waiting), or allow more (--memory-mib)"
    )


def _plan(manifest: Manifest, settings: Settings, context_length: int, slots: int, models: int) -> Plan:
    stored = sum(entry.bytes for name, entry in manifest.files.items() if name.endswith(".onnx.data"))
    rows = max(settings.prompt_chunk, slots) + _SAMPLER_ROWS
    tokens = context_length * (slots * _RUNNING_TOKEN + settings.max_waiting * _WAITING_TOKEN)
    tokenizer = _TOKENIZER_FACTOR * manifest.files[TOKENIZER_FILE].bytes
    return Plan(
        slots=slots,
        weights=int(stored * (_HALVES_FACTOR if manifest.quantization.weights == "float16" else _WEIGHTS_FACTOR)),
        kv_slot=0 if settings.device == "cuda" else context_length * manifest.kv.bytes_per_token,
        logits=rows * manifest.vocab_size * 4,
        other=_PROCESS // models + tokenizer + (settings.prompt_chunk + slots + 1) * activations(manifest) + tokens,
    )


def activations(manifest: Manifest) -> int:
    """What the intermediate results of one position take."""
    parameters = manifest.files[WEIGHTS_FILE].bytes / _BYTES_PER_WEIGHT[manifest.quantization.weights]
    return _ACTIVATIONS_FACTOR * math.isqrt(int(parameters / manifest.kv.layers))


def mib(size: int) -> int:
    """The size in MiB, rounded up."""
    return math.ceil(size / MIB)


def budget(settings: Settings, root: Path = Path("/")) -> int:
    """What the process may take: `memory_mib`, else its default share of the machine or container."""
    if settings.memory_mib is not None:
        return settings.memory_mib * MIB
    return int(DEFAULT_SHARE * available(root))
