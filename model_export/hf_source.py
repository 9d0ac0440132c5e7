"""Reads a Hugging Face directory: config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from model_export.checkpoint import FAMILIES, Architecture, Checkpoint, rotary_frequencies
from model_export.errors import ExportError
from model_export.files import read_json
from model_export.hf_check import weight_files
from model_export.panics import told_as
from model_export.vocabulary import Vocabulary, end_tokens
from model_export.weights import Floats, LazyTensor

WHOLE_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
FLOAT_TYPES = ("F32", "F16", "BF16")


def read_hugging_face(directory: Path) -> Checkpoint:
    """Opens a Hugging Face directory; tensors are read when they are asked for."""
    config = read_json(directory, "config.json")
    tensors = _tensors(directory)
    architecture = _architecture(config)
    if architecture.tied_embedding:
        tensors.pop("output.weight", None)
    return Checkpoint(
        name=directory.resolve().name,
        organization="",
        weights=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
        architecture=architecture,
        tensors=tensors,
        vocabulary=_vocabulary(directory, config),
    )


def _architecture(config: dict[str, Any]) -> Architecture:
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ExportError(f"architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    _refuse_variants(config)
    try:
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        head_dim = config.get("head_dim") or hidden // heads
        return Architecture(
            family=family,
            layers=config["num_hidden_layers"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            vocab_size=config["vocab_size"],
            context_length=_context_length(config),
            norm_epsilon=config["rms_norm_eps"],
            rotary_frequencies=_frequencies(config, head_dim),
            tied_embedding=config.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise ExportError(f"config.json has no {error.args[0]}") from None


def _refuse_variants(config: dict[str, Any]) -> None:
    if config.get("hidden_act", "silu") != "silu":
        raise ExportError(f"activation {config['hidden_act']!r} is not supported; supported is silu")
    if config.get("partial_rotary_factor", 1) != 1:
        raise ExportError("a partial rotary embedding is not supported")


def _context_length(config: dict[str, Any]) -> int:
    """Within its window, sliding attention is full attention: the window bounds the context."""
    length = int(config["max_position_embeddings"])
    return min(length, config.get("sliding_window") or length) if config.get("use_sliding_window", True) else length


def _frequencies(config: dict[str, Any], head_dim: int) -> NDArray[np.float64]:
    """The rotary frequencies, which `rope_scaling` slows down; newer configurations keep both in `rope_parameters`."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    plain = rotary_frequencies(head_dim, config.get("rope_theta") or scaling.get("rope_theta", 10000.0))
    match scaling.get("rope_type", scaling.get("type", "default")):
        case "default":
            return plain
        case "linear":
            return plain / float(scaling["factor"])
        case "llama3":
            return _slow_down_long_waves(plain, scaling)
        case other:
            raise ExportError(f"rotary scaling {other!r} is not supported; supported are default, linear and llama3")


def _slow_down_long_waves(plain: NDArray[np.float64], scaling: dict[str, Any]) -> NDArray[np.float64]:
    """Llama 3's scaling.

    A wave of which less than `low` turns fit into the original context is slowed down by `factor`, one of which more
    than `high` turns fit is kept, and those between are blended.
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    scaled: NDArray[np.float64] = plain * (kept + (1 - kept) / scaling["factor"])
    return scaled


def _tensors(directory: Path) -> dict[str, LazyTensor]:
    tensors: dict[str, LazyTensor] = {}
    for path in weight_files(directory):
        tensors |= _tensors_of(path)
    return tensors


def _tensors_of(path: Path) -> dict[str, LazyTensor]:
    tensors = {}
    try:
        with safe_open(path, "numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                piece = file.get_slice(name)
                if piece.get_dtype() not in FLOAT_TYPES:
                    raise ExportError(f"{path}: tensor {name} holds {piece.get_dtype()}, which is not supported")
                tensors[_gguf_name(name)] = LazyTensor(tuple(piece.get_shape()), partial(_load, path, name))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is not a complete safetensors file: {error}") from error
    return tensors


def _gguf_name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if layer := LAYER.fullmatch(module):
        return f"blk.{layer[1]}.{LAYER_NAMES.get(layer[2], layer[2])}.{kind}"
    return f"{WHOLE_NAMES.get(module, module)}.{kind}"


def _load(path: Path, name: str) -> Floats:
    with safe_open(path, "numpy") as file:
        tensor: NDArray[Any] = file.get_tensor(name)
        return tensor.astype(np.float32)


def _vocabulary(directory: Path, config: dict[str, Any]) -> Vocabulary:
    path = directory / "tokenizer.json"
    with told_as(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        first = tokenizer.encode("a", add_special_tokens=True).ids[:1]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    generation = directory / "generation_config.json"
    declared = [
        config.get("eos_token_id"),
        read_json(directory, generation.name).get("eos_token_id") if generation.exists() else None,
    ]
    ids = [index for entry in declared for index in (entry if isinstance(entry, list) else [entry])]
    bos = config.get("bos_token_id")
    return Vocabulary(tokenizer, bos, add_bos=bos is not None and first == [bos], end=end_tokens(tokenizer, ids))
