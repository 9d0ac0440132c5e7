"""Opens the safetensors files of a Hugging Face directory."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from model_export.errors import ExportError
from model_export.sources.files import MIB, looks_like, plain_file, read_json
from model_export.sources.hugging_face.pages import Mappings
from model_export.sources.weights import Floats, LazyTensor

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_INDEX = 64 * MIB
FLOAT_TYPES = ("F32", "F16", "BF16")
# The types and names of tensors that hold several quantized weights in each number.
PACKED_TYPES, PACKED_NAMES = ("U32", "U8", "I8", "F8_E4M3", "F8_E5M2"), (".qweight", ".qzeros", ".g_idx")
ONLY_AS_GGUF = "quantized weights are supported only as GGUF"
# Tables in old files that no model uses.
UNREAD = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")


def open_shards(directory: Path) -> tuple[dict[str, LazyTensor], int]:
    """The tensors of all weight files by name, and the size of these files in bytes.

    Each file is opened once: its header is read, and its tensors stay mapped and are read when they are used. Raises
    ExportError where there are no files, or where one is not complete or contradicts the index or another file.
    """
    tensors: dict[str, LazyTensor] = {}
    file_of: dict[str, Path] = {}
    files = _listed(directory)
    for path, expected in files.items():
        stored = _open(path)
        if missing := sorted(set(expected) - stored.keys()):
            raise ExportError(f"{path} has no tensor {missing[0]}, expected by {INDEX}")
        if repeated := sorted(stored.keys() & tensors.keys()):
            raise ExportError(f"{path} has a tensor {repeated[0]}, which {file_of[repeated[0]].name} has too")
        file_of |= dict.fromkeys(stored, path)
        tensors |= stored
    return tensors, sum(path.stat().st_size for path in files)


def _open(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file; the safetensors library itself checks the header against the file."""
    tensors = {}
    try:
        file: Any = safe_open(path, "numpy")
        mappings = Mappings.of(path)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            stored = file.get_slice(name)
            if stored.get_dtype() not in FLOAT_TYPES and not UNREAD.fullmatch(name):
                raise ExportError(f"{path}: tensor {name} holds {stored.get_dtype()}, {_unsupported(name, stored)}")
            tensors[name] = LazyTensor(tuple(stored.get_shape()), partial(_load, stored, mappings))
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path} is not a complete safetensors file: {error}{looks_like(path)}") from error
    return tensors


def _unsupported(name: str, stored: Any) -> str:
    """Why a tensor of another type than FLOAT_TYPES cannot be read."""
    if stored.get_dtype() in PACKED_TYPES or name.endswith(PACKED_NAMES):
        return f"so it is already quantized; {ONLY_AS_GGUF}"
    return f"which is not supported; supported are {', '.join(FLOAT_TYPES)}"


def _load(stored: Any, mappings: Mappings, rows: slice) -> Floats:
    """Rows of a tensor; `stored` keeps its file mapped."""
    loaded = np.asarray(stored[rows]).astype(np.float32)
    mappings.give_back()
    return loaded


def _listed(directory: Path) -> dict[Path, list[str]]:
    """The weight files, and the tensors of each according to the index. Raises ExportError where there are none."""
    present = [plain_file(directory, path.name) for path in sorted(directory.glob("*.safetensors"))]
    single = directory / "model.safetensors"  # other forms of the same weights may lie beside it
    if (directory / INDEX).exists():
        if single in present:
            raise ExportError(f"{directory} holds both {single.name} and {INDEX}; remove one of them")
        return _indexed(directory)
    if present:
        return {path: [] for path in ([single] if single in present else present)}
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
