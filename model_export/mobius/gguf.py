"""Translates the keys and tensors of a GGUF file into the configuration and tensors of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, dequantize, get_tensor_name_map

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated, check_head_size, check_rotation
from model_export.sources.gguf.header import Tensor
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.gguf.read import GgufModel
from model_export.sources.weights import Floats

# The number of layers of the one model per family whose attention scores are not scaled by the head size.
_SCALED_BY_WIDTH = 46
# In every group of this many layers, only the last has no window.
_FULL_EVERY = 2


def configuration(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    """The configuration of the family that `metadata` names. Raises ExportError where something is missing."""
    family = metadata.require("general.architecture")
    return _gpt2(metadata, vocab_size) if family == "gpt2" else _gemma2(metadata, vocab_size)


def _gpt2(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    hidden, heads = metadata.require("gpt2.embedding_length"), metadata.require("gpt2.attention.head_count")
    check_head_size("the GGUF file", hidden // heads, rotated=False)
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": metadata.require("gpt2.context_length"),
        "n_embd": hidden,
        "n_layer": metadata.require("gpt2.block_count"),
        "n_head": heads,
        "n_inner": metadata.require("gpt2.feed_forward_length"),
        "layer_norm_epsilon": metadata.require("gpt2.attention.layer_norm_epsilon"),
    }


def _gemma2(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    def require(key: str) -> Any:
        return metadata.require(f"gemma2.{key}")

    layers, heads, hidden = require("block_count"), require("attention.head_count"), require("embedding_length")
    head_dim = require("attention.key_length")
    check_head_size("the GGUF file", head_dim)
    check_rotation("the GGUF file", require("context_length"), head_dim)
    windowed = [(layer + 1) % _FULL_EVERY != 0 for layer in range(layers)]
    _check_common_keys(metadata, windowed)
    rotation: dict[str, Any] = {"rope_type": "default", "rope_theta": metadata.get("gemma2.rope.freq_base", 1e4)}
    if metadata.get("gemma2.rope.scaling.type", "none") != "none":
        rotation |= {"rope_type": "linear", "factor": require("rope.scaling.factor")}
    return {
        "model_type": "gemma2",
        "vocab_size": vocab_size,
        "max_position_embeddings": require("context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": require("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": require("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": require("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": hidden // heads if layers == _SCALED_BY_WIDTH else head_dim,
        "sliding_window": require("attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windowed],
        "attn_logit_softcapping": metadata.get("gemma2.attn_logit_softcapping"),
        "final_logit_softcapping": metadata.get("gemma2.final_logit_softcapping"),
        "rope_parameters": rotation,
    }


def _check_common_keys(metadata: Metadata, windowed: list[bool]) -> None:
    """Raises ExportError when a key contradicts the properties that all models of Gemma 2 share."""
    usual: dict[str, tuple[object, ...]] = {
        "attention.sliding_window_pattern": (_FULL_EVERY, windowed),
        "attention.causal": (True,),
        "rope.freq_base_swa": (1e4,),
        "rope.scaling.type": ("none", "linear"),
    }
    for key, values in usual.items():
        if (value := metadata.plain(f"gemma2.{key}")) is not None and value not in values:
            raise ExportError(f"gemma2.{key} is {abbreviated(value)}, supported is {abbreviated(values[0])}")


def state(file: GgufModel, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Floats]:
    """The tensors under transformers' names, the keys of `shapes`.

    Raises ExportError where a tensor other than a tied head is missing, has another shape, or is not in `shapes`.
    """
    metadata = file.metadata
    family = metadata.require("general.architecture")
    architecture = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == family)
    known = get_tensor_name_map(architecture, metadata.require(f"{family}.block_count"))
    by_name = dict(file.tensors)
    tensors = {}
    for name, shape in shapes.items():
        stored_name = known.get_name(name, try_suffixes=(".weight", ".bias")) or name
        if (tensor := by_name.pop(stored_name, None)) is not None:
            _check_shape(tensor, _ADAPTED[family](name, np.broadcast_to(np.float32(0), shape)).shape)
            tensors[name] = tensor
        elif name != "lm_head.weight":
            raise ExportError(f"the GGUF file has no tensor {stored_name}")
    if by_name:
        raise ExportError(f"the GGUF file has a tensor {min(by_name)}, which a {family} model does not have")
    return {name: _ADAPTED[family](name, _floats(tensor)) for name, tensor in tensors.items()}


def _check_shape(tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ExportError(f"tensor {tensor.name} has shape {list(tensor.shape)}, expected {list(expected)}")


def _floats(tensor: Tensor) -> Floats:
    return dequantize(tensor.data, tensor.dtype).astype(np.float32).reshape(tensor.shape)


def _gemma_tensor(name: str, values: Floats) -> Floats:
    """The file has the scales of norms, transformers the scales minus one."""
    return values - np.float32(1) if "norm" in name else values


def _gpt2_tensor(name: str, values: Floats) -> Floats:
    """GPT-2's matrices are transposed, as transformers multiplies by them from the right."""
    return values.T if values.ndim == 2 and ".h." in name else values


_ADAPTED: dict[str, Callable[[str, Floats], Floats]] = {
    "gemma2": _gemma_tensor,
    "gpt2": _gpt2_tensor,
}
