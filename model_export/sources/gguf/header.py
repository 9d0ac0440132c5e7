"""Reads the header of a GGUF file: its keys, and where each tensor lies. Nothing is believed before it is checked."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, dequantize

from model_export.errors import ExportError
from model_export.sources.bounds import shown
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.weights import Bytes

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
# The fewest bytes of a key with its value, and of a tensor's description.
LEAST_ENTRY, LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# A Python object is made of each text among them.
MOST_ELEMENTS = 1 << 22
MOST_NAME = 1024
MOST_DIMENSIONS = 4
LOOKS_LIKE = {
    b"FUGG": "a big-endian GGUF file",
    b"PK\x03\x04": "a zip archive, perhaps a pickle, which may run any code when it is read",
    b"\x80": "a pickle, which may run any code when it is read",
    b"ggml": "a file from before GGUF",
    b"ggjt": "a file from before GGUF",
}


@dataclass(frozen=True)
class Tensor:
    """A tensor, its slowest dimension first, and its bytes [..., bytes of a row], which stay on disk until used."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Bytes


@dataclass(frozen=True)
class Header:
    """What a file of `size` bytes says of itself."""

    path: Path
    size: int
    metadata: Metadata
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Place:
    """A tensor whose bytes are `begin`..`end` of the data behind the header."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Header:
    """The header of the file at `path`, which stays mapped: it is opened this once, for its tensors as well.

    Raises ExportError unless it is a whole GGUF file whose parts all lie in it.
    """
    if path.stat().st_size == 0:
        raise ExportError(f"{path} is not a complete GGUF file: it is empty")
    with path.open("rb") as file:
        return _Parser(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).header()


class _Parser:
    """Goes through the file from its beginning; whatever it reads it has found to lie in the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        self._magic()
        tensors, entries = self._number("<Q", "its number of tensors"), self._number("<Q", "its number of keys")
        self._room(entries, LEAST_ENTRY, "keys")
        values: dict[str, Any] = {}
        elements = 0
        for _ in range(entries):
            key = self._text("a key", MOST_NAME)
            if key in values:
                raise self._wrong(f"the key {key!r} stands there twice")
            values[key] = self._value(key)
            elements += len(values[key]) if isinstance(values[key], list | np.ndarray) else 1
            if elements > MOST_ELEMENTS:
                raise self._wrong(f"its keys hold {elements} values and more, expected at most {MOST_ELEMENTS}")
        found = self._tensors(tensors, values.get("general.alignment", 32))
        return Header(self._path, len(self._data), Metadata(values), found)

    def _magic(self) -> None:
        head = self._data[:4]
        if head != MAGIC:
            found = next((what for start, what in LOOKS_LIKE.items() if head.startswith(start)), None)
            if self._data[8:9] == b"{":
                found = "a safetensors file, whose directory is the source"
            raise self._wrong(f"it begins with {head!r}, not {MAGIC!r}{f'; it looks like {found}' if found else ''}")
        self._at = 4
        version = self._number("<I", "its version")
        if version not in VERSIONS:
            big = version & 0xFFFF == 0
            what = "it is big-endian, expected little-endian" if big else f"its version is {version}, expected 2 or 3"
            raise self._wrong(what)

    def _value(self, key: str) -> Any:
        kind = self._kind(key)
        if kind == GGUFValueType.STRING:
            return self._text(key)
        if kind != GGUFValueType.ARRAY:
            return self._number(SCALARS[kind], key)
        kind, count = self._kind(key), self._number("<Q", f"the length of {key}")
        if kind == GGUFValueType.ARRAY:
            raise self._wrong(f"{key} is an array of arrays, which is not supported")
        if count > MOST_ELEMENTS:
            raise self._wrong(f"{key} has {count} elements, expected at most {MOST_ELEMENTS}")
        if kind == GGUFValueType.STRING:
            self._room(count, 8, f"elements of {key}")
            return self._texts(key, count)
        size = struct.calcsize(SCALARS[kind])
        begin = self._take(count * size, key)
        return np.frombuffer(self._data[begin : self._at], SCALARS[kind])

    def _texts(self, key: str, count: int) -> list[str]:
        """An array of texts; there are hundreds of thousands, so nothing is done for each but what it needs."""
        texts, data, length = [], self._data, struct.Struct("<Q").unpack_from
        for index in range(count):
            at = self._at + 8
            try:
                (size,) = length(data, self._at)
                if size > min(MOST_NAME, len(data) - at):
                    raise ValueError
                texts.append(data[at : at + size].decode())
            except (struct.error, ValueError):
                self._text(f"element {index} of {key}", MOST_NAME)  # which says what is wrong
                raise
            self._at = at + size
        return texts

    def _kind(self, key: str) -> GGUFValueType:
        number = self._number("<I", f"the type of {key}")
        if number not in SCALARS and number not in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            raise self._wrong(f"{key} is of the unknown type {number}")
        return GGUFValueType(number)

    def _tensors(self, count: int, alignment: object) -> tuple[Tensor, ...]:
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._wrong(f"general.alignment is {shown(alignment)}, expected a power of two up to {1 << 20}")
        self._room(count, LEAST_TENSOR, "tensors")
        places: dict[str, _Place] = {}
        for _ in range(count):
            place = self._place(alignment)
            if place.name in places:
                raise self._wrong(f"it has two tensors {place.name!r}")
            places[place.name] = place
        data = self._at + -self._at % alignment
        self._check_places(list(places.values()), data)
        mapped = np.frombuffer(self._data, np.uint8)[data:]
        return tuple(_tensor(place, mapped) for place in places.values())

    def _place(self, alignment: int) -> _Place:
        """The next tensor's description."""
        name = self._text("a tensor's name", MOST_NAME)
        dimensions = self._number("<I", f"the dimensions of tensor {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise self._wrong(f"tensor {name} has {dimensions} dimensions, expected 1..{MOST_DIMENSIONS}")
        sides = [self._number("<Q", f"the shape of tensor {name}") for _ in range(dimensions)]
        if min(sides) < 1:
            raise self._wrong(f"tensor {name} has shape {sides}, expected no side below 1")
        number = self._number("<I", f"the type of tensor {name}")
        if number not in READABLE:
            raise self._wrong(f"tensor {name} is of type {_type_name(number)}, which is not supported")
        kind = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[kind]
        if sides[0] % block:
            raise self._wrong(f"tensor {name} has rows of {sides[0]} weights, expected a multiple of {block}")
        if dimensions == 1 and block > 1:
            raise self._wrong(f"tensor {name} of one dimension is of type {kind.name}, expected F32, F16 or BF16")
        begin = self._number("<Q", f"the offset of tensor {name}")
        if begin % alignment:
            raise self._wrong(f"tensor {name} begins at {begin}, expected a multiple of {alignment}")
        return _Place(name, kind, tuple(reversed(sides)), begin, begin + prod(sides) // block * size)

    def _check_places(self, tensors: list[_Place], data: int) -> None:
        """Raises ExportError unless all lie between the byte `data` and the end, none over another."""
        room = len(self._data) - data
        previous = _Place("", GGMLQuantizationType.F32, (), 0, 0)
        for tensor in sorted(tensors, key=lambda each: each.begin):
            if tensor.end > room:
                lies = f"tensor {tensor.name} lies at bytes {tensor.begin}..{tensor.end} of {max(room, 0)}"
                raise self._wrong(f"{lies} that the file has for tensors")
            if tensor.begin < previous.end:
                raise self._wrong(f"tensors {previous.name} and {tensor.name} overlap")
            previous = tensor

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number("<Q", f"the length of {what}")
        if longest is not None and length > longest:
            raise self._wrong(f"{what} has {length} bytes, expected at most {longest}")
        begin = self._take(length, what)
        try:
            return self._data[begin : self._at].decode()
        except UnicodeDecodeError:
            raise self._wrong(f"{what} is not UTF-8") from None

    def _number(self, form: str, what: str) -> Any:
        begin = self._take(struct.calcsize(form), what)
        return struct.unpack_from(form, self._data, begin)[0]

    def _room(self, count: int, size: int, what: str) -> None:
        left = len(self._data) - self._at
        if count * size > left:
            raise self._wrong(f"it claims {count} {what}, for which {left} bytes are too few")

    def _take(self, size: int, what: str) -> int:
        """Where `what` begins, which takes the next `size` bytes."""
        begin, left = self._at, len(self._data) - self._at
        if size > left:
            raise self._wrong(f"{what} takes {size} bytes at byte {begin}, of which the file has {left}")
        self._at += size
        return begin

    def _wrong(self, why: str) -> ExportError:
        return ExportError(f"{self._path} is not a complete GGUF file: {why}")


def _tensor(place: _Place, data: Bytes) -> Tensor:
    return Tensor(place.name, place.kind, place.shape, data[place.begin : place.end].reshape(*place.shape[:-1], -1))


def _readable() -> set[int]:
    """The types of tensors that the gguf library can turn into numbers."""
    found = set()
    for kind, (_, size) in GGML_QUANT_SIZES.items():
        try:
            dequantize(np.zeros((1, size), np.uint8), kind)
        except NotImplementedError:
            continue
        found.add(int(kind))
    return found


def _type_name(number: int) -> str:
    try:
        return GGMLQuantizationType(number).name
    except ValueError:
        return str(number)


READABLE = _readable()
