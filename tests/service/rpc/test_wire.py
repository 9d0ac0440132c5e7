"""Messages weighed before they are parsed."""

from __future__ import annotations

from contextlib import suppress

import pytest
from completion.v1 import completion_pb2 as pb
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from service.errors import InvalidRequestError
from service.rpc import wire


def listed(count):
    values = struct_pb2.ListValue(values=[struct_pb2.Value(number_value=1)] * count)
    return pb.CreateCompletionRequest(json_prompt=struct_pb2.Value(list_value=values))


@pytest.mark.parametrize(
    "message",
    [
        listed(70_000),
        pb.CreateCompletionRequest(tokens=pb.Tokens(ids=range(200_000))),
        pb.CreateCompletionRequest(texts=pb.TextBatch(texts=["a" * 1000] * 100)),
        pb.CreateCompletionRequest(text="a" * 100_000, logit_bias={"1": 2.0}, stop=["a"], seed=-1, temperature=0.5),
    ],
    ids=["numbers", "ids", "texts", "all kinds"],
)
def test_what_is_within_the_bound(message):
    """A large message is the same as a small one."""
    data = message.SerializeToString()
    assert len(data) > wire.LARGE
    assert wire.parse(pb.CreateCompletionRequest.FromString, data) == (message, ())


@pytest.mark.parametrize(
    "message",
    [
        listed(700_000),
        pb.CreateCompletionRequest(token_batch=pb.TokenBatch(prompts=[pb.Tokens()] * 1_600_000)),
        pb.CreateCompletionRequest(stop=[""] * 1_600_000),
    ],
    ids=["numbers", "messages", "texts"],
)
def test_too_many_parts(message):
    """However small each is; the most that JSON of 2 MiB can have is allowed."""
    data = message.SerializeToString()
    if message.HasField("json_prompt"):
        assert wire.parse(pb.CreateCompletionRequest.FromString, data) == (message, ())
        data = listed(1_100_000).SerializeToString()
    with pytest.raises(InvalidRequestError, match="more than 3145728 parts"):
        wire.parse(pb.CreateCompletionRequest.FromString, data)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message(noise):
    """Any bytes are parsed, or refused with the service's own message."""
    data = noise + b"\x12\x83\x80\x04" + b"a" * (wire.LARGE + 3)
    with suppress(InvalidRequestError):
        wire.parse(pb.CreateCompletionRequest.FromString, data)


def field(number: int, content: bytes = b"") -> bytes:
    """A field on the wire that holds bytes."""
    key = number << 3 | 2
    return bytes([key & 0x7F | 0x80, key >> 7]) + bytes([len(content)]) + content


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (field(999), ("999",)),
        (field(999) * 3 + field(998), ("999", "998")),
        (b"\x6a" + bytes([len(field(99))]) + field(99), ("stream_options.99",)),
        (b"\x32\x03" + field(77), ("json_prompt.77",)),
        (b"\x2a\x05\x0a\x03" + field(50), ("token_batch.prompts.50",)),
        (field(999, b"a" * 90) + b"\x12\x83\x80\x04" + b"a" * (wire.LARGE + 3), ("999",)),
    ],
    ids=["one", "two", "nested", "in JSON", "in a list", "in a large message"],
)
def test_fields_that_the_contract_lacks(data, names):
    """They are named with their path, wherever they are, and the message loses them."""
    message, unknown = wire.parse(pb.CreateCompletionRequest.FromString, data)
    assert unknown == names
    assert wire.parse(pb.CreateCompletionRequest.FromString, message.SerializeToString()) == (message, ())
    with pytest.raises(InvalidRequestError, match=f"supplied: {', '.join(names)}. This") as caught:
        wire.refuse_unknown(unknown)
    assert (caught.value.param, caught.value.code) == (names[0], "unknown_parameter")


def test_a_refusal_names_few_of_many():
    """However many there are."""
    with pytest.raises(InvalidRequestError, match="0, 1, 2, 3, 4, 5, 6, 7 and 92 more"):
        wire.refuse_unknown(tuple(map(str, range(100))))
    wire.refuse_unknown(())
