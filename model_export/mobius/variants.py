"""Refuses variants of a family that mobius-onnx would build wrongly, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated, check_head_size
from model_export.sources.rotary import checked_size

# The supported values of entries of config.json, besides missing or null, by family.
_SUPPORTED: Mapping[str, Mapping[str, tuple[object, ...]]] = {
    "arcee": {"mlp_bias": (False,)},
    "gemma3": {"use_bidirectional_attention": (False,)},
    "gemma3_text": {"use_bidirectional_attention": (False,)},
    "gpt2": {"add_cross_attention": (False,)},
    "gpt_bigcode": {"add_cross_attention": (False,)},
    "gpt_neox": {"use_parallel_residual": (True,), "attention_bias": (True,)},
    "granite": {"mlp_bias": (False,)},
    "nemotron": {"mlp_bias": (False,)},
    "olmo": {"clip_qkv": ()},
    "phi": {"qk_layernorm": (False,)},
    "stablelm": {"qk_layernorm": (False,), "use_parallel_residual": (False,), "attention_bias": (False,)},
}
# Families without grouped KV heads, and the entry that has their number of heads.
_HEADS_ENTRY = {"gpt2": "n_head", "gpt_neox": "num_attention_heads"}
# The number of heads and the hidden size, by their names in newer and older families.
_SIZES = (("num_attention_heads", "n_head"), ("hidden_size", "n_embd"))
# Families with a head size of their own where config.json has none, and those that rotate nothing.
_OWN_HEAD_SIZE = ("gemma", "gemma2", "gemma3", "gemma3_text")
_UNROTATED = ("gpt2", "gpt_bigcode")
# The entries for the part of each head that rotates, and the part where none of them is there, if not all.
_ROTATED_SHARES = ("partial_rotary_factor", "rotary_pct")
_ROTATED_BY_DEFAULT = {"phi": 0.5, "stablelm": 0.25, "gpt_neox": 0.25, "nemotron": 0.5}
_ROTATIONS = ("default", "linear", "llama3", "yarn", "longrope")


def check_variant(where: str, config: Mapping[str, Any]) -> None:
    """Raises ExportError where `config` asks for something that the graph of its family does not compute.

    `config` is the configuration at `where` of a family in `families.MOBIUS`, or its part about text.
    """
    family = str(config.get("model_type"))
    for key, allowed in _SUPPORTED.get(family, {}).items():
        _check(where, family, key, config.get(key), allowed)
    if family in _HEADS_ENTRY and (heads := config.get(_HEADS_ENTRY[family])) is not None:
        _check(where, family, "num_key_value_heads", config.get("num_key_value_heads"), (heads,))
    _check_heads(where, family, config)
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name) or {}
        for part in (scaling, *scaling.values()):  # perhaps one scaling per type of layer
            if isinstance(part, dict):
                _check(where, family, f"{name}'s type", part.get("rope_type", part.get("type")), _ROTATIONS)


def _check_heads(where: str, family: str, config: Mapping[str, Any]) -> None:
    """Raises ExportError for a head size, or a rotated part of it, that onnxruntime's attention does not support."""
    heads, hidden = (config.get(name) or config.get(old) for name, old in _SIZES)
    size = config.get("head_dim") or (hidden // heads if hidden and heads and family not in _OWN_HEAD_SIZE else None)
    if size is None:
        return
    check_head_size(where, size, rotated=family not in _UNROTATED)
    rotations = [config.get(name) for name in ("rope_scaling", "rope_parameters")]
    places = [config, *(rotation for rotation in rotations if isinstance(rotation, dict))]
    said = [place[name] for place in places for name in _ROTATED_SHARES if isinstance(place.get(name), int | float)]
    share = said[0] if said else _ROTATED_BY_DEFAULT.get(family, 1)
    try:
        checked_size(int(size * share), size)
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from None


def _check(where: str, family: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value is not None and value not in allowed:
        expected = " or ".join(map(abbreviated, allowed)) or "null"
        raise ExportError(f"{where}: {key} is {abbreviated(value)}, supported with {family} is {expected}")
