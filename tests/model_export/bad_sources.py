"""Makers of damaged and hostile Hugging Face directories, each from a tiny whole one."""

from __future__ import annotations

import enum
import functools
import json
import operator
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.model_export import tiny
from tests.model_export.gguf_files import Maker


class Gone(enum.Enum):
    """Marks an entry that a row of a table removes."""

    GONE = enum.auto()


GONE = Gone.GONE


def content(raw: bytes) -> Maker:
    """A maker of a file of these bytes."""

    def make(path: Path) -> Path:
        path.write_bytes(raw)
        return path

    return make


def hugging_face(change: Callable[[Path], object] | None = None, **entries: Any) -> Maker:
    """A maker of the tiny Hugging Face directory with changes of its configuration, and then by `change`."""

    def make(path: Path) -> Path:
        tiny.hugging_face(path)
        edit(path / "config.json", entries)
        if change is not None:
            change(path)
        return path

    return make


def config(changes: Mapping[str, Any]) -> Maker:
    """A maker of the tiny Hugging Face directory with changes of its configuration."""
    return hugging_face(**changes)


def json_entries(name: str, changes: Mapping[str, Any]) -> Maker:
    """A maker of the tiny Hugging Face directory with changes of a JSON file; see `edit`."""
    return hugging_face(lambda path: edit(path / name, changes))


def edit(file: Path, changes: Mapping[str, Any]) -> None:
    """Sets entries of a JSON file, or removes those that are GONE; a slash leads into an object."""
    parsed = json.loads(file.read_text())
    for name, entry in changes.items():
        *folders, last = name.split("/")
        place = functools.reduce(operator.getitem, folders, parsed)
        if entry is GONE:
            del place[last]
        else:
            place[last] = entry
    file.write_text(json.dumps(parsed))


def placed(name: str) -> Maker:
    """A maker of the tiny Hugging Face directory whose index sends every tensor to the file `name`."""
    tensors = tiny.weights("llama")
    return json_entries("model.safetensors.index.json", {"weight_map": dict.fromkeys(tensors, name)})


def written(name: str, raw: str | bytes) -> Maker:
    """A maker of the tiny Hugging Face directory with other content of one file."""

    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(raw.encode() if isinstance(raw, str) else raw)

    return hugging_face(change)


def stored(name: str, values: np.ndarray) -> Maker:
    """A maker of the tiny Hugging Face directory with its weights in one file, `values` those of the tensor `name`."""
    return single({name: values})


def single(changes: Mapping[str, np.ndarray]) -> Maker:
    """A maker of the tiny Hugging Face directory with its weights in one file, and some others."""

    def merge(path: Path) -> None:
        shards = sorted(path.glob("*.safetensors"))
        tensors = {name: each for shard in shards for name, each in load_file(shard).items()}
        for file in [*shards, path / "model.safetensors.index.json"]:
            file.unlink()
        save_file({**tensors, **changes}, path / "model.safetensors")

    return hugging_face(merge)


def header(name: str, change: Any) -> Maker:
    """A maker of the tiny Hugging Face directory whose first shard has another description of the tensor `name`.

    `change` has other entries of its description, is another tensor of the shard whose bytes it has as well, or GONE.
    """

    def rewrite(described: dict[str, Any]) -> None:
        if change is GONE:
            del described[name]
        else:
            offsets = {"data_offsets": described[change]["data_offsets"]} if isinstance(change, str) else change
            described[name].update(offsets)

    return rewritten(rewrite)


def header_length(length: int) -> Maker:
    """A maker of the tiny Hugging Face directory whose first shard has a false header length."""
    return rewritten(lambda described: None, length)


def rewritten(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Maker:
    """A maker of the tiny Hugging Face directory with another header of its first shard."""

    def rewrite(path: Path) -> None:
        file = path / "model-0.safetensors"
        raw = file.read_bytes()
        size = struct.unpack_from("<Q", raw)[0]
        parsed = json.loads(raw[8 : 8 + size])
        change(parsed)
        made = json.dumps(parsed).encode()
        file.write_bytes(struct.pack("<Q", len(made) if length is None else length) + made + raw[8 + size :])

    return hugging_face(rewrite)


def fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


def device(path: Path) -> Path:
    return Path("/dev/zero")


def empty(path: Path) -> Path:
    path.mkdir()
    return path


def leads_out(name: str) -> Maker:
    """A directory in which a file is a link out of it."""

    def change(path: Path) -> None:
        outside = path.parent / "elsewhere"
        outside.mkdir(exist_ok=True)
        (path / name).rename(outside / name)
        (path / name).symlink_to(outside / name)

    return hugging_face(change)


def replaced_by_fifo(name: str) -> Maker:
    """A directory in which a file is a pipe without a writer."""

    def change(path: Path) -> None:
        (path / name).unlink()
        os.mkfifo(path / name)

    return hugging_face(change)


def itself(make: Maker) -> Maker:
    return make


def sparse_config(path: Path) -> None:
    """A configuration of a gigabyte."""
    with (path / "config.json").open("r+b") as file:
        file.truncate(1 << 30)


def cut_off(path: Path) -> None:
    """A shard that ends too early."""
    os.truncate(path / "model-0.safetensors", 9000)


def copied_shard(path: Path) -> None:
    """The same tensors in two files, without an index."""
    (path / "model.safetensors.index.json").unlink()
    (path / "model-2.safetensors").write_bytes((path / "model-1.safetensors").read_bytes())


def missing_shard(path: Path) -> None:
    (path / "model-1.safetensors").unlink()


def no_weights(path: Path) -> None:
    for file in path.glob("model*"):
        file.unlink()


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def only_pickle(marker: Path) -> Maker:
    """A maker of a directory whose weights are a pickle that makes the file `marker` when it is loaded."""

    def change(path: Path) -> None:
        for file in path.glob("model*"):
            file.unlink()
        with zipfile.ZipFile(path / "pytorch_model.bin", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Touch(marker)))

    return hugging_face(change)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)
