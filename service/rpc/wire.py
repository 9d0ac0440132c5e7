"""Parses request messages, after counting the parts of large ones.

The parser holds the interpreter's lock until it is done, and its time grows with the number of parts: half a second for
16 MB of empty ones. Counting takes longer for each part, but lets other threads run, and it stops at the limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from service.errors import InvalidRequestError
from service.external_data import varint
from service.rpc.checks import unknown

# In bytes. Smaller messages are parsed on the event loop, without counting.
LARGE = 64 << 10
# Parts are fields; a field that holds a text or a message counts twice. JSON of 2 MiB, the limit of the REST API, has
# up to 3 million parts, if its numbers have one digit.
_MAX_PARTS = 3 << 20

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
# The size of a message that holds one 64-bit number: by far the most frequent in long messages.
_NUMBER = 9


def parse(deserialize: Any, data: bytes) -> tuple[Any, tuple[str, ...]]:
    """The message, and the numbers of its fields that the contract does not have, as paths.

    Raises InvalidRequestError if it has too many parts or is not of the method's type.
    """
    try:
        if len(data) > LARGE:
            _weigh(data, deserialize.__self__.DESCRIPTOR)
        message = deserialize(data)
        return message, _unknown(message, deserialize, data)
    except InvalidRequestError:
        raise
    except Exception:
        raise InvalidRequestError("The request is not a valid protobuf message of the method's type.") from None


def refuse_unknown(fields: tuple[str, ...]) -> None:
    """Raises InvalidRequestError if there are fields that the contract does not have."""
    if fields:
        raise unknown(fields, ". This service's contract has no such field numbers.")


def _unknown(message: Message, deserialize: Any, data: bytes) -> tuple[str, ...]:
    """The paths of the message's unknown fields, which it loses."""
    size = message.ByteSize()
    message.DiscardUnknownFields()
    return () if message.ByteSize() == size else tuple(dict.fromkeys(_paths(deserialize(data), "")))


def _paths(message: Message, prefix: str) -> Iterator[str]:
    for field_of_others in UnknownFieldSet(message):  # type: ignore[attr-defined]  # the stubs lack its iterator
        yield f"{prefix}{field_of_others.field_number}"
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        values = value if field.is_repeated else [value]
        if field.message_type.GetOptions().map_entry:
            values = [each for each in value.values() if isinstance(each, Message)]
        for each in values:
            yield from _paths(each, f"{prefix}{field.name}.")


def _weigh(data: bytes, descriptor: Descriptor) -> None:
    """Raises InvalidRequestError if a message has too many fields at all depths, ValueError if a number does not end.

    The parser checks the form of the rest.
    """
    parts, size = 0, len(data)
    within: list[tuple[int, int, Descriptor]] = [(0, size, descriptor)]
    known: dict[Descriptor, dict[int, Descriptor]] = {}
    while within:
        at, end, message = within.pop()
        inner = known.get(message) or known.setdefault(message, _messages(message))
        while at < end:
            tag, at = (data[at], at + 1) if data[at] < 0x80 else varint(data, at)
            wire_type = tag & 7
            if wire_type == _DELIMITED:
                parts += 2
                length, at = (data[at], at + 1) if at < size and data[at] < 0x80 else varint(data, at)
                if length == _NUMBER and at < size and data[at] & 7 == _FIXED64:
                    parts += 1  # the message holds nothing else
                elif length and tag >> 3 in inner:
                    within.append((at, min(end, at + length), inner[tag >> 3]))
                at += length
            elif wire_type == _VARINT:
                parts += 1
                at = at + 1 if at < size and data[at] < 0x80 else varint(data, at)[1]
            elif wire_type in {_FIXED64, _FIXED32}:
                parts += 1
                at += 8 if wire_type == _FIXED64 else 4
            else:
                return
            if parts > _MAX_PARTS:
                raise InvalidRequestError(f"The request has more than {_MAX_PARTS} parts.")


def _messages(descriptor: Descriptor) -> dict[int, Descriptor]:
    """The types of a message's fields that are messages, by field number."""
    return {field.number: field.message_type for field in descriptor.fields if field.message_type is not None}
