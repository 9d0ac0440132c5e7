"""Reads a Hugging Face directory, each file once. Its code, pickles and templates are never used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model_export.errors import ExportError
from model_export.sources.field_types import parse
from model_export.sources.files import MIB, plain_file, read_json
from model_export.sources.hugging_face.config import Config, TokenIds, read_config
from model_export.sources.hugging_face.shards import open_shards
from model_export.sources.weights import LazyTensor

ADAPTER = "adapter_config.json"
LARGEST_TOKENIZER = 512 * MIB


@dataclass(frozen=True)
class Directory:
    """The content of a directory: the `entries` of its config.json, the same parsed as `config`, and its tensors.

    `generation` has the tokens of generation_config.json. The weight files have `size` bytes in all.
    """

    path: Path
    entries: Mapping[str, Any]
    config: Config
    generation: TokenIds
    tensors: Mapping[str, LazyTensor]
    size: int


def read_directory(path: Path) -> Directory:
    """Reads everything except the weights and the tokenizer.

    Raises ExportError unless the directory has a configuration, complete safetensors and a tokenizer.json.
    """
    if (path / ADAPTER).exists():
        raise ExportError(f"{path} holds an adapter ({ADAPTER}); merge it into its model first")
    if not (path / "config.json").exists() and (files := sorted(path.glob("*.gguf"))):
        raise ExportError(f"{path} has no config.json, but a GGUF file, which is a source itself: give {files[0]}")
    entries = read_json(path, "config.json")
    config = read_config(str(path / "config.json"), entries)
    tensors, size = open_shards(path)
    if not (path / "tokenizer.json").exists():
        raise ExportError(f"{path / 'tokenizer.json'} does not exist; a slow tokenizer has to be converted first")
    plain_file(path, "tokenizer.json", LARGEST_TOKENIZER)
    generation = path / "generation_config.json"
    stored = read_json(path, generation.name) if generation.exists() else {}
    return Directory(path, entries, config, parse(TokenIds, str(generation), stored), tensors, size)
