"""Checks the values of a GGUF file's keys before they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np

from model_export.errors import ExportError
from model_export.sources import field_types
from model_export.sources.gguf.header import Header
from model_export.sources.gguf.metadata import Metadata

KEYS: dict[str, Any] = {
    "general.architecture": field_types.Text,
    "general.organization": field_types.Text,
    "general.type": field_types.Text,
    "tokenizer.ggml.model": field_types.Text,
    "tokenizer.ggml.pre": field_types.Text,
    "tokenizer.chat_template": field_types.Text,
    "tokenizer.ggml.add_bos_token": field_types.Flag,
    "tokenizer.ggml.add_space_prefix": field_types.Flag,
    "split.count": Annotated[int, field_types.Within(0, 99_999)],
}
# These keys follow the name of the architecture.
NUMBERS: dict[str, Any] = {
    "block_count": field_types.Layers,
    "embedding_length": field_types.Hidden,
    "feed_forward_length": field_types.Intermediate,
    "context_length": field_types.Context,
    "attention.head_count": field_types.Heads,
    "attention.head_count_kv": field_types.Heads,
    "attention.key_length": field_types.HeadDim,
    "attention.value_length": field_types.HeadDim,
    "attention.layer_norm_rms_epsilon": field_types.Epsilon,
    "attention.layer_norm_epsilon": field_types.Epsilon,
    "attention.sliding_window": field_types.Window,
    "rope.dimension_count": field_types.HeadDim,
    "rope.freq_base": field_types.RotaryBase,
    "rope.scaling.factor": field_types.Scale,
    "rope.scaling.type": field_types.Text,
    "rope.scaling.original_context_length": field_types.Context,
    "rope.scaling.attn_factor": field_types.Scale,
    "rope.scaling.yarn_beta_fast": field_types.Scale,
    "rope.scaling.yarn_beta_slow": field_types.Scale,
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
    """Raises ExportError where a value has the wrong type, is out of range, or contradicts another."""
    path, metadata = header.path, header.metadata
    family = metadata.get("general.architecture")
    for key, field_type in {**KEYS, **{f"{family}.{name}": number for name, number in NUMBERS.items()}}.items():
        if key in metadata:
            field_types.check_type(f"{path}: {key}", metadata[key], field_type)
    heads, hidden = metadata.get(f"{family}.attention.head_count"), metadata.get(f"{family}.embedding_length")
    if heads is not None and hidden is not None:
        head_dim = metadata.get(f"{family}.attention.key_length")
        kv_heads = metadata.get(f"{family}.attention.head_count_kv", heads)
        field_types.check_heads(str(path), hidden, heads, kv_heads, head_dim)
        field_types.check_rotation(str(path), metadata.get(f"{family}.context_length"), head_dim or hidden // heads)
    if TOKENS in metadata:
        _check_tokens(path, metadata)
    if not header.tensors and metadata.get("split.count", 0) <= 1:  # the first of several files may have only keys
        raise ExportError(f"{path} is not a complete GGUF file: it has no tensors")


def _check_tokens(path: Path, metadata: Metadata) -> None:
    tokens = _texts(path, TOKENS, metadata[TOKENS])
    if not tokens:
        raise ExportError(f"{path}: {TOKENS} holds no tokens")
    ids: dict[str, int] = {}
    for index, token in enumerate(tokens):
        if (first := ids.setdefault(token, index)) != index:
            raise ExportError(
                f"{path}: {TOKENS} holds {field_types.abbreviated(token)} twice, as {first} and as {index}"
            )
    for key in IDS:
        if key in metadata:
            field_types.check_type(
                f"{path}: {key}", metadata[key], Annotated[int, field_types.Within(0, len(tokens) - 1)]
            )
    for key, kinds in {"tokenizer.ggml.scores": "f", "tokenizer.ggml.token_type": "iu"}.items():
        if key in metadata:
            _check_numbers(path, key, metadata[key], kinds, len(tokens))
    if metadata.get("tokenizer.ggml.model") == "gpt2" and MERGES in metadata:
        _texts(path, MERGES, metadata[MERGES])


def _texts(path: Path, key: str, value: object) -> list[str]:
    if not isinstance(value, list):
        actual = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else field_types.abbreviated(value)
        raise ExportError(f"{path}: {key} is {actual}, expected an array of texts")
    return value


def _check_numbers(path: Path, key: str, value: object, kinds: str, count: int) -> None:
    if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
        raise ExportError(f"{path}: {key} is not an array of numbers")
    if len(value) != count:
        raise ExportError(f"{path}: {key} has {len(value)} elements, expected one for each of {count} tokens")
    if not np.isfinite(value).all():
        raise ExportError(f"{path}: {key} holds a number that is not finite")
