"""Tiny random models as Hugging Face directories and GGUF files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 32
CONTEXT = 192

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", *BYTES, "th", "Ġth", "the"]
MERGES = [("t", "h"), ("Ġ", "th"), ("th", "e")]
VOCAB = len(TOKENS)


@dataclass(frozen=True)
class Shape:
    """How the files of a family differ from Llama's.

    `gguf`: GGUF files have an architecture for the family. In these, the numbers of a rotary pair may be `adjacent`,
    and tensors may have other `names`. With `post_norms` the outputs of attention and MLP have norms of their own.
    """

    biases: bool = False
    qk_norm: bool = False
    fused: bool = False
    gguf: bool = True
    adjacent: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    post_norms: bool = False


FAMILIES = {
    "llama": Shape(adjacent=True),
    "mistral": Shape(gguf=False),
    "ministral": Shape(gguf=False),
    "qwen2": Shape(biases=True),
    "qwen3": Shape(qk_norm=True),
    "smollm3": Shape(adjacent=True),
    "phi3": Shape(fused=True),
    "seed_oss": Shape(biases=True, names={"post_attention_layernorm": "post_attention_norm"}),
}
# Families whose directories `mobius` builds.
ONLY_GGUF = {
    "gemma3": Shape(
        qk_norm=True,
        post_norms=True,
        names={
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        },
    ),
}
SHAPES = FAMILIES | ONLY_GGUF


def config(family: str, **changes: Any) -> dict[str, Any]:
    """A configuration of the given family, with some entries changed."""
    return {
        "model_type": family,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "eos_token_id": 0,
        "bos_token_id": None,
    } | changes


def weights(family: str, tied: bool = True, layers: int = LAYERS, vocab: int = VOCAB) -> dict[str, np.ndarray]:
    """Random weights under their Hugging Face names, large enough that a wrong graph gives other logits."""
    rng, shape = np.random.default_rng(7), SHAPES[family]

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) * 1.5 / np.sqrt(columns)).astype(np.float32)

    def scale(size: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, size).astype(np.float32)

    tensors = {"model.embed_tokens.weight": matrix(vocab, HIDDEN), "model.norm.weight": scale(HIDDEN)}
    if not tied:
        tensors["lm_head.weight"] = matrix(vocab, HIDDEN)
    query, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    for layer in range(layers):
        named = {
            "input_layernorm.weight": scale(HIDDEN),
            "self_attn.q_proj.weight": matrix(query, HIDDEN) * 2,
            "self_attn.k_proj.weight": matrix(kv, HIDDEN) * 2,
            "self_attn.v_proj.weight": matrix(kv, HIDDEN),
            "self_attn.o_proj.weight": matrix(HIDDEN, query),
            "post_attention_layernorm.weight": scale(HIDDEN),
            "mlp.gate_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            "mlp.up_proj.weight": matrix(INTERMEDIATE, HIDDEN),
            "mlp.down_proj.weight": matrix(HIDDEN, INTERMEDIATE),
        }
        if shape.biases:
            named |= {
                f"self_attn.{kind}_proj.bias": scale(size) for kind, size in zip("qkv", (query, kv, kv), strict=True)
            }
        if shape.qk_norm:
            named |= {f"self_attn.{kind}_norm.weight": scale(HEAD_DIM) for kind in "qk"}
        if shape.post_norms:
            named |= {f"{part}_feedforward_layernorm.weight": scale(HIDDEN) for part in ("pre", "post")}
        if shape.fused:
            named = fused(named)
        tensors |= {f"model.layers.{layer}.{name}": tensor for name, tensor in named.items()}
    return tensors


def fused(named: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A layer's weights as Phi-3 has them: queries, keys and values in one matrix, and gate and up in one."""
    left = dict(named)
    for whole, parts in {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        left[f"{whole}.weight"] = np.concatenate([left.pop(f"{part}.weight") for part in parts])
    return left


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer with three merges and one special token."""
    built = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=MERGES))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return built


def hugging_face(directory: Path, family: str = "llama", dtype: str = "float32", **changes: Any) -> Path:
    """Writes a Hugging Face directory, its weights in two shards."""
    directory.mkdir()
    settings = config(family, torch_dtype=dtype, **changes)
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = weights(family, settings["tie_word_embeddings"], settings["num_hidden_layers"])
    tensors = {name: tensor.astype(kind) for name, tensor in tensors.items()}
    names = sorted(tensors)
    weight_map = {}
    for shard, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, directory / f"model-{shard}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(settings))
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


GGUF_NAMES = {
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_up_proj": "ffn_up",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def interleave(rows: np.ndarray) -> np.ndarray:
    """Brings the rows of each head into the order of GGUF's llama family: rotary pairs side by side."""
    return rows.reshape(-1, 2, HEAD_DIM // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def gguf(
    path: Path,
    quantization: GGMLQuantizationType,
    leave_out: str = "",
    family: str = "llama",
    layers: int = LAYERS,
    pre: str = "smollm",
    architecture: str | None = None,
    entries: Mapping[str, int | float | str] = MappingProxyType({}),
    short_factors: np.ndarray | None = None,
    split_max_tensors: int = 0,
    keys_first: bool = False,
    tied: bool = True,
    unused_tokens: int = 0,
) -> Path:
    """Writes a GGUF file of the family, its matrices in `quantization`.

    `entries` are further keys of its metadata, `short_factors` [pairs] those of LongRoPE. With `split_max_tensors` the
    model is in several files of at most that many tensors; with `keys_first` the first file has no tensors.
    `unused_tokens` follow those of the tokenizer.
    """
    shape = SHAPES[family]
    writer = GGUFWriter(path, architecture or family, split_max_tensors=split_max_tensors, small_first_shard=keys_first)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*TOKENS, *(f"<unused{number}>" for number in range(unused_tokens))])
    writer.add_token_types([3] + [1] * (VOCAB - 1) + [5] * unused_tokens)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_eos_token_id(0)
    for key, value in entries.items():
        kinds = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        add = kinds[type(value)]
        add(f"{family}.{key}", value)
    if short_factors is not None:
        writer.add_tensor("rope_factors_long.weight", short_factors + 1)
        writer.add_tensor("rope_factors_short.weight", short_factors)
    for name, tensor in weights(family, tied, layers, VOCAB + unused_tokens).items():
        if name == leave_out:
            continue
        adjacent = shape.adjacent and ("q_proj" in name or "k_proj" in name)
        ordered = interleave(tensor) if adjacent else tensor
        kind = quantization if tensor.ndim == 2 else GGMLQuantizationType.F32
        for long, short in {**GGUF_NAMES, **shape.names}.items():
            name = name.replace(long, short)  # noqa: PLW2901
        writer.add_tensor(name, quantize(ordered, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
