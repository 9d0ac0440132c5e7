"""Tokenizing: text to tokens as completions read it, tokens to text, and what a tokenizer is. Pure."""

from __future__ import annotations

from completion.v1 import completion_pb2 as pb
from google.protobuf.struct_pb2 import NULL_VALUE

from service.manifest import Manifest
from service.rpc import bounds
from service.rpc.checks import JSON_TYPES, at_most, invalid, missing, wrong_type
from service.rpc.parse import Limits
from service.rpc.parts import Parts, check_count, json_parts, read_ids, typed_parts
from service.rpc.prompts import MAX_CHARACTERS_PER_TOKEN, Reading, check_characters
from service.text.tokenizer import Tokenizer
from service.text.transcript import Transcript

# A character has up to 4 bytes, each of which can be a token.
_MAX_IDS_PER_TOKEN = 4 * MAX_CHARACTERS_PER_TOKEN
# The class of transformers that loads a tokenizer.json.
_CLASS = "PreTrainedTokenizerFast"


def tokenize(request: pb.TokenizeRequest, tokenizer: Tokenizer, limits: Limits) -> pb.TokenizeResponse:
    """The tokens of a prompt, also of one that is longer than the context. Raises InvalidRequestError."""
    check_count(len(request.parts.parts), limits.context_length)
    bounds.check(request)
    prompt = _prompt(request, limits.context_length)
    reading = Reading.of(request, limits.parse_special)
    if isinstance(prompt, Parts):
        check_characters("prompt", prompt.text, limits.context_length)
        _check_ids("prompt", prompt.ids, limits.context_length)
        add_special = reading.add_special and not prompt.begins_with_tokens
        ids, implied = tokenizer.tokens(prompt.read(tokenizer), parse_special=False, add_special=add_special)
    else:
        check_characters("prompt", prompt, limits.context_length)
        ids, implied = tokenizer.tokens([prompt], parse_special=reading.parse_special, add_special=reading.add_special)
    answer = pb.TokenizeResponse(count=len(ids), max_model_len=limits.context_length, tokens=ids)
    if request.return_token_strs:
        _add_texts(answer, tokenizer, implied)
    else:
        answer.no_token_strs = NULL_VALUE
    return answer


def _prompt(request: pb.TokenizeRequest, context_length: int) -> str | Parts:
    typed, value = request.WhichOneof("prompt"), request.json_prompt
    json_type = value.WhichOneof("kind")
    json_set = json_type not in {None, "null_value"}
    if typed and json_set:
        raise invalid("prompt", "set either a typed prompt or json_prompt, not both.")
    if typed == "text":
        return request.text
    if typed == "parts":
        return typed_parts(request.parts)
    if not json_set:
        raise missing("prompt")
    if json_type == "string_value":
        return value.string_value
    items = value.list_value.values
    if json_type == "list_value" and not items:
        raise invalid("prompt", "must not be empty.", "empty_array")
    if {item.WhichOneof("kind") for item in items[: context_length + 1]} != {"struct_value"}:
        given = "an array of other values" if json_type == "list_value" else JSON_TYPES[json_type]
        raise wrong_type("prompt", "a string or an array of parts", given)
    return json_parts(items, context_length)


def _add_texts(answer: pb.TokenizeResponse, tokenizer: Tokenizer, implied: int) -> None:
    """Adds the texts and the offsets of an answer's tokens, the first `implied` of which have no text."""
    answer.token_strs.SetInParent()  # even without a token
    transcript = Transcript()
    pieces = [transcript.push(token) for token in tokenizer.text_bytes(answer.tokens, implied)]
    for piece in (*pieces, transcript.finish()):
        for text, offset in piece.tokens:
            answer.token_strs.values.add(text=text)
            answer.offsets.append(offset)


def detokenize(request: pb.DetokenizeRequest, tokenizer: Tokenizer, limits: Limits) -> pb.DetokenizeResponse:
    """The text of token ids. Raises InvalidRequestError."""
    _check_ids("tokens", len(request.tokens), limits.context_length)
    bounds.check(request)
    prompt = tokenizer.prompt_of_tokens(read_ids("tokens", request.tokens, tokenizer) if request.tokens else ())
    return pb.DetokenizeResponse(prompt=prompt.text + prompt.tail.decode("utf-8", "replace"))


def _check_ids(name: str, count: int, context_length: int) -> None:
    """Raises InvalidRequestError for more ids than the longest text has that may be tokenized."""
    limit = _MAX_IDS_PER_TOKEN * context_length
    if count > limit:
        raise at_most(name, "token ids", count, limit, "array_above_max_length")


def describe(
    manifest: Manifest, tokenizer: Tokenizer, limits: Limits, chat_template: str | None
) -> pb.GetTokenizerResponse:
    """What a model's tokenizer is."""
    special = manifest.special_tokens
    eos = special.eos if special.eos is not None else next(iter(special.end), None)
    answer = pb.GetTokenizerResponse(
        tokenizer_class=_CLASS,
        add_bos_token=special.bos is not None and special.add_bos,
        vocab_size=tokenizer.vocab_size,
        max_model_len=limits.context_length,
        control_tokens=[
            pb.ControlToken(id=index, name=name) for index, name in sorted(tokenizer.control_tokens.items())
        ],
    )
    texts = {
        "bos_token": None if special.bos is None else tokenizer.token_text(special.bos),
        "eos_token": None if eos is None else tokenizer.token_text(eos),
        "chat_template": chat_template,
    }
    for name, text in texts.items():
        if text is None:
            setattr(answer, f"no_{name}", NULL_VALUE)
        else:
            setattr(answer, name, text)
    return answer
