"""Finding the files in which a graph's tensors are stored."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.external_data import locations


def field(number: int, data: bytes) -> bytes:
    """A field that holds bytes, as protobuf encodes it."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def tensor(location: bytes) -> bytes:
    """A TensorProto with an offset and a location, the value first."""
    offset = field(1, b"offset") + field(2, b"../not-a-location")
    return field(8, b"name") + field(13, offset) + field(13, field(2, location) + field(1, b"location"))


@pytest.mark.parametrize(
    "model",
    [
        field(7, field(5, tensor(b"../x"))),
        field(7, field(15, field(1, tensor(b"../x")))),
        field(7, field(15, field(2, tensor(b"../x")))),
        field(7, field(1, field(5, field(5, tensor(b"../x"))))),
        field(7, field(1, field(5, field(10, tensor(b"../x"))))),
        field(7, field(1, field(5, field(6, field(5, tensor(b"../x")))))),
        field(7, field(1, field(5, field(11, field(1, field(5, field(5, tensor(b"../x")))))))),
        field(7, field(1, field(5, field(22, field(1, tensor(b"../x")))))),
        field(25, field(7, field(5, field(5, tensor(b"../x"))))),
    ],
)
def test_wherever_a_tensor_can_be(model):
    """A tensor is found in initializers, sparse ones, attributes, nested graphs, and functions."""
    assert locations(model) == {"../x"}


def test_other_fields_are_skipped():
    """Number fields of every wire type between the tensors do not matter."""
    numbers = varint(1 << 3) + varint(300) + varint(2 << 3 | 1) + bytes(8) + varint(3 << 3 | 5) + bytes(4)
    graph = numbers + field(5, tensor(b"a")) + numbers + field(5, tensor(b"b")) + field(2, b"name")
    assert locations(numbers + field(7, graph)) == {"a", "b"}


@given(st.binary(max_size=60))
def test_arbitrary_bytes(data):
    """Arbitrary bytes give locations or ValueError."""
    for model in (data, field(7, data), field(7, field(5, data))):
        with suppress(ValueError):
            assert all(isinstance(location, str) for location in locations(model))
