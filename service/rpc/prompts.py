"""Reads the prompts of a request, typed or JSON, and checks that they fit the model."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from typing import Any, TypeVar

from completion.v1 import completion_pb2 as pb
from google.protobuf import struct_pb2

from service.errors import InvalidRequestError
from service.rpc.bounds import rules
from service.rpc.checks import JSON_TYPES, at_most, invalid, wrong_type
from service.rpc.parts import Parts, json_parts, read_ids, typed_parts
from service.text.tokenizer import Tokenizer
from service.types import Prompt

# JSON prompts have the same bounds as typed ones.
MAX_PROMPTS = rules(pb.TextBatch, "texts").repeated.max_items
MAX_SEQUENCES = rules(pb.CreateCompletionRequest, "n").int32.lte
# A text with more characters per token of context than this cannot fit. It is refused before tokenizing, which takes
# seconds for megabytes without a space.
MAX_CHARACTERS_PER_TOKEN = 8

_Items = TypeVar("_Items", bound=Sized)

_FORMS = "a string, an array of strings, an array of tokens or array of token arrays"


@dataclass(frozen=True, slots=True)
class Reading:
    """How a request's texts are read: with their control tokens, and with the tokens that go before every text."""

    parse_special: bool
    add_special: bool

    @classmethod
    def of(cls, request: pb.CreateCompletionRequest | pb.TokenizeRequest, parse_special: bool) -> Reading:
        """That which a request asks for; `parse_special` is the service's setting."""
        return cls(
            request.parse_special if request.HasField("parse_special") else parse_special,
            request.add_special_tokens or not request.HasField("add_special_tokens"),
        )


def parse_prompts(
    request: pb.CreateCompletionRequest,
    tokenizer: Tokenizer,
    context_length: int,
    best_of: int,
    max_tokens: int,
    *,
    reading: Reading,
    kept: int | None = None,
) -> tuple[Prompt, ...]:
    """The request's prompts, none of them empty; `best_of` counts each of them as that many sequences.

    Of each prompt the last `kept` tokens are kept, or all. Raises InvalidRequestError, also for the first prompt that
    does not fit the context together with `max_tokens`.
    """
    typed = request.WhichOneof("prompt")
    json_set = request.HasField("json_prompt") and request.json_prompt.WhichOneof("kind") not in (None, "null_value")
    if typed and json_set:
        raise invalid("prompt", "set either a typed prompt or json_prompt, not both.")
    items: Sequence[Any] = [""]
    if typed or json_set:
        items = _typed(request, typed) if typed else _json(request.json_prompt, context_length)
    _check_prompts(len(items))
    if len(items) * best_of > MAX_SEQUENCES:
        problem = f"prompts*best_of must be <= {MAX_SEQUENCES}, but got {len(items)} prompts and {best_of} for each."
        raise invalid("n", problem, "invalid_value")
    prompts = []
    for item in items:
        if isinstance(item, str):
            check_characters("prompt", item, context_length)
            prompt = tokenizer.prompt(item, parse_special=reading.parse_special, add_special=reading.add_special)
        elif isinstance(item, Parts):
            check_characters("prompt", item.text, context_length)
            _check_ids(item.ids, max_tokens, context_length, kept)
            add_special = reading.add_special and not item.begins_with_tokens
            prompt = tokenizer.prompt_of_parts(item.read(tokenizer), add_special=add_special)
        else:
            tokens = item if kept is None else item[-kept:]  # what is cut off is not looked at
            # The ids are looked at only now, so that too many are refused unread.
            check_context(len(tokens), max_tokens, context_length)
            prompt = tokenizer.prompt_of_tokens(read_ids("prompt", tokens, tokenizer))
        if kept is not None and len(prompt.token_ids) > kept:
            prompt = tokenizer.prompt_of_tokens(prompt.token_ids[-kept:])
        check_context(len(prompt.token_ids), max_tokens, context_length)
        prompts.append(prompt)
    return tuple(prompts)


def _check_ids(count: int, max_tokens: int, context_length: int, kept: int | None) -> None:
    """Raises InvalidRequestError if the parts of a prompt have too many ids, also to be cut off."""
    limit = MAX_CHARACTERS_PER_TOKEN * context_length
    if kept is None:
        check_context(count, max_tokens, context_length)
    elif count > limit:
        raise at_most("prompt", "token ids in parts", count, limit, "array_above_max_length")


def check_context(length: int, max_tokens: int, context_length: int) -> None:
    """Raises InvalidRequestError if a prompt of `length` tokens does not fit the context with `max_tokens`."""
    if length + max_tokens > context_length:
        message = (
            f"This model's maximum context length is {context_length} tokens, however you requested "
            f"{length + max_tokens} tokens ({length} in your prompt; {max_tokens} for the completion). Please reduce "
            "your prompt; or completion length."
        )
        raise InvalidRequestError(message, param="prompt", code="context_length_exceeded")


def _typed(request: pb.CreateCompletionRequest, form: str) -> Sequence[str | Sequence[int] | Parts]:
    if form == "parts":
        return [typed_parts(request.parts)]
    if form == "text":
        return [request.text]
    if form == "tokens":
        return [request.tokens.ids]
    if form == "texts":
        return request.texts.texts
    return [prompt.ids for prompt in request.token_batch.prompts]


def _json(value: struct_pb2.Value, context_length: int) -> Sequence[str | Sequence[struct_pb2.Value] | Parts]:
    json_type = value.WhichOneof("kind")
    if json_type == "string_value":
        return [value.string_value]
    if json_type != "list_value":
        raise wrong_type("prompt", _FORMS, JSON_TYPES[json_type])
    items = _not_empty(value.list_value.values)
    # More items than these are too many of any kind, and refused by their number.
    json_types = {item.WhichOneof("kind") for item in items[: max(MAX_PROMPTS, context_length) + 1]}
    if json_types in ({"string_value"}, {"list_value"}):
        _check_prompts(len(items))
    if json_types == {"string_value"}:
        return [item.string_value for item in items]
    if json_types == {"list_value"}:
        return [item.list_value.values for item in items]
    if json_types == {"struct_value"}:
        return [json_parts(items, context_length)]
    if json_types <= {"number_value", "bool_value"}:
        return [items]
    raise wrong_type("prompt", _FORMS, "a mixture")


def check_characters(name: str, text: str, context_length: int) -> None:
    """Raises InvalidRequestError if a text has more characters than could fit the context."""
    limit = MAX_CHARACTERS_PER_TOKEN * context_length
    if len(text) > limit:
        message = (
            f"This model's maximum context length is {context_length} tokens, however your {name} has {len(text)} "
            f"characters, more than the {limit} that could fit. Please reduce your {name}."
        )
        raise InvalidRequestError(message, param=name, code="context_length_exceeded")


def _check_prompts(count: int) -> None:
    if count > MAX_PROMPTS:
        raise at_most("prompt", "prompts", count, MAX_PROMPTS, "array_above_max_length")


def _not_empty(items: _Items) -> _Items:
    if not items:
        raise invalid("prompt", "must not be empty.", "empty_array")
    return items
