"""From the wire's request to a valid one: the contract's bounds, and those that no proto rule can state. Pure."""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass

from completion.v1 import completion_pb2 as pb

from service.manifest import Manifest
from service.rpc import bounds
from service.rpc.checks import JSON_TYPES, check_maximum, invalid, shown, unsupported, wrong_type
from service.rpc.parts import check_count
from service.rpc.prompts import Reading, check_characters, check_context, parse_prompts
from service.rpc.sizes import check_size
from service.text.tokenizer import Tokenizer
from service.types import Request, SamplingParams

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
NOT_SUPPORTED_YET = {
    "allowed_token_ids",
    "bad_words",
    "include_stop_str_in_output",
    "logprob_token_ids",
    "logprobs_from",
    "on_deadline",
    "output_message",
    "prediction",
    "priority",
    "response_format",
    "resume",
    "return_timings",
    "return_token_ids",
    "structured_outputs",
    "truncate_prompt_tokens",
}
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service and the model allow a request: tokens of context, and entries of `stop`.

    `parse_special`: control tokens are read in the texts of a request that does not say whether.
    """

    context_length: int
    stops: int
    parse_special: bool = True


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

    `streaming` says whether the answer is sent in pieces, which some fields depend on.
    """
    stop = _stop(request, limits.stops)
    check_count(len(request.parts.parts), limits.context_length)
    bounds.check(request)
    if request.HasField("json_stop"):  # which has no rules in the proto: its texts are checked as `stop`
        bounds.check(pb.CreateCompletionRequest(model=request.model, stop=stop))
    _check_supported(request)
    max_tokens = request.max_tokens if request.HasField("max_tokens") else 16
    n, best_of = _candidates(request, streaming=streaming)
    if request.HasField("stream_options") and not streaming:
        raise invalid("stream_options", "only allowed when 'stream' is true.", "invalid_value")
    sampling = _sampling(request, manifest.vocab_size)
    skip_special = request.skip_special_tokens or not request.HasField("skip_special_tokens")
    stop_token_ids = _stop_token_ids(request, manifest)
    if skip_special:  # a control token that has no text is found by its id
        stop_token_ids |= {index for text in stop if (index := tokenizer.control_token(text)) is not None}
    check_maximum("min_tokens", request.min_tokens, max_tokens)
    if any(character < " " or character == "\x7f" for character in request.user):
        raise invalid("user", "must not contain control characters.", "invalid_value")
    suffix = _suffix(request, manifest)
    check_characters("suffix", suffix, limits.context_length)
    reading = Reading.of(request, limits.parse_special)
    prompts = parse_prompts(request, tokenizer, limits.context_length, best_of, max_tokens, reading=reading)
    if suffix:
        prompts = tuple(tokenizer.fill_in_the_middle(prompt, suffix) for prompt in prompts)
        for prompt in prompts:
            check_context(len(prompt.token_ids), max_tokens, limits.context_length)
    parsed = Request(
        id="cmpl-" + "".join(secrets.choice(_BASE62) for _ in range(29)),
        model=request.model,
        created=int(time.time()),
        identity=identity,
        prompts=prompts,
        max_tokens=max_tokens,
        n=n,
        best_of=best_of,
        stream=streaming,
        include_usage=request.stream_options.include_usage,
        continuous_usage=request.stream_options.continuous_usage_stats,
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        echo=request.echo,
        stop=stop,
        stop_token_ids=stop_token_ids,
        skip_special_tokens=skip_special,
        min_tokens=request.min_tokens,
        sampling=sampling,
    )
    check_size(parsed)
    return parsed


def _check_supported(request: pb.CreateCompletionRequest) -> None:
    """Refuses the parameters that the contract has and the service does not honour yet."""
    given = {field.name for field, _ in request.ListFields()}
    for name in sorted(given & NOT_SUPPORTED_YET):
        raise unsupported(name, "yet")
    if request.stream_options.HasField("include_obfuscation"):
        raise unsupported("stream_options.include_obfuscation", "yet")


def _candidates(request: pb.CreateCompletionRequest, *, streaming: bool) -> tuple[int, int]:
    n = request.n if request.HasField("n") else 1
    if not request.HasField("best_of"):
        return n, n
    best_of = request.best_of
    if best_of < n:
        problem = f"best_of must be greater than or equal to n, but got best_of {best_of} and n {n} instead."
        raise invalid("best_of", problem, "invalid_value")
    if streaming and best_of > 1:
        problem = f"Results cannot be streamed when best_of is greater than 1, but got {best_of} instead."
        raise invalid("best_of", problem, "invalid_value")
    return n, best_of


def _stop(request: pb.CreateCompletionRequest, limit: int) -> tuple[str, ...]:
    """The stop sequences, from REST callers' `json_stop` or typed callers' `stop`; at most `limit`, else refused."""
    value = request.json_stop
    json_type = value.WhichOneof("kind")
    entries = [] if json_type in {None, "null_value"} else [value]
    if json_type == "list_value":
        entries = list(value.list_value.values)
    if entries and request.stop:
        raise invalid("stop", "set either stop or json_stop, not both.")
    count = len(entries) or len(request.stop)
    if count > limit:
        expected = f"Expected an array with maximum length {limit}, but got an array with length {count} instead."
        raise invalid("stop", f"array too long. {expected}", "array_above_max_length")
    for entry in entries:
        given = entry.WhichOneof("kind")
        if given != "string_value":
            where = " in the array" if json_type == "list_value" else ""
            raise wrong_type("stop", "a string or an array of strings", JSON_TYPES[given] + where)
    return tuple(entry.string_value for entry in entries) or tuple(request.stop)


def _sampling(request: pb.CreateCompletionRequest, vocabulary: int) -> SamplingParams:
    return SamplingParams(
        temperature=request.temperature if request.HasField("temperature") else 1,
        top_p=request.top_p if request.HasField("top_p") else 1,
        top_k=min(max(0, request.top_k), vocabulary),
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty if request.HasField("repetition_penalty") else 1,
        logit_bias=_logit_bias(request, vocabulary),
        seed=request.seed if request.HasField("seed") else secrets.randbits(63),
    )


def _logit_bias(request: pb.CreateCompletionRequest, vocabulary: int) -> dict[int, float]:
    bias = {}
    for key, value in request.logit_bias.items():
        if not _TOKEN_ID.fullmatch(key) or int(key) >= vocabulary:
            problem = f"key '{shown(key)}' is not a token id within 0..{vocabulary - 1}."
            raise invalid("logit_bias", problem, "invalid_value")
        bias[int(key)] = value
    return bias


def _stop_token_ids(request: pb.CreateCompletionRequest, manifest: Manifest) -> frozenset[int]:
    for token in request.stop_token_ids:
        check_maximum("stop_token_ids", token, manifest.vocab_size - 1)
    end = () if request.ignore_eos else manifest.special_tokens.end
    return frozenset([*request.stop_token_ids, *end])


def _suffix(request: pb.CreateCompletionRequest, manifest: Manifest) -> str:
    if request.suffix and request.echo:
        raise invalid("suffix", "'suffix' and 'echo' cannot be combined.", "invalid_value")
    if request.suffix and manifest.special_tokens.fill_in_the_middle is None:
        raise unsupported("suffix", "with this model")
    return request.suffix
