"""Reads the architecture from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from model_export.errors import ExportError
from model_export.sources import rotary
from model_export.sources.checkpoint import Architecture, LayerAttention
from model_export.sources.families import EXPERTS, NATIVE_GGUF, Family, refusal
from model_export.sources.field_types import abbreviated, check_head_size
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.panics import reported_as
from model_export.sources.weights import Floats

# Tensors that divide the rotary frequencies: Llama 3's, and LongRoPE's within and beyond the original context.
LLAMA3_FACTORS, SHORT_FACTORS = "rope_freqs.weight", "rope_factors_short.weight"
FACTORS = (LLAMA3_FACTORS, SHORT_FACTORS, "rope_factors_long.weight")

# The values of optional keys that the builder supports.
OFF, ONCE = (0,), (0, 1)
SUPPORTED: Mapping[str, tuple[float, ...]] = {
    "attn_logit_softcapping": OFF,
    "final_logit_softcapping": OFF,
    "leading_dense_block_count": OFF,
    "nextn_predict_layers": OFF,
    "pooling_type": OFF,
    "use_parallel_residual": OFF,
    "swin_norm": OFF,
    "embedding_scale": ONCE,
    "residual_scale": ONCE,
    "logit_scale": ONCE,
    "attention.causal": (1,),
    "attention.scale": OFF,
    "attention.output_scale": OFF,
    "attention.clamp_kqv": OFF,
    "attention.max_alibi_bias": OFF,
    "attention.temperature_scale": OFF,
    "attention.temperature_length": OFF,
    "attention.shared_kv_layers": OFF,
    "attention.sliding_window_pattern": OFF,
    "rope.freq_base_swa": (),
    "rope.dimension_sections": (),
    "rope.scale_linear": ONCE,
    "rope.scaling.alpha": OFF,
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": OFF,
}


@reported_as("the GGUF file describes no model that can be computed")
def architecture(metadata: Metadata, tensors: Sequence[str], factors: Mapping[str, Floats]) -> Architecture:
    """The architecture of a file with these `tensors` and rotary `factors`.

    Raises ExportError for an architecture that cannot be built.
    """
    name = metadata.require("general.architecture")
    family = NATIVE_GGUF.get(name)
    if family is None:
        raise refusal(name, {"num_experts": metadata.get(f"{name}.expert_count")}, gguf=True)
    heads = metadata.require(f"{name}.attention.head_count")
    hidden = metadata.require(f"{name}.embedding_length")
    head_dim = metadata.get(f"{name}.attention.key_length", hidden // heads)
    check_head_size("the GGUF file", head_dim)
    _check_variant(metadata, family, head_dim)
    rotation = _rotary(metadata, family, head_dim, factors)
    context = int(metadata.require(f"{name}.context_length"))
    context = min(context, rotation.longest or context)
    return Architecture(
        family=family,
        attention=_attention(metadata, family, context),
        hidden_size=hidden,
        intermediate_size=metadata.require(f"{name}.feed_forward_length"),
        heads=heads,
        kv_heads=metadata.get(f"{name}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(metadata.require("tokenizer.ggml.tokens")),
        context_length=context,
        norm_epsilon=metadata.require(f"{name}.attention.layer_norm_rms_epsilon"),
        rotary=rotation,
        local_rotary=None if family.full_every is None else _local_rotary(family, head_dim),
        tied_embedding="output.weight" not in tensors,
        score_divisor=hidden // heads if _layers(metadata, family) == family.scaled_by_width else head_dim,
        biases=frozenset(
            tensor.split(".")[2] for tensor in tensors if tensor.startswith("blk.0.") and tensor.endswith(".bias")
        ),
    )


def _check_variant(metadata: Metadata, family: Family, head_dim: int) -> None:
    """Raises ExportError where a key asks for a computation that the builder does not have."""
    name = family.gguf
    if metadata.get(f"{name}.attention.value_length", head_dim) != head_dim:
        length = metadata[f"{name}.attention.value_length"]
        raise ExportError(f"{name}.attention.value_length is {length}, supported is the head size, {head_dim}")
    if experts := metadata.get(f"{name}.expert_count"):
        raise ExportError(f"{name}.expert_count is {abbreviated(experts)}: {EXPERTS}")
    for key, values in {**SUPPORTED, **_supported_by_layer(metadata, family)}.items():
        if (value := metadata.plain(f"{name}.{key}")) is not None and value not in values:
            allowed = " or ".join(map(abbreviated, values)) or "its absence"
            raise ExportError(f"{name}.{key} of {abbreviated(value)} is not supported; supported is {allowed}")


def _supported_by_layer(metadata: Metadata, family: Family) -> dict[str, tuple[object, ...]]:
    """The values of keys that are supported in a family whose layers differ, as all its models have them."""
    if family.full_every is None:
        return {}
    windowed = [bool((layer + 1) % family.full_every) for layer in range(_layers(metadata, family))]
    return {
        "attention.sliding_window_pattern": (family.full_every, windowed),
        "rope.freq_base_swa": (family.local_rotary_base,),
        "rope.scaling.type": ("none", "linear"),
    }


def _layers(metadata: Metadata, family: Family) -> int:
    return int(metadata.require(f"{family.gguf}.block_count"))


def _attention(metadata: Metadata, family: Family, context: int) -> tuple[LayerAttention, ...]:
    """The attention of each layer. A window as long as the context is no window."""
    layers = _layers(metadata, family)
    size = metadata.get(f"{family.gguf}.attention.sliding_window") or context
    window = size if size < context else None
    if family.full_every is not None:
        local = [(layer + 1) % family.full_every != 0 for layer in range(layers)]
        return tuple(LayerAttention(window if is_local else None, local=is_local) for is_local in local)
    interval = family.unrotated_every or layers + 1
    return tuple(LayerAttention(window, rotary=(layer + 1) % interval != 0) for layer in range(layers))


def _local_rotary(family: Family, head_dim: int) -> rotary.Rotary:
    """The rotation of layers with a window, where it is not that of the others."""
    return rotary.Rotary(rotary.plain(head_dim, family.local_rotary_base))


def _rotary(metadata: Metadata, family: Family, head_dim: int, factors: Mapping[str, Floats]) -> rotary.Rotary:
    scaling = f"{family.gguf}.rope.scaling."
    base = float(metadata.get(f"{family.gguf}.rope.freq_base", family.rotary_base if family.full_every else 10000.0))
    size = rotary.checked_size(metadata.get(f"{family.gguf}.rope.dimension_count", head_dim), head_dim)
    if (family.gguf_adjacent_pairs or family.full_every) and size != head_dim:
        raise ExportError(f"{family.gguf}.rope.dimension_count is {size}, supported is the head size, {head_dim}")
    for name, values in factors.items():
        if values.shape != (size // 2,):
            raise ExportError(f"tensor {name} has shape {list(values.shape)}, expected {[size // 2]}")
    plain = rotary.plain(size, base, factors.get(LLAMA3_FACTORS, 1.0))
    if SHORT_FACTORS in factors:
        original = int(metadata.require(scaling + "original_context_length"))
        if metadata.get(scaling + "factor") not in (None, 1):
            factor = metadata[scaling + "factor"]
            raise ExportError(f"{scaling}factor is {factor}, supported beside a tensor {SHORT_FACTORS} is 1")
        factor = metadata.require(f"{family.gguf}.context_length") / original
        scale = metadata.get(scaling + "attn_factor") or rotary.longrope_scale(factor, original)
        return rotary.Rotary(rotary.plain(size, base, factors[SHORT_FACTORS]), scale, longest=original)
    match metadata.get(scaling + "type", "linear" if scaling + "factor" in metadata else "none"):
        case "none":
            return rotary.Rotary(plain)
        case "linear":
            return rotary.Rotary(plain / float(metadata.require(scaling + "factor")))
        case "yarn":
            if LLAMA3_FACTORS in factors:
                raise ExportError(
                    f"{scaling}type is yarn, supported beside a tensor {LLAMA3_FACTORS} are none and linear"
                )
            factor = float(metadata.require(scaling + "factor"))
            original = int(metadata.require(scaling + "original_context_length"))
            beta_fast = float(metadata.get(scaling + "yarn_beta_fast", 32))
            beta_slow = float(metadata.get(scaling + "yarn_beta_slow", 1))
            scale = rotary.yarn_scale(factor) * metadata.get(scaling + "attn_factor", 1.0)
            return rotary.Rotary(
                rotary.yarn(size, base, factor, original, beta_fast=beta_fast, beta_slow=beta_slow), scale
            )
        case other:
            known = "none, linear, yarn, and llama3 and longrope by their factor tensors"
            raise ExportError(f"{scaling}type is {other!r}, supported are {known}")
