"""Reads the architecture that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model_export import rotary
from model_export.checkpoint import Architecture, Attention
from model_export.errors import ExportError
from model_export.families import OWN, refusal
from model_export.gguf_metadata import Metadata
from model_export.rotary import Rotary
from model_export.weights import Floats

# Tensors that slow the rotation down: Llama 3's, and LongRoPE's within the original context and beyond it.
LLAMA3_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_short.weight"
FACTORS = (LLAMA3_FACTORS, SHORT_FACTORS, "rope_factors_long.weight")

# Families whose files store a head's rotary pairs side by side.
PAIRS_SIDE_BY_SIDE = ("llama", "smollm3")
# Of SmolLM3's layers every fourth does not rotate; its files do not say so.
PLAIN_INTERVAL = 4


def architecture(metadata: Metadata, tensors: Sequence[str], factors: Mapping[str, Floats]) -> Architecture:
    """The architecture of a file with these `tensors` and rotary `factors`.

    Raises ExportError for one that the builder does not build.
    """
    family = metadata.require("general.architecture")
    if family not in OWN:
        raise refusal(family, {"num_experts": metadata.get(f"{family}.expert_count")})
    heads = metadata.require(f"{family}.attention.head_count")
    hidden = metadata.require(f"{family}.embedding_length")
    head_dim = metadata.get(f"{family}.attention.key_length", hidden // heads)
    _refuse_variants(metadata, family, head_dim)
    turning = _rotary(metadata, family, head_dim, factors)
    context = int(metadata.require(f"{family}.context_length"))
    context = min(context, turning.longest or context)
    return Architecture(
        family=family,
        attention=_attention(metadata, family, context),
        hidden_size=hidden,
        intermediate_size=metadata.require(f"{family}.feed_forward_length"),
        heads=heads,
        kv_heads=metadata.get(f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(metadata.require("tokenizer.ggml.tokens")),
        context_length=context,
        norm_epsilon=metadata.require(f"{family}.attention.layer_norm_rms_epsilon"),
        rotary=turning,
        tied_embedding="output.weight" not in tensors,
        biases=frozenset(
            name.split(".")[2] for name in tensors if name.startswith("blk.0.") and name.endswith(".bias")
        ),
        qk_norm=family == "qwen3",
    )


def _refuse_variants(metadata: Metadata, family: str, head_dim: int) -> None:
    if metadata.get(f"{family}.attention.value_length", head_dim) != head_dim:
        raise ExportError(f"{family}.attention.value_length other than the head size {head_dim} is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "expert_count", "logit_scale"):
        if metadata.get(f"{family}.{key}"):
            raise ExportError(f"{family}.{key} is not supported")


def _attention(metadata: Metadata, family: str, context: int) -> tuple[Attention, ...]:
    """How each layer attends. A window that spans the whole context is none."""
    layers = metadata.require(f"{family}.block_count")
    window = metadata.get(f"{family}.attention.sliding_window") or context
    interval = PLAIN_INTERVAL if family == "smollm3" else layers + 1
    return tuple(
        Attention(window if window < context else None, rotary=(layer + 1) % interval != 0) for layer in range(layers)
    )


def _rotary(metadata: Metadata, family: str, head_dim: int, factors: Mapping[str, Floats]) -> Rotary:
    def scaling(key: str) -> float | None:
        value: float | None = metadata.get(f"{family}.rope.scaling.{key}")
        return value

    def needed(key: str) -> float:
        return float(metadata.require(f"{family}.rope.scaling.{key}"))

    base = float(metadata.get(f"{family}.rope.freq_base", 10000.0))
    size = rotary.checked_size(metadata.get(f"{family}.rope.dimension_count", head_dim), head_dim)
    if family in PAIRS_SIDE_BY_SIDE and size != head_dim:
        raise ExportError(f"{family}.rope.dimension_count other than the head size {head_dim} is not supported")
    for name, values in factors.items():
        if values.shape != (size // 2,):
            raise ExportError(f"tensor {name} has shape {list(values.shape)}, expected {[size // 2]}")
    plain = rotary.plain(size, base, factors.get(LLAMA3_FACTORS, 1.0))
    if SHORT_FACTORS in factors:
        original = int(needed("original_context_length"))
        factor = metadata.require(f"{family}.context_length") / original
        scale = scaling("attn_factor") or rotary.longrope_scale(factor, original)
        return Rotary(rotary.plain(size, base, factors[SHORT_FACTORS]), scale, longest=original)
    match metadata.get(f"{family}.rope.scaling.type", "none"):
        case "none":
            return Rotary(plain)
        case "linear":
            return Rotary(plain / needed("factor"))
        case "yarn":
            factor, original = needed("factor"), int(needed("original_context_length"))
            scale = rotary.yarn_scale(factor) * (scaling("attn_factor") or 1.0)
            return Rotary(rotary.yarn(size, base, factor, original), scale)
        case other:
            known = "none, linear, yarn, llama3 and longrope"
            raise ExportError(f"rotary scaling {other!r} is not supported; supported are {known}")
