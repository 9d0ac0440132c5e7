"""Prompt parts: untrusted text between control tokens and token ids, typed or as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from completion.v1 import completion_pb2 as pb
from google.protobuf import struct_pb2

from service.rpc.checks import JSON_TYPES, at_most, invalid, shown, unknown, wrong_type
from service.text.tokenizer import Tokenizer

_KINDS = ("text", "control", "tokens")


class Parts:
    """A prompt's parts as they were given: the kind of each, and its text, its name or its ids, not read yet."""

    def __init__(self, given: list[tuple[str, Any]]) -> None:
        self._given = given

    @property
    def text(self) -> str:
        """All texts, joined."""
        return "".join(value for kind, value in self._given if kind == "text")

    @property
    def ids(self) -> int:
        """How many ids the other parts have."""
        return sum(len(value) if kind == "tokens" else kind == "control" for kind, value in self._given)

    @property
    def begins_with_tokens(self) -> bool:
        """Whether the first part is token ids."""
        return self._given[0][0] == "tokens"

    def read(self, tokenizer: Tokenizer) -> list[str | list[int]]:
        """The texts, and the ids of the other parts. InvalidRequestError names the index of a wrong part."""
        return [_read(f"prompt[{index}]", kind, value, tokenizer) for index, (kind, value) in enumerate(self._given)]


def check_count(count: int, context_length: int) -> None:
    """Raises InvalidRequestError for more parts than the context has tokens: before anything walks them."""
    if count > context_length:
        raise at_most("prompt", "parts", count, context_length, "array_above_max_length")


def typed_parts(message: pb.PromptParts) -> Parts:
    """The parts of a message, not too many and each with exactly one field: `check_count` and the rules require it."""
    kinds = [str(part.WhichOneof("part")) for part in message.parts]
    values = zip(kinds, message.parts, strict=True)
    return Parts([(kind, part.tokens.ids if kind == "tokens" else getattr(part, kind)) for kind, part in values])


def json_parts(values: Sequence[struct_pb2.Value], context_length: int) -> Parts:
    """The parts of a JSON array of objects. Raises InvalidRequestError, with a part's index, for what is no part."""
    check_count(len(values), context_length)
    return Parts([_given(f"prompt[{index}]", value.struct_value) for index, value in enumerate(values)])


def _given(name: str, part: struct_pb2.Struct) -> tuple[str, Any]:
    """The one field that a part has, and its value."""
    fields = {kind: value for kind, value in part.fields.items() if value.WhichOneof("kind") != "null_value"}
    for kind, value in fields.items():
        if kind not in _KINDS:
            raise unknown([f"{name}.{shown(kind)}"])
        if value.WhichOneof("kind") != ("list_value" if kind == "tokens" else "string_value"):
            expected = "an array of token ids" if kind == "tokens" else "a string"
            raise wrong_type(f"{name}.{kind}", expected, JSON_TYPES[value.WhichOneof("kind")])
    if len(fields) != 1:
        raise invalid(name, f"exactly one of {', '.join(_KINDS)} is required.", "invalid_value")
    ((kind, value),) = fields.items()
    return kind, value.list_value.values if kind == "tokens" else value.string_value


def _read(name: str, kind: str, value: Any, tokenizer: Tokenizer) -> str | list[int]:
    if kind == "text":
        text: str = value
        return text
    if kind == "tokens":
        return read_ids(f"{name}.tokens", value, tokenizer)
    control = tokenizer.control_token(value)
    if control is None:
        problem = f"'{shown(value)}' is not the name of a control token of this model."
        raise invalid(f"{name}.control", problem, "invalid_value")
    return [control]


def read_ids(name: str, given: Sequence[Any], tokenizer: Tokenizer) -> list[int]:
    """Token ids, given as numbers or as JSON. Raises InvalidRequestError if there is none, or one is none."""
    if not given:
        raise invalid(name, "must not be empty.", "empty_array")
    return list(_ids(name, given, tokenizer.vocab_size))


def _ids(name: str, values: Iterable[Any], vocab_size: int) -> Iterator[int]:
    for item in values:
        token = item
        if isinstance(item, struct_pb2.Value):
            json_type = item.WhichOneof("kind")
            if json_type != "number_value" or not item.number_value.is_integer():
                given = "a decimal number" if json_type == "number_value" else JSON_TYPES[json_type]
                raise wrong_type(name, "an integer as token id", given)
            token = int(item.number_value)
        if not 0 <= token < vocab_size:
            problem = f"Token id {shown(str(token))} is out of vocabulary (0..{vocab_size - 1})."
            raise invalid(name, problem, "invalid_value")
        yield token
