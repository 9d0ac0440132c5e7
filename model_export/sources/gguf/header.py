"""Reads the header of a GGUF file: its keys, and the place of each tensor. It is checked before it is used."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated
from model_export.sources.files import looks_like
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
# The types of tensors that the gguf library can dequantize.
READABLE = {
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    )
}
NAMES = ", ".join(kind.name for kind in sorted(READABLE, key=int))
# The fewest bytes of a key with its value, and of a tensor's description.
SMALLEST_ENTRY, SMALLEST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
# The most elements of all keys together, each of which may become a Python object.
MOST_ELEMENTS = 1 << 22
MOST_NAME = 1024
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Tensor:
    """A tensor. `shape` has the slowest dimension first; `data` [..., bytes of a row] stays on disk until used.

    `data` is a part of the `mapping` of its file.
    """

    name: str
    dtype: GGMLQuantizationType
    shape: tuple[int, ...]
    data: Bytes
    mapping: mmap.mmap

    def give_back(self) -> None:
        """Takes the file's pages out of this process's memory; those that are used again are read again."""
        self.mapping.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True)
class Header:
    """The header of the file at `path`, which has `size` bytes."""

    path: Path
    size: int
    metadata: Metadata
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Place:
    """A tensor at the bytes `begin`..`end` of the data that follows the header."""

    name: str
    dtype: GGMLQuantizationType
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> Header:
    """The header of the file at `path`. The file is opened once and stays mapped for its tensors.

    Raises ExportError unless it is a complete GGUF file that contains all its tensors.
    """
    if path.stat().st_size == 0:
        raise ExportError(f"{path} is not a complete GGUF file: it is empty")
    with path.open("rb") as file:
        return _Parser(path, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)).header()


class _Parser:
    """Reads the file from its beginning, and never beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self) -> Header:
        self._magic()
        tensors, entries = self._number("<Q", "its number of tensors"), self._number("<Q", "its number of keys")
        self._check_room(entries, SMALLEST_ENTRY, "keys")
        values: dict[str, Any] = {}
        elements = 0
        for _ in range(entries):
            key = self._text("a key", MOST_NAME)
            self._ensure(key not in values, f"the key {key!r} appears twice")
            values[key] = self._value(key)
            elements += len(values[key]) if isinstance(values[key], list | np.ndarray) else 1
            self._ensure(
                elements <= MOST_ELEMENTS,
                f"its keys hold at least {elements} values, expected at most {MOST_ELEMENTS}",
            )
        alignment = values.get("general.alignment", 32)
        return Header(self._path, len(self._data), Metadata(values), self._tensors(tensors, alignment))

    def _magic(self) -> None:
        head = self._data[:4]
        if head != MAGIC:
            raise self._error(f"it begins with {head!r}, not {MAGIC!r}{looks_like(self._path)}")
        self._at = 4
        version = self._number("<I", "its version")
        self._ensure(version & 0xFFFF != 0, "it is big-endian, expected little-endian")
        self._ensure(version in VERSIONS, f"its version is {version}, expected 2 or 3")

    def _value(self, key: str) -> Any:
        value_type = self._value_type(key)
        if value_type == GGUFValueType.STRING:
            return self._text(key)
        if value_type != GGUFValueType.ARRAY:
            return self._number(SCALARS[value_type], key)
        element_type, count = self._value_type(key), self._number("<Q", f"the length of {key}")
        self._ensure(element_type != GGUFValueType.ARRAY, f"{key} is an array of arrays, which is not supported")
        self._ensure(count <= MOST_ELEMENTS, f"{key} has {count} elements, expected at most {MOST_ELEMENTS}")
        if element_type == GGUFValueType.STRING:
            self._check_room(count, 8, f"elements of {key}")
            return [self._text(f"element {index} of {key}", MOST_NAME) for index in range(count)]
        begin = self._take(count * struct.calcsize(SCALARS[element_type]), key)
        return np.frombuffer(self._data[begin : self._at], SCALARS[element_type])

    def _value_type(self, key: str) -> GGUFValueType:
        number = self._number("<I", f"the type of {key}")
        known = number in SCALARS or number in (GGUFValueType.STRING, GGUFValueType.ARRAY)
        self._ensure(known, f"{key} is of the unknown type {number}")
        return GGUFValueType(number)

    def _tensors(self, count: int, alignment: object) -> tuple[Tensor, ...]:
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {abbreviated(alignment)}, expected a power of two up to {1 << 20}")
        self._check_room(count, SMALLEST_TENSOR, "tensors")
        places: dict[str, _Place] = {}
        for _ in range(count):
            place = self._place(alignment)
            self._ensure(place.name not in places, f"it has two tensors {place.name!r}")
            places[place.name] = place
        data = self._at + -self._at % alignment
        self._check_places(list(places.values()), data)
        mapped = np.frombuffer(self._data, np.uint8)[data:]
        return tuple(
            Tensor(
                place.name,
                place.dtype,
                place.shape,
                mapped[place.begin : place.end].reshape(*place.shape[:-1], -1),
                self._data,
            )
            for place in places.values()
        )

    def _place(self, alignment: int) -> _Place:
        """The next tensor's description."""
        name = self._text("a tensor's name", MOST_NAME)
        dimensions = self._number("<I", f"the dimensions of tensor {name}")
        self._ensure(
            1 <= dimensions <= MOST_DIMENSIONS,
            f"tensor {name} has {dimensions} dimensions, expected 1..{MOST_DIMENSIONS}",
        )
        sides = [self._number("<Q", f"the shape of tensor {name}") for _ in range(dimensions)]
        self._ensure(min(sides) >= 1, f"tensor {name} has shape {sides}, expected no dimension below 1")
        number = self._number("<I", f"the type of tensor {name}")
        if number not in READABLE:
            type_name = next((known.name for known in GGMLQuantizationType if known == number), str(number))
            raise self._error(f"tensor {name} is of type {type_name}, which is not supported; supported are {NAMES}")
        dtype = GGMLQuantizationType(number)
        block, size = GGML_QUANT_SIZES[dtype]
        self._ensure(
            sides[0] % block == 0, f"tensor {name} has rows of {sides[0]} weights, expected a multiple of {block}"
        )
        self._ensure(
            dimensions > 1 or block == 1,
            f"tensor {name} of one dimension is of type {dtype.name}, expected F32, F16 or BF16",
        )
        begin = self._number("<Q", f"the offset of tensor {name}")
        self._ensure(begin % alignment == 0, f"tensor {name} begins at {begin}, expected a multiple of {alignment}")
        return _Place(name, dtype, tuple(reversed(sides)), begin, begin + prod(sides) // block * size)

    def _check_places(self, tensors: list[_Place], data: int) -> None:
        """Raises ExportError unless all tensors lie between the byte `data` and the end, and none overlap."""
        room = max(len(self._data) - data, 0)
        for tensor in tensors:
            place = f"bytes {tensor.begin}..{tensor.end} of the {room} bytes behind the header"
            self._ensure(tensor.end <= room, f"tensor {tensor.name} lies at {place}")
        for before, after in pairwise(sorted(tensors, key=lambda tensor: tensor.begin)):
            self._ensure(before.end <= after.begin, f"tensors {before.name} and {after.name} overlap")

    def _text(self, what: str, longest: int | None = None) -> str:
        length = self._number("<Q", f"the length of {what}")
        self._ensure(longest is None or length <= longest, f"{what} has {length} bytes, expected at most {longest}")
        begin = self._take(length, what)
        try:
            return self._data[begin : self._at].decode()
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8") from None

    def _number(self, form: str, what: str) -> Any:
        begin = self._take(struct.calcsize(form), what)
        return struct.unpack_from(form, self._data, begin)[0]

    def _check_room(self, count: int, size: int, what: str) -> None:
        left = len(self._data) - self._at
        self._ensure(count * size <= left, f"it claims {count} {what}, too many for the remaining {left} bytes")

    def _take(self, size: int, what: str) -> int:
        """Moves past the next `size` bytes, which hold `what`, and returns where they begin."""
        begin, left = self._at, len(self._data) - self._at
        if size > left:
            raise self._error(f"{what} takes {size} bytes at byte {begin}, the file has {left} there")
        self._at += size
        return begin

    def _ensure(self, condition: bool, problem: str) -> None:
        if not condition:
            raise self._error(problem)

    def _error(self, problem: str) -> ExportError:
        return ExportError(f"{self._path} is not a complete GGUF file: {problem}")
