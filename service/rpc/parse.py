"""From the wire's request to a valid one: the contract's bounds, and those that no proto rule can state. Pure."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from completion.v1 import completion_pb2 as pb

from service.errors import PriorityError
from service.manifest import Manifest
from service.rpc import bounds
from service.rpc.checks import JSON_TYPES, check_maximum, invalid, shown, unsupported, wrong_type
from service.rpc.parts import check_count
from service.rpc.prompts import Reading, check_characters, check_context, parse_prompts
from service.rpc.sizes import check_size
from service.text.banned_texts import BannedTexts
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")
NOT_SUPPORTED_YET = {
    "on_deadline",
    "output_message",
    "prediction",
    "response_format",
    "resume",
    "structured_outputs",
}
# Any prompt of one token, to count what fill-in-the-middle adds to it.
_ONE_TOKEN = Prompt((0,), "")
_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service and the model allow a request: tokens of context, entries of `stop`, and `logprobs`.

    `parse_special`: control tokens are read in the texts of a request that does not say whether.
    """

    context_length: int
    stops: int
    parse_special: bool = True
    logprobs: int = 5


def parse(
    request: pb.CreateCompletionRequest,
    manifest: Manifest,
    tokenizer: Tokenizer,
    limits: Limits,
    *,
    identity: str,
    streaming: bool,
    ceiling: int | None = None,
    fingerprint: str | None = None,
) -> Request:
    """The request as the engine takes it; InvalidRequestError names the field, the bound and what was given.

    `streaming` says whether the answer is sent in pieces, which some fields depend on. PriorityError: the request is
    more urgent than `ceiling`. `fingerprint` is what the answer shows.
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
    control_stops = frozenset(index for text in stop if (index := tokenizer.control_token(text)) is not None)
    check_maximum("min_tokens", request.min_tokens, max_tokens)
    check_maximum("logprobs", request.logprobs, limits.logprobs)
    if any(character < " " or character == "\x7f" for character in request.user):
        raise invalid("user", "must not contain control characters.", "invalid_value")
    suffix = _suffix(request, manifest)
    check_characters("suffix", suffix, limits.context_length)
    reading = Reading.of(request, limits.parse_special)
    kept = _kept_tokens(request, tokenizer, limits.context_length, max_tokens, suffix)
    prompts = parse_prompts(request, tokenizer, limits.context_length, best_of, max_tokens, reading=reading, kept=kept)
    _check_logprobs_from(request, prompts)
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
        obfuscate=request.stream_options.include_obfuscation,
        logprobs=request.logprobs if request.HasField("logprobs") or request.logprob_token_ids else None,
        logprobs_from=request.logprobs_from,
        scored_token_ids=_token_ids("logprob_token_ids", request, manifest),
        echo=request.echo,
        stop=stop,
        include_stop=request.include_stop_str_in_output,
        stop_token_ids=stop_token_ids,
        control_stops=control_stops,
        skip_special_tokens=skip_special,
        own_stop_token_ids=frozenset(request.stop_token_ids),
        allowed_token_ids=_token_ids("allowed_token_ids", request, manifest),
        banned_texts=_banned_texts(request, tokenizer, stop_token_ids, control_stops, skip_special=skip_special),
        min_tokens=request.min_tokens,
        priority=_priority(request, ceiling),
        return_token_ids=request.return_token_ids,
        return_timings=request.return_timings,
        fingerprint=fingerprint,
        sampling=sampling,
    )
    check_size(parsed)
    return parsed


def _check_supported(request: pb.CreateCompletionRequest) -> None:
    """Refuses the parameters that the contract has and the service does not honour yet."""
    given = {field.name for field, _ in request.ListFields()}
    for name in sorted(given & NOT_SUPPORTED_YET):
        raise unsupported(name, "yet")


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
    end = () if request.ignore_eos else manifest.special_tokens.end
    return frozenset([*_token_ids("stop_token_ids", request, manifest), *end])


def _token_ids(name: str, request: pb.CreateCompletionRequest, manifest: Manifest) -> tuple[int, ...]:
    """The token ids in a repeated field, each once and in their order."""
    ids: tuple[int, ...] = tuple(dict.fromkeys(getattr(request, name)))
    check_maximum(name, max(ids, default=0), manifest.vocab_size - 1)
    return ids


def _banned_texts(
    request: pb.CreateCompletionRequest,
    tokenizer: Tokenizer,
    stop_token_ids: frozenset[int],
    control_stops: frozenset[int],
    *,
    skip_special: bool,
) -> BannedTexts | None:
    if not request.bad_words:
        return None
    if any("\ufffd" in word for word in request.bad_words):
        problem = "no entry may contain U+FFFD, which stands for bytes that are not UTF-8."
        raise invalid("bad_words", problem, "invalid_value")
    silent = stop_token_ids | frozenset(tokenizer.control_tokens if skip_special else ())
    silent -= control_stops if request.include_stop_str_in_output else frozenset()
    return BannedTexts(request.bad_words, tokenizer.spellings, silent)


def _kept_tokens(
    request: pb.CreateCompletionRequest, tokenizer: Tokenizer, context_length: int, max_tokens: int, suffix: str
) -> int | None:
    """How many of the last tokens of a prompt are kept, at least one; None for all."""
    if not request.HasField("truncate_prompt_tokens"):
        return None
    kept = request.truncate_prompt_tokens
    check_maximum("truncate_prompt_tokens", kept, context_length)
    if kept > 0:
        return kept
    around = len(tokenizer.fill_in_the_middle(_ONE_TOKEN, suffix).token_ids) - 1 if suffix else 0
    return max(1, context_length - max_tokens - around)


def _check_logprobs_from(request: pb.CreateCompletionRequest, prompts: Sequence[Prompt]) -> None:
    if not request.HasField("logprobs_from"):
        return
    if not request.echo or not (request.HasField("logprobs") or request.logprob_token_ids):
        raise invalid("logprobs_from", "only allowed with 'echo' and 'logprobs'.", "invalid_value")
    check_maximum("logprobs_from", request.logprobs_from, min(len(prompt.token_ids) for prompt in prompts))


def _priority(request: pb.CreateCompletionRequest, ceiling: int | None) -> int:
    if not request.HasField("priority"):
        return max(0, ceiling or 0)
    priority: int = request.priority
    if ceiling is not None and priority < ceiling:
        message = f"Your API key may not ask for a priority more urgent than {ceiling}, but got {priority} instead."
        raise PriorityError(message, param="priority", code="priority_not_allowed")
    return priority


def _suffix(request: pb.CreateCompletionRequest, manifest: Manifest) -> str:
    if request.suffix and request.echo:
        raise invalid("suffix", "'suffix' and 'echo' cannot be combined.", "invalid_value")
    if request.suffix and manifest.special_tokens.fill_in_the_middle is None:
        raise unsupported("suffix", "with this model")
    return request.suffix
