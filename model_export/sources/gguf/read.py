"""Reads a GGUF file."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, ReaderTensor, dequantize
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.sources.checkpoint import Architecture, Checkpoint, split_fused
from model_export.sources.gguf import config
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.gguf.tokenizer import read_vocabulary
from model_export.sources.panics import told_as
from model_export.sources.vocabulary import Vocabulary
from model_export.sources.weights import BLOCK, Blocks, LazyTensor, Matrix, take_rows
from model_export.sources.weights import dequantize as unpacked

PART = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
QUANTIZATION_SUFFIX = re.compile(r"[-.](I?Q\d\w*|[BF]?F?(16|32))$", re.IGNORECASE)


def open_gguf(path: Path) -> GGUFReader:
    """Reads what a GGUF file says of its model. Raises ExportError where it is none."""
    try:
        return GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ExportError(f"{path} is not a complete GGUF file: {error}") from error


def gguf_name(path: Path) -> str:
    """The name of the model in a file, without its quantization and the number of a part."""
    part = PART.fullmatch(path.stem)
    return QUANTIZATION_SUFFIX.sub("", part["name"] if part else path.stem)


def gguf_parts(path: Path) -> list[Path]:
    """The files of a model, of which `path` is the first. Raises ExportError where it is another, or one is missing."""
    part = PART.fullmatch(path.stem)
    if part is None or int(part["count"]) <= 1:
        return [path]
    count = int(part["count"])
    if int(part["number"]) != 1:
        raise ExportError(f"{path} is part {int(part['number'])} of {count}; give the first")
    names = (f"{part['name']}-{number:05}-of-{count:05}{path.suffix}" for number in range(1, count + 1))
    parts = [path.with_name(name) for name in names]
    for each in parts:
        if not each.is_file():
            raise ExportError(f"{each} does not exist, one of the {count} parts of the model")
    return parts


def read_gguf(path: Path, reader: GGUFReader) -> Checkpoint:
    """The model of an opened file and of the parts that follow it; tensors are read when they are asked for."""
    metadata = Metadata(reader)
    parts = gguf_parts(path)
    if (count := metadata.get("split.count", 0)) > len(parts):
        raise ExportError(f"{path} is one of {count} parts, but not named -00001-of-{count:05}.gguf")
    every = [*reader.tensors, *(tensor for part in parts[1:] for tensor in open_gguf(part).tensors)]
    stored = {tensor.name: tensor for tensor in every}
    if len(stored) < len(every):
        raise ExportError(f"{path} and the parts that follow it hold a tensor twice")
    factors = {name: unpacked(_load(stored.pop(name))) for name in config.FACTORS if name in stored}
    architecture = config.architecture(metadata, list(stored), factors)
    tensors = {_name(name, architecture): _lazy(tensor, architecture) for name, tensor in stored.items()}
    split_fused(tensors, architecture)
    return Checkpoint(
        name=gguf_name(path),
        organization=metadata.get("general.organization", ""),
        weights=main_type(every),
        architecture=architecture,
        tensors=tensors,
        vocabulary=vocabulary_of(metadata),
    )


def vocabulary_of(metadata: Metadata) -> Vocabulary:
    """The tokenizer that the keys describe."""
    with told_as("its keys make no tokenizer"):
        return read_vocabulary(metadata)


def main_type(tensors: list[ReaderTensor]) -> str:
    """The type that holds most of the weights. Raises ExportError where there are none."""
    if not tensors:
        raise ExportError("the GGUF file holds no tensors")
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.tensor_type.name] = sizes.get(tensor.tensor_type.name, 0) + int(tensor.n_elements)
    return max(sizes, key=lambda name: sizes[name])


def _lazy(tensor: ReaderTensor, architecture: Architecture) -> LazyTensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))
    order = _half_split_order(tensor.name, architecture)
    return LazyTensor(shape, partial(_load, tensor) if order is None else lambda: take_rows(_load(tensor), order))


def _name(name: str, architecture: Architecture) -> str:
    for theirs, ours in architecture.family.gguf_names.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name


def _half_split_order(name: str, architecture: Architecture) -> NDArray[np.int64] | None:
    """Rows of queries or keys so that a head's rotary pairs lie half a head apart, where the file has them adjacent."""
    layer_tensor = name.rpartition(".")[0].rpartition(".")[2]
    if not architecture.family.gguf_adjacent_pairs or layer_tensor not in ("attn_q", "attn_k"):
        return None
    heads = architecture.heads if layer_tensor == "attn_q" else architecture.kv_heads
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
            try:
                return dequantize(tensor.data, kind).astype(np.float32, copy=False)
            except NotImplementedError:
                raise ExportError(f"tensor {tensor.name} is of type {kind.name}, which is not supported") from None


def _split(tensor: ReaderTensor, scalars: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """A tensor's blocks as their leading float16 scalars [rows, blocks, scalars] and the bytes of their codes."""
    rows, blocks = tensor.data.shape[0], int(tensor.shape[0]) // BLOCK
    data = np.asarray(tensor.data).view(np.uint8).reshape(rows, blocks, -1)
    header = np.ascontiguousarray(data[..., : 2 * scalars]).view(np.float16).astype(np.float32)
    return header, np.ascontiguousarray(data[..., 2 * scalars :])


def _nibbles(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A block's first 16 codes are the low halves of its bytes, the other 16 the high halves."""
    return np.concatenate([codes & 15, codes >> 4], axis=-1)
