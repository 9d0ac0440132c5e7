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
    assert wire.parse(pb.CreateCompletionRequest.FromString, data) == message


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
        assert wire.parse(pb.CreateCompletionRequest.FromString, data) == message
        data = listed(1_100_000).SerializeToString()
    with pytest.raises(InvalidRequestError, match="more than 3145728 parts"):
        wire.parse(pb.CreateCompletionRequest.FromString, data)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_message(noise):
    """Any bytes are parsed, or refused with the service's own message."""
    data = noise + b"\x12\x83\x80\x04" + b"a" * (wire.LARGE + 3)
    with suppress(InvalidRequestError):
        wire.parse(pb.CreateCompletionRequest.FromString, data)
