"""Finds the files that an ONNX graph takes tensors from, by reading the graph's protobuf."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from service.errors import ModelDirectoryError

# The depth at which protobuf itself stops.
_MAX_DEPTH = 100

# The fields of each message that can contain a tensor at any depth: field number -> message, or entry (onnx.proto).
_FIELDS = {
    "Model": {7: "Graph", 25: "Function"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
    "Entry": {1: "key", 2: "value"},
}


def check(graph: Path, listed: Collection[str], where: str) -> None:
    """Raises ModelDirectoryError when `graph` takes tensors from a file that is not `listed`, in the file `where`."""
    try:
        outside = locations(graph.read_bytes()) - set(listed)
    except ValueError as error:
        raise ModelDirectoryError(f"{graph} is not an ONNX graph: {error}") from None
    if outside:
        message = f"{graph} takes tensors from {min(outside)!r}, which {where} does not list"
        raise ModelDirectoryError(f"{message}; refusing to load it")


def locations(model: bytes) -> set[str]:
    """The `location` of every tensor stored outside the graph. Raises ValueError when `model` is not an ONNX graph."""
    return set(_locations(memoryview(model), "Model", 0))


def _locations(data: memoryview, message: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError(f"messages are nested deeper than {_MAX_DEPTH}")
    entry: dict[str, str] = {}
    for number, value in _fields(data):
        content = _FIELDS[message].get(number)
        if content is None:
            continue
        if message == "Entry":
            entry[content] = bytes(value).decode()
        else:
            yield from _locations(value, content, depth + 1)
    if entry.get("key") == "location":
        yield entry.get("value", "")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message that hold bytes; the others are skipped."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        match tag & 7:
            case 0:
                length, at = 0, varint(data, at)[1]
            case 1:
                length = 8
            case 5:
                length = 4
            case 2:
                length, at = varint(data, at)
            case wire_type:
                raise ValueError(f"wire type {wire_type} at byte {at}")
        if at + length > len(data):
            raise ValueError(f"a field of {length} bytes at byte {at} goes beyond the end")
        if tag & 7 == 2:
            yield tag >> 3, data[at : at + length]
        at += length


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The number at `at`, of at most 10 bytes, and the position after it. Raises ValueError if it does not end."""
    value = shift = 0
    while at < len(data) and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"a number without end at byte {at}")
