"""Refuses variants of a family that mobius-onnx would build wrongly, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated

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
    for name in ("rope_scaling", "rope_parameters"):
        scaling = config.get(name) or {}
        for part in (scaling, *scaling.values()):  # perhaps one scaling per type of layer
            if isinstance(part, dict):
                _check(where, family, f"{name}'s type", part.get("rope_type", part.get("type")), _ROTATIONS)


def _check(where: str, family: str, key: str, value: object, allowed: tuple[object, ...]) -> None:
    if value is not None and value not in allowed:
        expected = " or ".join(map(abbreviated, allowed)) or "null"
        raise ExportError(f"{where}: {key} is {abbreviated(value)}, supported with {family} is {expected}")
