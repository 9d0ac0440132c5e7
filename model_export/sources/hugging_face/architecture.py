"""Reads the architecture from the config.json of a Hugging Face directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from model_export.errors import ExportError
from model_export.sources import rotary
from model_export.sources.checkpoint import Architecture, LayerAttention
from model_export.sources.families import NATIVE, Family, ScalingKind, Windows, refusal
from model_export.sources.field_types import check_head_size
from model_export.sources.hugging_face.config import Config, Rotation
from model_export.sources.panics import reported_as

# Two names of one function.
ACTIVATIONS = ("silu", "swish")


@reported_as("config.json describes no model that can be computed")
def read_architecture(config: Config, entries: Mapping[str, Any]) -> Architecture:
    """The architecture that `config` describes; `entries` are those of its file.

    Raises ExportError for an architecture that cannot be built.
    """
    family = NATIVE.get(config.model_type)
    if family is None:
        raise refusal(config.model_type, entries)
    if config.hidden_act not in ACTIVATIONS:
        raise ExportError(
            f"config.json: hidden_act is {config.hidden_act!r}, supported are {' and '.join(ACTIVATIONS)}"
        )
    heads = config.num_attention_heads
    head_dim = config.head_dim or family.head_dim or config.hidden_size // heads
    check_head_size("config.json", head_dim)
    rotation = _rotary(config, family, head_dim)
    context = min(config.max_position_embeddings, rotation.longest or config.max_position_embeddings)
    return Architecture(
        family=family,
        attention=_attention(config, family, context),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=context,
        norm_epsilon=config.rms_norm_eps or family.norm_epsilon,
        rotary=rotation,
        tied_embedding=config.entry("tie_word_embeddings", family.tied_embedding),
        score_divisor=head_dim,
        biases=frozenset(
            name
            for biases in family.biases
            if biases.entry is None or config.entry(biases.entry, biases.default)
            for name in biases.maps
        ),
    )


def _attention(config: Config, family: Family, context: int) -> tuple[LayerAttention, ...]:
    """The attention of each layer. A window as long as the context is no window."""
    rotates, windows = _rotates(config, family), family.windows
    if windows is None:
        return tuple(LayerAttention(None, rotated) for rotated in rotates)
    has_window = config.use_sliding_window or not windows.opt_in
    window = config.entry("sliding_window", windows.size) if has_window else None
    if window == 0:
        raise ExportError("config.json's sliding_window is 0, expected at least 1")
    listed = config.layer_types if windows.reads_layer_types else None
    layer_types = _default_layer_types(config, windows, rotates) if listed is None else listed
    _check_layers(config, len(layer_types))
    if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
        raise ExportError(
            f"config.json: layer_types has {min(unknown)!r}, supported are full_attention and sliding_attention"
        )
    if listed and window is None and "sliding_attention" in listed:
        raise ExportError("config.json's layer_types have windows, but no sliding_window is in use")
    window = window if window and window < context else None
    return tuple(
        LayerAttention(window if layer_type == "sliding_attention" else None, rotated)
        for layer_type, rotated in zip(layer_types, rotates, strict=True)
    )


def _check_layers(config: Config, listed: int) -> None:
    if listed != (layers := config.num_hidden_layers):
        raise ExportError(f"config.json lists {listed} layers, expected num_hidden_layers, {layers}")


def _rotates(config: Config, family: Family) -> list[bool]:
    """Whether each layer rotates queries and keys; despite its name, `no_rope_layers` has 1 for those that do."""
    layers = config.num_hidden_layers
    if family.unrotated_every is None:
        return [True] * layers
    if config.no_rope_layers is not None:
        _check_layers(config, len(config.no_rope_layers))
        return list(map(bool, config.no_rope_layers))
    interval = config.entry("no_rope_layer_interval", family.unrotated_every)
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _default_layer_types(config: Config, windows: Windows, rotates: list[bool]) -> list[str]:
    """The type of each layer where config.json has no `layer_types`."""
    match windows.layers:
        case "late":
            first: Any = config.max_window_layers
            slides = [layer >= first for layer in range(len(rotates))]
        case "unrotated":
            slides = [not rotated for rotated in rotates]
        case "all":
            slides = [True] * len(rotates)
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def _rotary(config: Config, family: Family, head_dim: int) -> rotary.Rotary:
    """The rotation with the scaling in `rope_scaling`, or in `rope_parameters`, where newer configurations have it."""
    scaling = config.rope_scaling or config.rope_parameters or Rotation()
    if scaling.by_layer_type:
        raise ExportError(
            f"config.json: a rotary scaling of its own for layers of the type {min(scaling.by_layer_type)!r} is not "
            "supported, only one for all layers"
        )
    base = float(scaling.entry("rope_theta", config.entry("rope_theta", family.rotary_base)))
    size = _rotated_size(config, scaling, family, head_dim)
    plain = rotary.plain(size, base)
    match _scaling_kind(scaling, family):
        case "default":
            return rotary.Rotary(plain)
        case "dynamic":  # not scaled within `max_position_embeddings`, which is the context length here
            _needed(scaling, "factor")
            return rotary.Rotary(plain)
        case "linear":
            return rotary.Rotary(plain / _needed(scaling, "factor"))
        case "llama3":
            factor, low, high = (_needed(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return rotary.Rotary(rotary.llama3(plain, factor, low, high, _original(config, scaling, family)))
        case "yarn":
            return _yarn(config, scaling, size, base, _original(config, scaling, family))
        case "longrope":
            return _longrope(config, scaling, size, base, _original(config, scaling, family))


def _scaling_kind(scaling: Rotation, family: Family) -> ScalingKind:
    name = scaling.entry("rope_type", scaling.entry("type", "default"))
    if str(name) not in family.scalings:
        known = ", ".join(family.scalings)
        raise ExportError(f"config.json: rope_type is {name!r}, supported in {family.name} are {known}")
    return family.scalings[str(name)]


def _rotated_size(config: Config, scaling: Rotation, family: Family, head_dim: int) -> int:
    """How many numbers of a head rotate."""
    shares = (scaling.partial_rotary_factor, config.partial_rotary_factor)
    share = next((share for share in shares if share is not None), 1.0)
    if share != 1 and not family.partial_rotation:
        known = ", ".join(other.name for other in NATIVE.values() if other.partial_rotation)
        raise ExportError(f"partial_rotary_factor {share} is not supported in {family.name}, only in {known}")
    return rotary.checked_size(int(head_dim * share), head_dim)


def _needed(scaling: Rotation, name: str) -> Any:
    if (value := getattr(scaling, name)) is None:
        raise ExportError(f"config.json has no {name}, which its rotary scaling needs")
    return value


def _original(config: Config, scaling: Rotation, family: Family) -> int:
    """The context length before scaling. A top-level entry of config.json overrides the one inside rope_scaling."""
    name = "original_max_position_embeddings"
    if family.original_context is not None:
        return int(config.entry(name, family.original_context))
    return int(config.entry(name, scaling.entry(name, config.max_position_embeddings)))


def _yarn(config: Config, scaling: Rotation, size: int, base: float, original: int) -> rotary.Rotary:
    if not scaling.truncate or scaling.mscale:
        raise ExportError("config.json: YaRN is supported only with truncate true and mscale 0 or missing")
    if "factor" not in scaling.model_fields_set:
        raise ExportError("config.json has no factor, which its rotary scaling needs")
    factor = scaling.factor or config.max_position_embeddings / original
    beta_fast, beta_slow = scaling.beta_fast or 32.0, scaling.beta_slow or 1.0
    frequencies = rotary.yarn(size, base, factor, original, beta_fast=beta_fast, beta_slow=beta_slow)
    return rotary.Rotary(frequencies, scaling.attention_factor or rotary.yarn_scale(factor))


def _longrope(config: Config, scaling: Rotation, size: int, base: float, original: int) -> rotary.Rotary:
    """The rotation by the short factors, up to the original context; a longer text would need other cached keys."""
    short, long = _needed(scaling, "short_factor"), _needed(scaling, "long_factor")
    for name, values in (("short_factor", short), ("long_factor", long)):
        if len(values) != size // 2:
            raise ExportError(f"config.json's {name} has {len(values)} entries, expected {size // 2}")
    factor = scaling.factor or config.max_position_embeddings / original
    scale = scaling.attention_factor or rotary.longrope_scale(factor, original)
    return rotary.Rotary(rotary.plain(size, base, np.array(short, np.float32)), scale, longest=original)
