"""Makes a checkpoint of a Hugging Face directory."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.sources.checkpoint import Checkpoint, Origin, split_fused
from model_export.sources.hugging_face.architecture import read_architecture
from model_export.sources.hugging_face.config import TokenIds
from model_export.sources.hugging_face.directory import Directory
from model_export.sources.panics import reported_as
from model_export.sources.vocabulary import Vocabulary, end_tokens
from model_export.sources.weights import LazyTensor, dequantize

MODEL_NAMES = {
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


def read_hugging_face(directory: Directory) -> Checkpoint:
    """The checkpoint in a directory; a tensor is read when it is used."""
    config = directory.config
    architecture = read_architecture(config, directory.entries)
    tensors = {
        _gguf_name(name): tensor
        for name, tensor in directory.tensors.items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    split_fused(tensors, architecture)
    if architecture.tied_embedding and "output.weight" in tensors:
        embedding, output = tensors.get("token_embd.weight"), tensors["output.weight"]
        if embedding is not None and _equal(embedding, output):
            del tensors["output.weight"]
        else:  # two different matrices in the file are not tied, whatever config.json says
            architecture = replace(architecture, tied_embedding=False)
    return Checkpoint(directory_origin(directory, config), architecture, tensors)


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether both are matrices of the same shape and weights."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    return all(np.array_equal(dequantize(one.read(rows)), dequantize(other.read(rows))) for rows in one.parts())


def directory_origin(directory: Directory, ids: TokenIds) -> Origin:
    """The name, the tokenizer and the weights' form of a directory whose config.json has the token `ids`."""
    return Origin(
        name=directory.path.resolve().name,
        organization="",
        weights=directory.config.torch_dtype or directory.config.dtype or "float32",
        size=directory.size,
        vocabulary=vocabulary_from_directory(directory.path, ids, directory.generation),
    )


def _gguf_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if layer := LAYER.fullmatch(module):
        return f"blk.{layer[1]}.{LAYER_NAMES.get(layer[2], layer[2])}.{parameter}"
    return f"{MODEL_NAMES.get(module, module)}.{parameter}"


def vocabulary_from_directory(directory: Path, config: TokenIds, generation: TokenIds) -> Vocabulary:
    """The tokenizer of a directory, and the special tokens of its configurations.

    Raises ExportError where tokenizer.json is not a tokenizer.
    """
    path = directory / "tokenizer.json"
    with reported_as(f"{path} is not a tokenizer"):
        tokenizer = Tokenizer.from_file(str(path))
        first = _first_tokens(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    declared = (config.eos_token_id, generation.eos_token_id)
    ids = [index for entry in declared for index in (entry if isinstance(entry, list) else [entry])]
    if len(first) > 1:
        raise ExportError(f"{path} begins texts with {len(first)} tokens, expected at most one")
    return Vocabulary(
        tokenizer,
        bos=first[0] if first else config.bos_token_id,
        add_bos=bool(first),
        end=end_tokens(tokenizer, ids),
    )


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before every text, whatever `add_bos_token` in its settings says."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [index for index, _ in itertools.takewhile(lambda pair: pair[1], pairs)]
