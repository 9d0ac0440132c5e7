"""Reads the architecture that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export import rotary
from model_export.checkpoint import Architecture, Attention
from model_export.errors import ExportError
from model_export.families import OWN, refusal
from model_export.rotary import Rotary

Config = Mapping[str, Any]

# What the families' own classes take where config.json is silent.
USUAL_WINDOW = {"mistral": 4096, "ministral": 4096, "qwen2": 4096, "qwen3": 4096}
USUAL_WINDOW_LAYERS = 28
USUAL_PLAIN_INTERVAL = 4
# Whose windows are off unless `use_sliding_window` says otherwise, and whose layers may differ in them.
WINDOWS_BY_CHOICE = ("qwen2", "qwen3", "smollm3")
LAYERS_OF_KINDS = ("ministral", "qwen2", "qwen3", "smollm3")

QUERY_KEY_VALUE = ("attn_q", "attn_k", "attn_v")
MLP = ("ffn_gate", "ffn_up", "ffn_down")


def architecture(config: Config) -> Architecture:
    """The architecture. Raises ExportError for one that the builder does not build."""
    family = config.get("model_type")
    if family not in OWN:
        raise refusal(family, config)
    _refuse_variants(config)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        turning = _rotary(config, head_dim)
        context = config["max_position_embeddings"]
        context = min(context, turning.longest or context)
        return Architecture(
            family=family,
            attention=_attention(config, family, context),
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            context_length=context,
            norm_epsilon=config["rms_norm_eps"],
            rotary=turning,
            tied_embedding=config.get("tie_word_embeddings", family == "smollm3"),
            biases=_biases(config, family),
            qk_norm=family == "qwen3",
        )
    except KeyError as error:
        raise ExportError(f"config.json has no {error.args[0]}") from None


def _refuse_variants(config: Config) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"activation {config['hidden_act']!r} is not supported; supported is silu")
    if config.get("quantization_config"):
        raise ExportError("weights that are already quantized are supported only as GGUF")


def _biases(config: Config, family: str) -> frozenset[str]:
    if family == "qwen2":
        return frozenset(QUERY_KEY_VALUE)
    if family not in ("llama", "qwen3", "smollm3"):
        return frozenset()
    attention = (*QUERY_KEY_VALUE, "attn_output") if config.get("attention_bias") else ()
    return frozenset([*attention, *(MLP if config.get("mlp_bias") and family != "qwen3" else ())])


def _attention(config: Config, family: str, context: int) -> tuple[Attention, ...]:
    """How each layer attends. A window that spans the whole context is none."""
    layers, window = config["num_hidden_layers"], _window(config, family)
    rotates = _rotates(config, layers) if family == "smollm3" else [True] * layers
    kinds = (config.get("layer_types") if family in LAYERS_OF_KINDS else None) or _kinds(config, family, rotates)
    if len(rotates) != layers or len(kinds) != layers:
        raise ExportError(f"config.json tells of {min(len(rotates), len(kinds))} layers, but has {layers}")
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ExportError(f"layers of the kind {min(other)!r} are not supported")
    return tuple(
        Attention(window if window and window < context and kind == "sliding_attention" else None, turns)
        for kind, turns in zip(kinds, rotates, strict=True)
    )


def _window(config: Config, family: str) -> int | None:
    if family == "llama" or (family in WINDOWS_BY_CHOICE and not config.get("use_sliding_window", False)):
        return None
    window: int | None = config.get("sliding_window", USUAL_WINDOW.get(family))
    return window


def _rotates(config: Config, layers: int) -> list[bool]:
    """Which of SmolLM3's layers rotate; the entries of `no_rope_layers` are 1 for those that do."""
    if listed := config.get("no_rope_layers"):
        return [bool(each) for each in listed]
    interval = config.get("no_rope_layer_interval", USUAL_PLAIN_INTERVAL)
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _kinds(config: Config, family: str, rotates: list[bool]) -> list[str]:
    """The kind of each layer where `layer_types` does not list them."""
    match family:
        case "qwen2" | "qwen3":
            first = config.get("max_window_layers", USUAL_WINDOW_LAYERS)
            slides = [layer >= first for layer in range(len(rotates))]
        case "smollm3":
            slides = [not each for each in rotates]
        case _:
            slides = [True] * len(rotates)
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _rotary(config: Config, head_dim: int) -> Rotary:
    """The rotation, which `rope_scaling` slows down; newer configurations keep all of it in `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(config.get("rope_theta") or scaling.get("rope_theta", 10000.0))
    share = scaling.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    size = rotary.checked_size(int(head_dim * share), head_dim)
    plain = rotary.plain(size, base)
    positions = config["max_position_embeddings"]
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default" | "dynamic":  # the dynamic one is plain within `max_position_embeddings`, the context here
            return Rotary(plain)
        case "linear":
            return Rotary(plain / float(scaling["factor"]))
        case "llama3":
            low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
            original = scaling["original_max_position_embeddings"]
            return Rotary(rotary.llama3(plain, scaling["factor"], low, high, original))
        case "yarn":
            return _yarn(scaling, size, base, positions)
        case "longrope" | "su":
            return _longrope(scaling, size, base, positions, _original(config, scaling))
        case other:
            known = "default, linear, dynamic, llama3, yarn and longrope"
            raise ExportError(f"rotary scaling {other!r} is not supported; supported are {known}")


def _original(config: Config, scaling: Config) -> int:
    """The context that the model was trained with at first."""
    names = "original_max_position_embeddings"
    return int(config.get(names) or scaling.get(names) or config["max_position_embeddings"])


def _yarn(scaling: Config, size: int, base: float, positions: int) -> Rotary:
    if scaling.get("truncate") is False or scaling.get("mscale"):
        raise ExportError("YaRN with mscale or without truncate is not supported")
    original = scaling.get("original_max_position_embeddings") or positions
    factor = float(scaling.get("factor") or positions / original)
    turns = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)
    scale = scaling.get("attention_factor") or rotary.yarn_scale(factor)
    return Rotary(rotary.yarn(size, base, factor, original, turns), float(scale))


def _longrope(scaling: Config, size: int, base: float, positions: int, original: int) -> Rotary:
    """The short factors, which hold up to the original context; beyond it all positions would turn anew."""
    factors = scaling["short_factor"]
    if len(factors) != size // 2:
        raise ExportError(f"config.json's short_factor has {len(factors)} entries, expected {size // 2}")
    scale = scaling.get("attention_factor") or rotary.longrope_scale(
        float(scaling.get("factor") or positions / original), original
    )
    return Rotary(rotary.plain(size, base, rotary.factors(factors)), float(scale), longest=original)
