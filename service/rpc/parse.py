"""From the wire's request to a valid one: all of the contract's checks, pure."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass

from completion.v1 import completion_pb2 as pb
from google.protobuf.message import Message

from service.errors import InvalidRequestError
from service.manifest import Manifest
from service.rpc.checks import at_most, decimal, integer, invalid, shortest, shown
from service.rpc.prompts import MAX_SEQUENCES, check_characters, parse_prompts
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

MAX_BEST_OF = 20
MAX_LOGPROBS = 5
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_USER_CHARACTERS = 256

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service and the model allow a request: tokens of context, and entries of `stop`."""

    context_length: int
    stops: int


def parse(
    request: pb.CreateCompletionRequest,
    manifest: Manifest,
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    identity: str,
    streaming: bool,
) -> Request:
    """The request as the engine takes it; InvalidRequestError names the field, the bound and what was given.

    `streaming` says whether the answer is to be sent in pieces, which some fields depend on.
    """
    max_tokens = integer("max_tokens", request.max_tokens, 0) if request.HasField("max_tokens") else 16
    n, best_of = _candidates(request, streaming=streaming)
    include_usage, continuous_usage = _stream_options(request, streaming=streaming)
    logprobs = integer("logprobs", request.logprobs, 0, MAX_LOGPROBS) if request.HasField("logprobs") else None
    stop = _stop(request, limits.stops)
    sampling = _sampling(request, manifest.vocab_size)
    stop_token_ids = _stop_token_ids(request, manifest)
    min_tokens = integer("min_tokens", request.min_tokens, 0, max_tokens)
    _check_user(request.user)
    suffix = _suffix(request, manifest)
    check_characters("suffix", suffix, limits.context_length)
    prompts = parse_prompts(request, tokenizer, limits.context_length, best_of)
    if suffix:
        prompts = tuple(tokenizer.fill_in_the_middle(prompt, suffix) for prompt in prompts)
    for prompt in prompts:
        _check_context(prompt, max_tokens, limits.context_length)
    return Request(
        id="cmpl-" + "".join(secrets.choice(_BASE62) for _ in range(29)),
        model=request.model,
        created=int(time.time()),
        identity=identity,
        prompts=prompts,
        max_tokens=max_tokens,
        n=n,
        best_of=best_of,
        stream=streaming,
        include_usage=include_usage,
        continuous_usage=continuous_usage,
        logprobs=logprobs,
        echo=request.echo,
        stop=stop,
        stop_token_ids=stop_token_ids,
        min_tokens=min_tokens,
        sampling=sampling,
    )


def _candidates(request: pb.CreateCompletionRequest, *, streaming: bool) -> tuple[int, int]:
    n = integer("n", request.n, 1, MAX_SEQUENCES) if request.HasField("n") else 1
    if not request.HasField("best_of"):
        return n, n
    best_of = integer("best_of", request.best_of, 1, MAX_BEST_OF)
    if best_of < n:
        problem = f"best_of must be greater than or equal to n, but got best_of {best_of} and n {n} instead."
        raise invalid("best_of", problem, "invalid_value")
    if streaming and best_of > 1:
        problem = f"Results cannot be streamed when best_of is greater than 1, but got {best_of} instead."
        raise invalid("best_of", problem, "invalid_value")
    return n, best_of


def _stream_options(request: pb.CreateCompletionRequest, *, streaming: bool) -> tuple[bool, bool]:
    if request.HasField("stream_options") and not streaming:
        raise invalid("stream_options", "only allowed when 'stream' is true.", "invalid_value")
    return request.stream_options.include_usage, request.stream_options.continuous_usage_stats


def _stop(request: pb.CreateCompletionRequest, limit: int) -> tuple[str, ...]:
    at_most("stop", "entries", len(request.stop), limit, "array_above_max_length")
    for entry in request.stop:
        if not entry:
            raise invalid("stop", "stop cannot contain an empty string.", "empty_string")
        at_most("stop", "characters per entry", len(entry), MAX_STOP_CHARACTERS, "string_above_max_length")
    return tuple(request.stop)


def _sampling(request: pb.CreateCompletionRequest, vocabulary: int) -> SamplingParams:
    fields: Message = request

    def given(name: str, default: float, low: float, high: float) -> float:
        return decimal(name, getattr(request, name), low, high) if fields.HasField(name) else default

    if request.HasField("repetition_penalty") and request.repetition_penalty <= 0:
        problem = f"Expected a value > 0, but got {shortest(request.repetition_penalty)} instead."
        raise invalid("repetition_penalty", problem, "decimal_below_min_value")
    return SamplingParams(
        temperature=given("temperature", 1, 0, 2),
        top_p=given("top_p", 1, 0, 1),
        top_k=min(max(0, integer("top_k", request.top_k, -1)), vocabulary),
        min_p=given("min_p", 0, 0, 1),
        presence_penalty=given("presence_penalty", 0, -2, 2),
        frequency_penalty=given("frequency_penalty", 0, -2, 2),
        repetition_penalty=given("repetition_penalty", 1, 0, 2),
        logit_bias=_logit_bias(request, vocabulary),
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
    )


def _logit_bias(request: pb.CreateCompletionRequest, vocabulary: int) -> dict[int, float]:
    at_most("logit_bias", "entries", len(request.logit_bias), MAX_LOGIT_BIAS, "object_above_max_properties")
    bias = {}
    for key, value in request.logit_bias.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocabulary:
            problem = f"key '{shown(key)}' is not a token id within 0..{vocabulary - 1}."
            raise invalid("logit_bias", problem, "invalid_value")
        bias[int(key)] = decimal(f"logit_bias.{key}", value, -100, 100)
    return bias


def _stop_token_ids(request: pb.CreateCompletionRequest, manifest: Manifest) -> frozenset[int]:
    count = len(request.stop_token_ids)
    at_most("stop_token_ids", "entries", count, MAX_STOP_TOKEN_IDS, "array_above_max_length")
    for token in request.stop_token_ids:
        integer("stop_token_ids", token, 0, manifest.vocab_size - 1)
    end = () if request.ignore_eos else manifest.special_tokens.end
    return frozenset([*request.stop_token_ids, *end])


def _check_user(user: str) -> None:
    at_most("user", "characters", len(user), MAX_USER_CHARACTERS, "string_above_max_length")
    if any(character < " " or character == "\x7f" for character in user):
        raise invalid("user", "must not contain control characters.", "invalid_value")


def _suffix(request: pb.CreateCompletionRequest, manifest: Manifest) -> str:
    if request.suffix and request.echo:
        raise invalid("suffix", "'suffix' and 'echo' cannot be combined.", "invalid_value")
    if request.suffix and manifest.special_tokens.fill_in_the_middle is None:
        message = "Unsupported parameter: 'suffix' is not supported with this model."
        raise InvalidRequestError(message, param="suffix", code="unsupported_parameter")
    return request.suffix


def _check_context(prompt: Prompt, max_tokens: int, context_length: int) -> None:
    length = len(prompt.token_ids)
    if length + max_tokens > context_length:
        message = (
            f"This model's maximum context length is {context_length} tokens, however you requested "
            f"{length + max_tokens} tokens ({length} in your prompt; {max_tokens} for the completion). Please reduce "
            "your prompt; or completion length."
        )
        raise InvalidRequestError(message, param="prompt", code="context_length_exceeded")
