"""Request messages as bytes: counts the parts of one before it is parsed.

Parsing holds the interpreter's lock to its end, and takes as long as the message has parts: 16 MB of empty ones half a
second. This walk takes longer for each part, but lets others go on, and ends where there are too many.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import Descriptor

from service.errors import InvalidRequestError

# Messages up to this size are parsed as they are, on the event loop.
LARGE = 64 << 10
# Parts are fields; one that holds a text or a message counts twice. JSON of 2 MiB, the most that REST callers may send,
# has up to 3 million: with numbers of one digit.
_MAX_PARTS = 3 << 20

_VARINT, _FIXED64, _DELIMITED, _FIXED32 = 0, 1, 2, 5
# The bytes of a message that holds a number of 64 bits: by far the commonest in long ones.
_NUMBER = 9


def parse(deserialize: Any, data: bytes) -> Any:
    """The message. Raises InvalidRequestError for one that has too many parts, or is none of the method's type."""
    if len(data) > LARGE:
        _weigh(data, deserialize.__self__.DESCRIPTOR)
    try:
        return deserialize(data)
    except Exception:
        raise InvalidRequestError("The request is not a valid protobuf message of the method's type.") from None


def _weigh(data: bytes, descriptor: Descriptor) -> None:
    """Counts a message's fields at all depths; what is not well-formed is left to the parser."""
    parts, size = 0, len(data)
    within: list[tuple[int, int, Descriptor]] = [(0, size, descriptor)]
    known: dict[Descriptor, dict[int, Descriptor]] = {}
    while within:
        at, end, message = within.pop()
        inner = known.get(message) or known.setdefault(message, _messages(message))
        while at < end:
            tag, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
            kind = tag & 7
            if kind == _DELIMITED:
                parts += 2
                length, at = (data[at], at + 1) if at < size and data[at] < 0x80 else _varint(data, at)
                if length == _NUMBER and at < size and data[at] & 7 == _FIXED64:
                    parts += 1  # nothing else is in it
                elif length and tag >> 3 in inner:
                    within.append((at, min(end, at + length), inner[tag >> 3]))
                at += length
            elif kind == _VARINT:
                parts += 1
                at = at + 1 if at < size and data[at] < 0x80 else _varint(data, at)[1]
            elif kind in {_FIXED64, _FIXED32}:
                parts += 1
                at += 8 if kind == _FIXED64 else 4
            else:
                return
            if parts > _MAX_PARTS:
                raise InvalidRequestError(f"The request has more than {_MAX_PARTS} parts.")


def _messages(descriptor: Descriptor) -> dict[int, Descriptor]:
    """The message types of those of a message's fields that are messages, by number."""
    return {field.number: field.message_type for field in descriptor.fields if field.message_type is not None}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number and what follows it; past the end of the data all is zero."""
    value = shift = 0
    while at < len(data):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            break
        shift += 7
    return value, at
