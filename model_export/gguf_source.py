"""Reads a GGUF file."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from model_export.checkpoint import FAMILIES, Architecture, Checkpoint, rotary_frequencies
from model_export.errors import ExportError
from model_export.gguf_metadata import Metadata
from model_export.gguf_tokenizer import read_vocabulary
from model_export.panics import told_as
from model_export.vocabulary import Vocabulary
from model_export.weights import BLOCK, Blocks, LazyTensor, Matrix, take_rows

QUANTIZATION_SUFFIX = re.compile(r"[-.](I?Q\d\w*|[BF]?F?(16|32))$", re.IGNORECASE)


def read_gguf(path: Path) -> Checkpoint:
    """Opens a GGUF file; tensors are read when they are asked for."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ExportError(f"{path} is not a complete GGUF file: {error}") from error
    metadata = Metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    factors = tensors.pop("rope_freqs.weight", None)
    architecture = _architecture(metadata, "output.weight" not in tensors, _load(factors) if factors else 1.0)
    return Checkpoint(
        name=QUANTIZATION_SUFFIX.sub("", path.stem),
        organization=metadata.get("general.organization", ""),
        weights=_main_type(reader.tensors),
        architecture=architecture,
        tensors={name: _lazy(tensor, architecture) for name, tensor in tensors.items()},
        vocabulary=_vocabulary(metadata),
    )


def _vocabulary(metadata: Metadata) -> Vocabulary:
    with told_as("its keys make no tokenizer"):
        return read_vocabulary(metadata)


def _architecture(metadata: Metadata, tied: bool, factors: Any) -> Architecture:
    family = metadata.require("general.architecture")
    if family not in FAMILIES:
        raise ExportError(f"architecture {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    heads = metadata.require(f"{family}.attention.head_count")
    hidden = metadata.require(f"{family}.embedding_length")
    head_dim = metadata.get(f"{family}.attention.key_length", hidden // heads)
    _refuse_variants(metadata, family, head_dim)
    base = metadata.get(f"{family}.rope.freq_base", 10000.0)
    if metadata.get(f"{family}.rope.scaling.type") == "linear":
        factors = factors * metadata.require(f"{family}.rope.scaling.factor")
    return Architecture(
        family=family,
        layers=metadata.require(f"{family}.block_count"),
        hidden_size=hidden,
        intermediate_size=metadata.require(f"{family}.feed_forward_length"),
        heads=heads,
        kv_heads=metadata.get(f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        vocab_size=len(metadata.require("tokenizer.ggml.tokens")),
        context_length=_context_length(metadata, family),
        norm_epsilon=metadata.require(f"{family}.attention.layer_norm_rms_epsilon"),
        rotary_frequencies=rotary_frequencies(head_dim, base, factors),
        tied_embedding=tied,
    )


def _refuse_variants(metadata: Metadata, family: str, head_dim: int) -> None:
    scaling = metadata.get(f"{family}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise ExportError(f"rotary scaling {scaling!r} is not supported; supported are none, linear and llama3")
    for key in ("rope.dimension_count", "attention.value_length"):
        if metadata.get(f"{family}.{key}", head_dim) != head_dim:
            raise ExportError(f"{family}.{key} other than the head size {head_dim} is not supported")
    for key in ("attn_logit_softcapping", "final_logit_softcapping", "expert_count", "logit_scale"):
        if metadata.get(f"{family}.{key}"):
            raise ExportError(f"{family}.{key} is not supported")


def _context_length(metadata: Metadata, family: str) -> int:
    """Within its window, sliding attention is full attention: the window bounds the context."""
    length = int(metadata.require(f"{family}.context_length"))
    return min(length, metadata.get(f"{family}.attention.sliding_window") or length)


def _main_type(tensors: list[ReaderTensor]) -> str:
    """The type that holds most of the weights."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda name: sizes[name])


def _lazy(tensor: ReaderTensor, architecture: Architecture) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    order = _half_split_order(tensor.name, architecture)
    return LazyTensor(shape, partial(_load, tensor) if order is None else lambda: take_rows(_load(tensor), order))


def _half_split_order(name: str, architecture: Architecture) -> NDArray[np.int64] | None:
    """Rows of a query or key matrix so that a head's rotary pairs lie half a head apart, not side by side.

    GGUF's llama family stores them side by side.
    """
    if architecture.family != "llama" or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return None
    heads = architecture.heads if name.endswith("attn_q.weight") else architecture.kv_heads
    rows = np.arange(heads * architecture.head_dim).reshape(heads, architecture.head_dim // 2, 2)
    return rows.swapaxes(1, 2).reshape(-1)


def _load(tensor: ReaderTensor) -> Matrix:
    match tensor.tensor_type:
        case GGMLQuantizationType.Q4_0:
            scales, codes = _split(tensor, scalars=1)
            return Blocks(_nibbles(codes), scales[..., 0], -8 * scales[..., 0], bits=4)
        case GGMLQuantizationType.Q4_1:
            scales, codes = _split(tensor, scalars=2)
            return Blocks(_nibbles(codes), scales[..., 0], scales[..., 1], bits=4)
        case GGMLQuantizationType.Q8_0:
            scales, codes = _split(tensor, scalars=1)
            return Blocks(codes ^ np.uint8(0x80), scales[..., 0], -128 * scales[..., 0], bits=8)
        case kind:
            return dequantize(tensor.data, kind).astype(np.float32, copy=False)


def _split(tensor: ReaderTensor, scalars: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A tensor's blocks as their leading float16 scalars [rows, blocks, scalars] and the bytes of their codes."""
    rows, blocks = tensor.data.shape[0], int(tensor.shape[0]) // BLOCK
    data = np.asarray(tensor.data).view(np.uint8).reshape(rows, blocks, -1)
    header = np.ascontiguousarray(data[..., : 2 * scalars]).view(np.float16).astype(np.float32)
    return header, np.ascontiguousarray(data[..., 2 * scalars :])


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A block's first 16 codes are the low halves of its bytes, the other 16 the high halves."""
    return np.concatenate([codes & 15, codes >> 4], axis=-1)
