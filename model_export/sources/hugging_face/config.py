"""Reads the architecture that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.errors import ExportError
from model_export.sources import rotary
from model_export.sources.checkpoint import Architecture, Attention
from model_export.sources.families import OWN, refusal
from model_export.sources.rotary import Rotary

Config = Mapping[str, Any]

# What the families' own classes take where config.json is silent.
USUAL_WINDOW = {"mistral": 4096, "ministral": 4096, "qwen2": 4096, "qwen3": 4096}
USUAL_WINDOW_LAYERS = 28
USUAL_HEAD_DIM = {"qwen3": 128}
USUAL_EPSILON = {"phi3": 1e-5}
USUAL_BASE = {"smollm3": 2e6}
USUAL_ORIGINAL = 4096  # Phi-3's context at first
USUAL_PLAIN_INTERVAL = 4
# Whose windows are off unless `use_sliding_window` says otherwise, and whose layers may differ in them.
WINDOWS_BY_CHOICE = ("qwen2", "qwen3", "smollm3")
LAYERS_OF_KINDS = ("mistral", "ministral", "qwen2", "qwen3", "smollm3")
# One function by two names.
ACTIVATIONS = ("silu", "swish")

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
        head_dim = config.get("head_dim") or USUAL_HEAD_DIM.get(family) or hidden // heads
        turning = _rotary(config, family, head_dim)
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
            norm_epsilon=config.get("rms_norm_eps", USUAL_EPSILON.get(family, 1e-6)),
            rotary=turning,
            tied_embedding=config.get("tie_word_embeddings", family == "smollm3"),
            biases=_biases(config, family),
            qk_norm=family == "qwen3",
        )
    except KeyError as error:
        raise ExportError(f"config.json has no {error.args[0]}") from None
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ExportError(f"config.json describes no model that can be computed: {error}") from error


def _refuse_variants(config: Config) -> None:
    if config.get("hidden_act", "silu") not in ACTIVATIONS:
        raise ExportError(f"activation {config['hidden_act']!r} is not supported; supported is silu")


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
    listed = config.get("layer_types") if family in LAYERS_OF_KINDS else None
    kinds = _kinds(config, family, rotates) if listed is None else listed
    if len(rotates) != layers or len(kinds) != layers:
        raise ExportError(f"config.json tells of {min(len(rotates), len(kinds))} layers, but has {layers}")
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ExportError(f"layers of the kind {min(other)!r} are not supported")
    if listed and window is None and "sliding_attention" in listed:
        raise ExportError("config.json's layer_types have windows, but no sliding_window is in use")
    return tuple(
        Attention(window if window and window < context and kind == "sliding_attention" else None, turns)
        for kind, turns in zip(kinds, rotates, strict=True)
    )


def _window(config: Config, family: str) -> int | None:
    if family == "llama" or (family in WINDOWS_BY_CHOICE and not config.get("use_sliding_window", False)):
        return None
    window: int | None = config.get("sliding_window", USUAL_WINDOW.get(family))
    if window == 0:
        raise ExportError("config.json's sliding_window is 0, expected at least 1")
    return window


def _rotates(config: Config, layers: int) -> list[bool]:
    """Which of SmolLM3's layers rotate; the entries of `no_rope_layers` are 1 for those that do."""
    if (listed := config.get("no_rope_layers")) is not None:
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


def _rotary(config: Config, family: str, head_dim: int) -> Rotary:
    """The rotation, which `rope_scaling` slows down; newer configurations keep all of it in `rope_parameters`."""
    scaling: Config = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if nested := sorted(name for name, value in scaling.items() if isinstance(value, dict)):
        raise ExportError(f"rotary scaling of its own for layers of the kind {nested[0]!r} is not supported")
    base = float(scaling.get("rope_theta", config.get("rope_theta", USUAL_BASE.get(family, 1e4))))
    size = _turned(config, scaling, family, head_dim)
    plain = rotary.plain(size, base)
    match _scaling_kind(scaling, family):
        case "default":
            return Rotary(plain)
        case "dynamic":  # plain within `max_position_embeddings`, the context here
            _needed(scaling, "factor")
            return Rotary(plain)
        case "linear":
            return Rotary(plain / _needed(scaling, "factor"))
        case "llama3":
            factor, low, high = (_needed(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return Rotary(rotary.llama3(plain, factor, low, high, _original(config, scaling, family)))
        case "yarn":
            return _yarn(config, scaling, size, base, _original(config, scaling, family))
        case "longrope":
            return _longrope(config, scaling, size, base, _original(config, scaling, family))
        case other:
            known = "default, linear, dynamic, llama3, yarn and longrope"
            raise ExportError(f"rotary scaling {other!r} is not supported; supported are {known}")


def _scaling_kind(scaling: Config, family: str) -> object:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if family == "phi3" and kind in ("su", "yarn"):  # as its files have called it
        return "longrope"
    if family == "phi3" and kind not in ("default", "longrope"):
        raise ExportError(f"rotary scaling {kind!r} is not supported in phi3; supported are default and longrope")
    return kind


def _turned(config: Config, scaling: Config, family: str, head_dim: int) -> int:
    """How many numbers of a head rotate; all of them but in Phi-3."""
    shares = (each.get("partial_rotary_factor") for each in (scaling, config))
    share = next((share for share in shares if share is not None), 1.0)
    if family != "phi3" and share != 1:
        raise ExportError(f"partial_rotary_factor {share} is not supported in {family}, only in phi3")
    return rotary.checked_size(int(head_dim * share), head_dim)


def _needed(scaling: Config, name: str) -> float:
    value = scaling.get(name)
    if value is None:
        raise ExportError(f"config.json has no {name}, which its rotary scaling needs")
    return float(value)


def _original(config: Config, scaling: Config, family: str) -> int:
    """The context that the model was trained with at first; what stands beside the scaling counts before it."""
    name = "original_max_position_embeddings"
    if family == "phi3":
        return int(config.get(name, USUAL_ORIGINAL))
    return int(config[name] if name in config else scaling.get(name, config["max_position_embeddings"]))


def _yarn(config: Config, scaling: Config, size: int, base: float, original: int) -> Rotary:
    if not scaling.get("truncate", True) or scaling.get("mscale"):
        raise ExportError("YaRN with mscale or without truncate is not supported")
    factor = _factor(config, scaling["factor"], original)
    turns = float(scaling.get("beta_fast") or 32), float(scaling.get("beta_slow") or 1)
    scale = scaling.get("attention_factor")
    return Rotary(
        rotary.yarn(size, base, factor, original, turns), rotary.yarn_scale(factor) if scale is None else float(scale)
    )


def _longrope(config: Config, scaling: Config, size: int, base: float, original: int) -> Rotary:
    """The short factors, which hold up to the original context; beyond it all positions would turn anew."""
    for name in ("short_factor", "long_factor"):
        if len(scaling[name]) != size // 2:
            raise ExportError(f"config.json's {name} has {len(scaling[name])} entries, expected {size // 2}")
    scale = scaling.get("attention_factor")
    if scale is None:
        scale = rotary.longrope_scale(_factor(config, scaling.get("factor"), original), original)
    return Rotary(rotary.plain(size, base, rotary.factors(scaling["short_factor"])), float(scale), longest=original)


def _factor(config: Config, given: float | None, original: int) -> float:
    """By how much the context is longer than the original one."""
    return float(config["max_position_embeddings"] / original if given is None else given)
