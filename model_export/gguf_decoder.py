"""Models of GGUF files as transformers has them: what a file says of a family, put as that family's configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFReader, ReaderTensor, dequantize, get_tensor_name_map

from model_export.errors import ExportError
from model_export.gguf_metadata import Metadata
from model_export.weights import Floats

# The one size of each family whose scores are not scaled by the size of a head, by its number of layers.
_SCALED_BY_WIDTH = {"gemma2": 46, "gemma3": 62}
# Of how many layers the last one attends to everything.
_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
_LOCAL_BASE = 10000.0


def configuration(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    """The configuration of the family that `metadata` names. Raises ExportError where something is missing."""
    family = metadata.require("general.architecture")
    return _gpt2(metadata, vocab_size) if family == "gpt2" else _gemma(metadata, family, vocab_size)


def _gpt2(metadata: Metadata, vocab_size: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": vocab_size,
        "n_positions": metadata.require("gpt2.context_length"),
        "n_embd": metadata.require("gpt2.embedding_length"),
        "n_layer": metadata.require("gpt2.block_count"),
        "n_head": metadata.require("gpt2.attention.head_count"),
        "n_inner": metadata.require("gpt2.feed_forward_length"),
        "layer_norm_epsilon": metadata.require("gpt2.attention.layer_norm_epsilon"),
    }


def _gemma(metadata: Metadata, family: str, vocab_size: int) -> dict[str, Any]:
    def require(key: str) -> Any:
        return metadata.require(f"{family}.{key}")

    layers, heads, hidden = require("block_count"), require("attention.head_count"), require("embedding_length")
    head_dim = require("attention.key_length")
    every = _FULL_EVERY[family]
    config = {
        "vocab_size": vocab_size,
        "max_position_embeddings": require("context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": require("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": require("attention.head_count_kv"),
        "head_dim": head_dim,
        "rms_norm_eps": require("attention.layer_norm_rms_epsilon"),
        "query_pre_attn_scalar": hidden // heads if layers == _SCALED_BY_WIDTH[family] else head_dim,
        "sliding_window": require("attention.sliding_window"),
        "layer_types": ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(layers)],
    }
    base = metadata.get(f"{family}.rope.freq_base", 1e6 if family == "gemma3" else _LOCAL_BASE)
    rotation: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if metadata.get(f"{family}.rope.scaling.type", "none") != "none":
        kind, factor = require("rope.scaling.type"), require("rope.scaling.factor")
        rotation |= {"rope_type": kind, "factor": factor}
    soft_caps = {
        "attn_logit_softcapping": metadata.get(f"{family}.attn_logit_softcapping"),
        "final_logit_softcapping": metadata.get(f"{family}.final_logit_softcapping"),
    }
    if family == "gemma2":
        return config | soft_caps | {"model_type": "gemma2", "rope_parameters": rotation}
    local = {"rope_type": "default", "rope_theta": _LOCAL_BASE}
    rotations = {"sliding_attention": local, "full_attention": rotation}
    return config | soft_caps | {"model_type": "gemma3_text", "rope_parameters": rotations}


def state(reader: GGUFReader, family: str, names: list[str]) -> dict[str, Floats]:
    """The tensors under transformers' `names`, all those that the file has. Raises ExportError for any more."""
    by_name = {tensor.name: tensor for tensor in reader.tensors}
    layers = 1 + max((int(name.split(".")[1]) for name in by_name if name.startswith("blk.")), default=0)
    architecture = next(key for key in MODEL_ARCH if MODEL_ARCH_NAMES[key] == family)
    known = get_tensor_name_map(architecture, layers)
    found = {}
    for name in names:
        tensor = by_name.pop(known.get_name(name, try_suffixes=(".weight", ".bias")) or "", None)
        if tensor is not None:
            found[name] = _ADAPTED[family](name, _floats(tensor))
    if by_name:
        raise ExportError(f"the GGUF file has a tensor {min(by_name)}, which a {family} model has not")
    return found


def _floats(tensor: ReaderTensor) -> Floats:
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape([int(n) for n in tensor.shape[::-1]])


def _gemma_tensor(name: str, values: Floats) -> Floats:
    """The file has the factors of norms, transformers what they are above one."""
    return values - np.float32(1) if "norm" in name else values


def _gpt2_tensor(name: str, values: Floats) -> Floats:
    """For transformers, which multiplies by GPT-2's matrices from the right."""
    return values.T if values.ndim == 2 and ".h." in name else values


_ADAPTED: dict[str, Callable[[str, Floats], Floats]] = {
    "gemma2": _gemma_tensor,
    "gemma3": _gemma_tensor,
    "gpt2": _gpt2_tensor,
}
