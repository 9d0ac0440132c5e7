"""The format of GGUF files, and makers of damaged ones, each from a tiny whole one."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType as Tensor
from gguf import GGUFValueType as Value

from tests.model_export import tiny

# Makes a source at a path, and returns the path to read.
Maker = Callable[[Path], Path]

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
    """A string in GGUF's encoding, or one with a false length."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def value(kind: Value, content: Any) -> bytes:
    """A typed value."""
    body = text(content) if kind == Value.STRING else struct.pack(FORMS[kind], content)
    return struct.pack("<I", kind) + body


def array(kind: Value, items: list[Any], count: int | None = None) -> bytes:
    """A typed array, or one with a false length."""
    body = b"".join(text(each) if kind == Value.STRING else struct.pack(FORMS[kind], each) for each in items)
    return struct.pack("<IIQ", Value.ARRAY, kind, len(items) if count is None else count) + body


@dataclass
class Info:
    """A tensor's description in the file."""

    name: str | bytes
    shape: list[int]
    kind: int
    offset: int
    dimensions: int | None = None

    def encode(self) -> bytes:
        """The bytes of the description; `dimensions` may be false."""
        count = len(self.shape) if self.dimensions is None else self.dimensions
        sides = struct.pack(f"<{len(self.shape)}Q", *self.shape)
        return text(self.name) + struct.pack("<I", count) + sides + struct.pack("<IQ", self.kind, self.offset)


@dataclass
class Gguf:
    """A tiny GGUF model in float32, valid until a test changes something."""

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
    """The tiny model without a fault."""
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


def gguf(change: Callable[[Gguf], object]) -> Maker:
    """A maker of the tiny GGUF file after `change`."""

    def make(path: Path) -> Path:
        model = whole()
        change(model)
        path.write_bytes(model.encode())
        return path

    return make


def attributes(changes: Mapping[str, Any]) -> Maker:
    """A maker of the tiny GGUF file with other attributes of Gguf."""

    def change(model: Gguf) -> None:
        for name, content in changes.items():
            setattr(model, name, content)

    return gguf(change)


def keys(changes: Mapping[str, bytes | None]) -> Maker:
    """A maker of the tiny GGUF file with other values of keys; None removes a key."""

    def change(model: Gguf) -> None:
        for name, content in changes.items():
            model.drop(name) if content is None else model.set(name, content)

    return gguf(change)


def added_key(name: str | bytes, content: bytes) -> Maker:
    """A maker of the tiny GGUF file with one key more."""
    return gguf(lambda model: model.keys.append((name, content)))


def tensor(changes: Mapping[str, Any]) -> Maker:
    """A maker of the tiny GGUF file with one tensor's description changed."""

    def change(model: Gguf) -> None:
        for name, content in changes.items():
            setattr(model.tensor(), name, content)

    return gguf(change)


def added_tensor(name: str, shape: list[int], raw: bytes) -> Maker:
    """A maker of the tiny GGUF file with one tensor more, in float32."""

    def change(model: Gguf) -> None:
        model.tensors.append(Info(name, shape, int(Tensor.F32), len(model.data)))
        model.data += raw

    return gguf(change)


def poke(name: str, number: float) -> Maker:
    """A maker of the tiny GGUF file whose tensor `name` has one other weight."""

    def change(model: Gguf) -> None:
        struct.pack_into("<f", model.data, model.tensor(name).offset + 8, number)

    return gguf(change)
