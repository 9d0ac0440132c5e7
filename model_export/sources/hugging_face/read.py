"""Reads a Hugging Face directory: config.json, safetensors and tokenizer.json."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.sources.checkpoint import Checkpoint, split_fused
from model_export.sources.files import read_json
from model_export.sources.hugging_face import config as configuration
from model_export.sources.hugging_face.check import weight_files
from model_export.sources.panics import told_as
from model_export.sources.vocabulary import Vocabulary, end_tokens
from model_export.sources.weights import Floats, LazyTensor, dequantize

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
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_gate_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def read_hugging_face(directory: Path) -> Checkpoint:
    """Opens a Hugging Face directory; tensors are read when they are asked for."""
    config = read_json(directory, "config.json")
    architecture = configuration.architecture(config)
    tensors = _tensors(directory)
    split_fused(tensors, architecture)
    if architecture.tied_embedding and "output.weight" in tensors:
        if _are_equal(tensors.get("token_embd.weight"), tensors["output.weight"]):
            del tensors["output.weight"]
        else:  # nothing ties what was stored apart
            architecture = replace(architecture, tied_embedding=False)
    return Checkpoint(
        name=directory.resolve().name,
        organization="",
        weights=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
        size=size_of_weights(directory),
        architecture=architecture,
        tensors=tensors,
        vocabulary=read_vocabulary(directory, config),
    )


def size_of_weights(directory: Path) -> int:
    """The bytes of a directory's files of weights."""
    return sum(path.stat().st_size for path in weight_files(directory))


def _are_equal(one: LazyTensor | None, other: LazyTensor) -> bool:
    if one is None or one.shape != other.shape:
        return False
    return np.array_equal(dequantize(one.load()), dequantize(other.load()))


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
                shape = tuple(file.get_slice(name).get_shape())
                tensors[_gguf_name(name)] = LazyTensor(shape, partial(_load, path, name))
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


def read_vocabulary(directory: Path, config: dict[str, Any]) -> Vocabulary:
    """The tokenizer of a directory. Raises ExportError where there is none."""
    path = directory / "tokenizer.json"
    with told_as(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        first = _first_tokens(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    generation = directory / "generation_config.json"
    declared = [
        config.get("eos_token_id"),
        read_json(directory, generation.name).get("eos_token_id") if generation.exists() else None,
    ]
    ids = [index for entry in declared for index in (entry if isinstance(entry, list) else [entry])]
    if len(first) > 1:
        raise ExportError(f"{path} begins texts with {len(first)} tokens of its own; supported is one")
    return Vocabulary(
        tokenizer,
        bos=first[0] if first else config.get("bos_token_id"),
        add_bos=bool(first),
        end=end_tokens(tokenizer, ids),
    )


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every text; `add_bos_token` in its settings counts for nothing beside that."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [index for index, _ in itertools.takewhile(lambda pair: pair[1], pairs)]
