"""Makers of damaged and hostile sources, each from a tiny whole one."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Tensor
from gguf import GGUFValueType as Value
from safetensors.numpy import load_file, save_file

from tests.model_export import tiny

ALIGNMENT = 32
FORMS = {
    Value.UINT8: "<B",
    Value.INT8: "<b",
    Value.UINT32: "<I",
    Value.INT32: "<i",
    Value.UINT64: "<Q",
    Value.FLOAT32: "<f",
    Value.FLOAT64: "<d",
    Value.BOOL: "<?",
}


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string as GGUF has it, or one that lies about its length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: Value, content: Any) -> bytes:
    """A typed value."""
    body = text(content) if kind == Value.STRING else struct.pack(FORMS[kind], content)
    return struct.pack("<I", kind) + body


def array(kind: Value, items: list[Any], count: int | None = None) -> bytes:
    """A typed array, or one that lies about its length."""
    body = b"".join(text(each) if kind == Value.STRING else struct.pack(FORMS[kind], each) for each in items)
    return struct.pack("<IIQ", Value.ARRAY, kind, len(items) if count is None else count) + body


@dataclass
class Info:
    """A tensor's description, as the file will state it."""

    name: str | bytes
    shape: list[int]
    kind: int
    offset: int
    dimensions: int | None = None

    def encode(self) -> bytes:
        """Its bytes; `dimensions` may lie."""
        count = len(self.shape) if self.dimensions is None else self.dimensions
        sides = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return text(self.name) + struct.pack("<I", count) + sides + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Gguf:
    """A tiny GGUF model in float32, whole until something is changed."""

    magic: bytes = b"GGUF"
    version: bytes = struct.pack("<I", 3)
    keys: list[tuple[str | bytes, bytes]] = field(default_factory=list)
    tensors: list[Info] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    claimed_tensors: int | None = None
    claimed_keys: int | None = None

    def encode(self) -> bytes:
        """The file."""
        counts = (
            len(self.tensors) if self.claimed_tensors is None else self.claimed_tensors,
            len(self.keys) if self.claimed_keys is None else self.claimed_keys,
        )
        head = self.magic + self.version + struct.pack("<QQ", *counts)
        head += b"".join(text(key) + content for key, content in self.keys)
        head += b"".join(tensor.encode() for tensor in self.tensors)
        return head + bytes(-len(head) % ALIGNMENT) + bytes(self.data)

    def set(self, key: str, content: bytes) -> None:
        """Replaces a key, or adds it."""
        self.keys = [each for each in self.keys if each[0] != key] + [(key, content)]

    def drop(self, key: str) -> None:
        """Removes a key."""
        self.keys = [each for each in self.keys if each[0] != key]

    def tensor(self, name: str = "blk.0.ffn_up.weight") -> Info:
        """The description of a tensor."""
        return next(each for each in self.tensors if each.name == name)


def whole() -> Gguf:
    """The tiny model, as it should be."""
    made = Gguf()
    numbers = {
        "context_length": tiny.CONTEXT,
        "embedding_length": tiny.HIDDEN,
        "block_count": tiny.LAYERS,
        "feed_forward_length": tiny.INTERMEDIATE,
        "attention.head_count": tiny.HEADS,
        "attention.head_count_kv": tiny.KV_HEADS,
        "attention.key_length": tiny.HEAD_DIM,
    }
    made.set("general.architecture", value(Value.STRING, "llama"))
    for name, number in numbers.items():
        made.set(f"llama.{name}", value(Value.UINT32, number))
    made.set("llama.attention.layer_norm_rms_epsilon", value(Value.FLOAT32, 1e-5))
    made.set("llama.rope.freq_base", value(Value.FLOAT32, 10000.0))
    made.set("tokenizer.ggml.model", value(Value.STRING, "gpt2"))
    made.set("tokenizer.ggml.pre", value(Value.STRING, "smollm"))
    made.set("tokenizer.ggml.tokens", array(Value.STRING, tiny.TOKENS))
    made.set("tokenizer.ggml.token_type", array(Value.INT32, [3] + [1] * (tiny.VOCAB - 1)))
    made.set("tokenizer.ggml.merges", array(Value.STRING, [" ".join(merge) for merge in tiny.MERGES]))
    made.set("tokenizer.ggml.eos_token_id", value(Value.UINT32, 0))
    for name, weights in tiny.weights("llama").items():
        for long, short in tiny.GGUF_NAMES.items():
            name = name.replace(long, short)  # noqa: PLW2901
        made.tensors.append(Info(name, list(weights.shape[::-1]), Tensor.F32, len(made.data)))
        made.data += weights.tobytes()
        made.data += bytes(-len(made.data) % ALIGNMENT)
    return made


def gguf(change: Callable[[Gguf], object]) -> Callable[[Path], Path]:
    """A maker of the tiny GGUF file after `change`."""

    def make(path: Path) -> Path:
        model = whole()
        change(model)
        path.write_bytes(model.encode())
        return path

    return make


def key(name: str, content: bytes) -> Callable[[Path], Path]:
    """A maker of the tiny GGUF file with one key changed."""
    return gguf(lambda model: model.set(name, content))


def tensor(**changes: Any) -> Callable[[Path], Path]:
    """A maker of the tiny GGUF file with one tensor's description changed."""

    def change(model: Gguf) -> None:
        for name, content in changes.items():
            setattr(model.tensor(), name, content)

    return gguf(change)


def poke(name: str, number: float) -> Callable[[Path], Path]:
    """A maker of the tiny GGUF file whose tensor `name` has one other weight."""

    def change(model: Gguf) -> None:
        struct.pack_into("<f", model.data, model.tensor(name).offset + 8, number)

    return gguf(change)


def content(raw: bytes) -> Callable[[Path], Path]:
    """A maker of a file of these bytes."""

    def make(path: Path) -> Path:
        path.write_bytes(raw)
        return path

    return make


def hugging_face(change: Callable[[Path], object] | None = None, **config: Any) -> Callable[[Path], Path]:
    """A maker of the tiny Hugging Face directory with changes of its configuration, and then by `change`."""

    def make(path: Path) -> Path:
        tiny.hugging_face(path)
        settings = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(settings))
        if change is not None:
            change(path)
        return path

    return make


def written(name: str, raw: str | bytes) -> Callable[[Path], Path]:
    """A maker of the tiny Hugging Face directory with one file written anew."""

    def change(path: Path) -> None:
        (path / name).unlink(missing_ok=True)
        (path / name).write_bytes(raw.encode() if isinstance(raw, str) else raw)

    return hugging_face(change)


def edited(name: str, change: Callable[[Any], object]) -> Callable[[Path], Path]:
    """A maker of the tiny Hugging Face directory with one JSON file edited."""

    def edit(path: Path) -> None:
        parsed = json.loads((path / name).read_text())
        change(parsed)
        (path / name).write_text(json.dumps(parsed))

    return hugging_face(edit)


def single(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], Path]:
    """A maker of the tiny Hugging Face directory with its weights in one file, after `change` of them."""

    def merge(path: Path) -> None:
        shards = sorted(path.glob("*.safetensors"))
        tensors = {name: each for shard in shards for name, each in load_file(shard).items()}
        for file in [*shards, path / "model.safetensors.index.json"]:
            file.unlink()
        change(tensors)
        save_file(tensors, path / "model.safetensors")

    return hugging_face(merge)


def header(change: Callable[[dict[str, Any]], object], length: int | None = None) -> Callable[[Path], Path]:
    """A maker of the tiny Hugging Face directory whose safetensors header has changed, or lies about its length."""

    def rewrite(path: Path) -> None:
        file = path / "model-0.safetensors"
        raw = file.read_bytes()
        size = struct.unpack_from("<Q", raw)[0]
        parsed = json.loads(raw[8 : 8 + size])
        change(parsed)
        made = json.dumps(parsed).encode()
        file.write_bytes(struct.pack("<Q", len(made) if length is None else length) + made + raw[8 + size :])

    return hugging_face(rewrite)


def only_pickle(marker: Path) -> Callable[[Path], Path]:
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
