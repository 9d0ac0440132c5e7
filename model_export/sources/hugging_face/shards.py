"""Opens the safetensors files of a Hugging Face directory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from model_export.errors import ExportError
from model_export.sources.files import MIB, plain_file, read_json
from model_export.sources.weights import Floats, LazyTensor

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_INDEX = 64 * MIB
FLOAT_TYPES = ("F32", "F16", "BF16")
# Tables that old files hold and nobody reads.
UNREAD = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")


@dataclass(frozen=True)
class Shard:
    """A file of `size` bytes and its tensors, which are read when they are asked for."""

    path: Path
    size: int
    tensors: dict[str, LazyTensor]


def open_shards(directory: Path) -> tuple[Shard, ...]:
    """The files of weights, each opened this once: its header is read, and its tensors stay mapped.

    Raises ExportError where there are none, where one is not whole, or where one does not fit the index or another.
    """
    shards: list[Shard] = []
    found: dict[str, Path] = {}
    for path, expected in _listed(directory).items():
        shard = _open(path)
        if missing := sorted(set(expected) - shard.tensors.keys()):
            raise ExportError(f"{path} has no tensor {missing[0]}, expected by {INDEX}")
        if twice := sorted(shard.tensors.keys() & found.keys()):
            raise ExportError(f"{path} has a tensor {twice[0]}, which {found[twice[0]].name} has too")
        found |= dict.fromkeys(shard.tensors, path)
        shards.append(shard)
    return tuple(shards)


def _open(path: Path) -> Shard:
    """Opens a file; the safetensors library itself refuses headers that do not fit it."""
    tensors = {}
    try:
        file: Any = safe_open(path, "numpy")
        for name in file.keys():  # noqa: SIM118 - not a mapping
            stored = file.get_slice(name)
            if stored.get_dtype() not in FLOAT_TYPES and not UNREAD.fullmatch(name):
                raise ExportError(f"{path}: tensor {name} holds {stored.get_dtype()}, which is not supported")
            tensors[name] = LazyTensor(tuple(stored.get_shape()), partial(_load, file, name))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is not a complete safetensors file: {error}") from error
    return Shard(path, path.stat().st_size, tensors)


def _load(file: Any, name: str) -> Floats:
    tensor: NDArray[Any] = file.get_tensor(name)
    return tensor.astype(np.float32)


def _listed(directory: Path) -> dict[Path, list[str]]:
    """The files of weights, and which tensors the index says that each has. Raises ExportError where there are none."""
    present = [plain_file(directory, path.name) for path in sorted(directory.glob("*.safetensors"))]
    whole = directory / "model.safetensors"  # beside which other forms of the same weights may lie
    if (directory / INDEX).exists():
        if whole in present:
            raise ExportError(f"{directory} holds both {whole.name} and {INDEX}; remove one of them")
        return _indexed(directory)
    if present:
        return {path: [] for path in ([whole] if whole in present else present)}
    if pickles := sorted(path.name for pattern in PICKLES for path in directory.glob(pattern)):
        reason = "a pickle, which may run any code when it is read; convert it to safetensors"
        raise ExportError(f"{directory} holds no safetensors, only {pickles[0]}: {reason}")
    raise ExportError(f"{directory} holds no safetensors")


def _indexed(directory: Path) -> dict[Path, list[str]]:
    weight_map = read_json(directory, INDEX, LARGEST_INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ExportError(f"{directory / INDEX}: weight_map is not an object of tensors and their files")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not file.endswith(".safetensors") or "\0" in file:
            raise ExportError(f"{directory / INDEX}: tensor {tensor} is in {file!r}, expected a safetensors file")
        files.setdefault(file, []).append(tensor)
    return {plain_file(directory, file): tensors for file, tensors in sorted(files.items())}
