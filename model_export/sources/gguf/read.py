"""Makes a checkpoint of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.sources import weights
from model_export.sources.checkpoint import Architecture, Checkpoint, Origin, split_fused
from model_export.sources.gguf import config
from model_export.sources.gguf.header import Header, Tensor, read_header
from model_export.sources.gguf.keys import check_metadata
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.gguf.tokenizer import vocabulary_from_metadata
from model_export.sources.weights import BLOCK, Blocks, LazyTensor, Matrix

PART = re.compile(r"(?P<name>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")
QUANTIZATION_SUFFIX = re.compile(r"[-.](I?Q\d\w*|[BF]?F?(16|32))$", re.IGNORECASE)

# Values of general.type of files that are no models.
NO_MODELS = {
    "adapter": "it holds an adapter; merge it into its model first",
    "imatrix": "it holds an importance matrix for quantizing a model, not a model",
    "mmproj": "it holds a projector of images for a model, not a model",
}

# The types whose blocks are kept as they are: the bits of a code, and the code of a weight of 0, None where each block
# has a minimum.
BLOCK_TYPES: Mapping[GGMLQuantizationType, tuple[int, int | None]] = {
    GGMLQuantizationType.Q4_0: (4, 8),
    GGMLQuantizationType.Q4_1: (4, None),
    GGMLQuantizationType.Q8_0: (8, 128),
}


@dataclass(frozen=True)
class GgufModel:
    """The model in the file at `path` and its further parts, `parts` files of `size` bytes in all.

    `metadata` is that of the first file; `tensors` are those of all files, by name.
    """

    path: Path
    parts: int
    size: int
    metadata: Metadata
    tensors: Mapping[str, Tensor]


def open_gguf(path: Path) -> GgufModel:
    """Reads the headers of a model's files. Raises ExportError where they are not complete or not one model."""
    headers = [open_header(part) for part in _parts(path)]
    metadata = headers[0].metadata
    if (count := metadata.get("split.count", 0)) > len(headers):
        raise ExportError(f"{path} is one of {count} parts, but not named -00001-of-{count:05}.gguf")
    stored = [tensor for header in headers for tensor in header.tensors]
    tensors = {tensor.name: tensor for tensor in stored}
    if len(tensors) < len(stored):
        raise ExportError(f"{path} and the parts that follow it hold a tensor twice")
    return GgufModel(path, len(headers), sum(header.size for header in headers), metadata, tensors)


def open_header(path: Path) -> Header:
    """The checked header of one file. Raises ExportError where the file is not complete or no model."""
    header = read_header(path)
    check_metadata(header)
    if kind := NO_MODELS.get(header.metadata.get("general.type", "")):
        raise ExportError(f"{path}: general.type is {header.metadata['general.type']!r}: {kind}")
    return header


def gguf_name(path: Path) -> str:
    """The model's name: that of its file without quantization and number of the part."""
    part = PART.fullmatch(path.stem)
    return QUANTIZATION_SUFFIX.sub("", part["name"] if part else path.stem)


def _parts(path: Path) -> list[Path]:
    """The files of the model whose first is `path`. Raises ExportError where it is not the first, or one is missing."""
    part = PART.fullmatch(path.stem)
    if part is None or int(part["count"]) <= 1:
        return [path]
    count = int(part["count"])
    if int(part["number"]) != 1:
        raise ExportError(f"{path} is part {int(part['number'])} of {count}; give the first")
    parts = [path.with_name(f"{part['name']}-{number:05}-of-{count:05}{path.suffix}") for number in range(1, count + 1)]
    for file in parts:
        if not file.is_file():
            raise ExportError(f"{file} does not exist, one of the {count} parts of the model")
    return parts


def read_gguf(model: GgufModel) -> Checkpoint:
    """The checkpoint in a model's files; a tensor is read when it is used."""
    architecture, tensors = outline(model)
    return Checkpoint(gguf_origin(model), architecture, tensors)


def outline(model: GgufModel) -> tuple[Architecture, dict[str, LazyTensor]]:
    """The architecture of a model and its tensors, which may lack some.

    Of the tensors it reads only the factors of the rotary frequencies.
    """
    stored = dict(model.tensors)
    factors = {
        name: weights.dequantize(_load(stored.pop(name), slice(None))) for name in config.FACTORS if name in stored
    }
    architecture = config.architecture(model.metadata, list(stored), factors)
    tensors = {_name(name, architecture): _lazy(tensor, architecture) for name, tensor in stored.items()}
    split_fused(tensors, architecture)
    return architecture, tensors


def gguf_origin(model: GgufModel) -> Origin:
    """The name, the tokenizer and the weights' form of a model."""
    return Origin(
        path=model.path,
        name=gguf_name(model.path),
        organization=model.metadata.get("general.organization", ""),
        weights=_main_type(model.tensors.values()),
        size=model.size,
        vocabulary=vocabulary_from_metadata(model.metadata),
    )


def _main_type(tensors: Collection[Tensor]) -> str:
    """The name of the type that most weights have. Raises ExportError where there are no tensors."""
    if not tensors:
        raise ExportError("the GGUF file holds no tensors")
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype.name] = sizes.get(tensor.dtype.name, 0) + prod(tensor.shape)
    return max(sizes, key=lambda name: sizes[name])


def _lazy(tensor: Tensor, architecture: Architecture) -> LazyTensor:
    """The tensor as it is; where pairs to rotate are adjacent rows of it, they are moved half a head apart."""
    layer_tensor = tensor.name.rpartition(".")[0].rpartition(".")[2]
    bits = BLOCK_TYPES[tensor.dtype][0] if tensor.dtype in BLOCK_TYPES else None
    if not architecture.family.gguf_adjacent_pairs or layer_tensor not in ("attn_q", "attn_k"):
        return LazyTensor(tensor.shape, partial(_read, tensor), bits)
    heads = architecture.heads if layer_tensor == "attn_q" else architecture.kv_heads
    if tensor.shape[0] != heads * architecture.head_dim:  # refused later; an order of so many rows could be huge
        return LazyTensor(tensor.shape, partial(_read, tensor), bits)
    rows = np.arange(heads * architecture.head_dim).reshape(heads, architecture.head_dim // 2, 2)
    order = rows.swapaxes(1, 2).reshape(-1)
    return LazyTensor(tensor.shape, lambda rows: _read(tensor, order[rows]), bits)


def _name(name: str, architecture: Architecture) -> str:
    for stored_name, usual_name in architecture.family.gguf_names.items():
        name = name.replace(f".{stored_name}.", f".{usual_name}.")
    return name


def _read(tensor: Tensor, rows: slice | NDArray[np.int64]) -> Matrix:
    matrix = _load(tensor, rows)
    tensor.give_back()
    return matrix


def _load(tensor: Tensor, rows: slice | NDArray[np.int64]) -> Matrix:
    """The rows of a matrix, or a whole vector.

    Each block of a matrix begins with a scale and perhaps a minimum in float16, before the bytes of its codes.
    In 4 bits, the first 16 codes are the low halves of the bytes, the other 16 the high halves.
    """
    if tensor.dtype not in BLOCK_TYPES:
        # The data of a vector is one row of bytes.
        data = tensor.data if len(tensor.shape) == 1 else tensor.data[rows]
        return dequantize(data, tensor.dtype).astype(np.float32, copy=False)
    bits, zero = BLOCK_TYPES[tensor.dtype]
    data = tensor.data[rows].reshape(-1, tensor.shape[-1] // BLOCK, 2 + 2 * (zero is None) + 4 * bits)
    scalars = np.ascontiguousarray(data[..., : -4 * bits]).view(np.float16).astype(np.float32)
    codes = np.ascontiguousarray(data[..., -4 * bits :])
    # Bytes are signed, the codes of blocks are not.
    codes = codes ^ np.uint8(0x80) if bits == 8 else np.concatenate([codes & 15, codes >> 4], axis=-1)
    minimums = scalars[..., 1] if zero is None else -zero * scalars[..., 0]
    return Blocks(codes, scalars[..., 0], minimums, bits)
