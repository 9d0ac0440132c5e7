"""Checks what the keys of a GGUF file say, before anything is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np

from model_export.errors import ExportError
from model_export.sources import bounds
from model_export.sources.bounds import Whole, check, check_heads, check_rotation, shown
from model_export.sources.gguf.header import Header
from model_export.sources.gguf.metadata import Metadata

KEYS: dict[str, Any] = {
    "general.architecture": bounds.Text,
    "general.organization": bounds.Text,
    "tokenizer.ggml.model": bounds.Text,
    "tokenizer.ggml.pre": bounds.Text,
    "tokenizer.ggml.add_bos_token": bounds.Flag,
    "tokenizer.ggml.add_space_prefix": bounds.Flag,
    "split.count": Annotated[int, Whole(0, 99_999)],
}
# Behind the architecture's name.
NUMBERS: dict[str, Any] = {
    "block_count": bounds.Layers,
    "embedding_length": bounds.Hidden,
    "feed_forward_length": bounds.Intermediate,
    "context_length": bounds.Context,
    "attention.head_count": bounds.Heads,
    "attention.head_count_kv": bounds.Heads,
    "attention.key_length": bounds.HeadDim,
    "attention.value_length": bounds.HeadDim,
    "attention.layer_norm_rms_epsilon": bounds.Epsilon,
    "attention.layer_norm_epsilon": bounds.Epsilon,
    "attention.sliding_window": bounds.Window,
    "rope.dimension_count": bounds.HeadDim,
    "rope.freq_base": bounds.RotaryBase,
    "rope.scaling.factor": bounds.Scale,
    "rope.scaling.type": bounds.Text,
    "rope.scaling.original_context_length": bounds.Context,
    "rope.scaling.attn_factor": bounds.Scale,
    "rope.scaling.yarn_beta_fast": bounds.Scale,
    "rope.scaling.yarn_beta_slow": bounds.Scale,
}
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
IDS = tuple(
    f"tokenizer.ggml.{name}_token_id"
    for name in (
        *("bos", "eos", "eot", "eom", "unknown", "prefix", "suffix", "middle"),
        *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
    )
)


def check_metadata(header: Header) -> None:
    """Raises ExportError where a value is of the wrong kind, or out of all bounds, or does not fit another."""
    path, metadata = header.path, header.metadata
    family = metadata.get("general.architecture")
    for key, kind in {**KEYS, **{f"{family}.{name}": kind for name, kind in NUMBERS.items()}}.items():
        if key in metadata:
            check(f"{path}: {key}", metadata[key], kind)
    _check_sizes(header, f"{family}.")
    if TOKENS in metadata:
        _check_tokens(path, metadata)
    if not header.tensors and metadata.get("split.count", 0) <= 1:  # the first of several files may have keys alone
        raise ExportError(f"{path} is not a complete GGUF file: it has no tensors")


def _check_sizes(header: Header, prefix: str) -> None:
    path, metadata = header.path, header.metadata
    heads, hidden = metadata.get(f"{prefix}attention.head_count"), metadata.get(f"{prefix}embedding_length")
    if heads is None or hidden is None:
        return
    head_dim = metadata.get(f"{prefix}attention.key_length")
    check_heads(str(path), hidden, heads, metadata.get(f"{prefix}attention.head_count_kv", heads), head_dim)
    pairs = (head_dim or hidden // heads) // 2
    check_rotation(str(path), metadata.get(f"{prefix}context_length"), 2 * pairs)
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight" and tensor.shape != (pairs,):
            raise ExportError(f"{path}: tensor {tensor.name} has shape {list(tensor.shape)}, expected {[pairs]}")


def _check_tokens(path: Path, metadata: Metadata) -> None:
    tokens = _texts(path, TOKENS, metadata[TOKENS])
    if not tokens:
        raise ExportError(f"{path}: {TOKENS} holds no tokens")
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if (first := ids.setdefault(token, index)) != index:
            raise ExportError(f"{path}: {TOKENS} holds {shown(token)} twice, as {first} and as {index}")
    for key in IDS:
        if key in metadata:
            check(f"{path}: {key}", metadata[key], Annotated[int, Whole(0, len(tokens) - 1)])
    for key, kinds in {"tokenizer.ggml.scores": "f", "tokenizer.ggml.token_type": "iu"}.items():
        if key in metadata:
            _check_numbers(path, key, metadata[key], kinds, len(tokens))
    if metadata.get("tokenizer.ggml.model") == "gpt2" and MERGES in metadata:
        _texts(path, MERGES, metadata[MERGES])


def _texts(path: Path, key: str, value: object) -> list[str]:
    if not isinstance(value, list):
        found = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else shown(value)
        raise ExportError(f"{path}: {key} is {found}, expected an array of texts")
    return value


def _check_numbers(path: Path, key: str, value: object, kinds: str, count: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise ExportError(f"{path}: {key} is not an array of numbers")
    if len(value) != count:
        raise ExportError(f"{path}: {key} has {len(value)} elements, expected one for each of {count} tokens")
    if not np.isfinite(value).all():
        raise ExportError(f"{path}: {key} holds a number that is not finite")
