"""Renders the engine's pieces as messages, and messages as OpenAI's JSON for event streams."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from completion.v1 import completion_pb2 as pb
from google.protobuf.struct_pb2 import NULL_VALUE

from service.text.usage import TokenCounts
from service.types import Delta, FinishReason, Request, Token

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
}
# Members of the oneof that REST shows as `stop_reason`; for others it is null.
_STOPS = {"stop_text", "stop_token_id"}
# Obfuscated messages have a multiple of this length, of which most pieces need one.
_PADDED_BYTES = 512
_FINISH_NAMES = {_FINISH_REASONS[reason]: reason.value for reason in FinishReason}


class _Messages:
    """What whole and streamed answers have in common: the request, and its token counts so far."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        self._counts = TokenCounts()

    def usage_message(self, timings: pb.Timings | None = None) -> pb.CreateCompletionResponse:
        """A message without choices, with the usage so far: the last one of a stream."""
        message = self._message()
        if timings is not None:
            message.timings.CopyFrom(timings)
        completion = self._counts.completion
        total = self._prompt_tokens + completion
        usage = pb.Usage(prompt_tokens=self._prompt_tokens, completion_tokens=completion, total_tokens=total)
        if cached := self._counts.cached:
            usage.prompt_tokens_details.cached_tokens = cached
        message.usage.CopyFrom(usage)
        return message

    def _message(self) -> pb.CreateCompletionResponse:
        return pb.CreateCompletionResponse(
            id=self._request.id,
            object="text_completion",
            created=self._request.created,
            model=self._request.model,
            system_fingerprint=self._request.fingerprint,
        )

    def _add_choice(
        self,
        message: pb.CreateCompletionResponse,
        index: int,
        text: str,
        tokens: Iterable[Token],
        last: Delta,
    ) -> pb.Choice:
        """Adds a choice, or a piece of one, of which `last` is the last delta."""
        choice = message.choices.add(text=text, index=index, finish_reason=_FINISH_REASONS[last.finish_reason])
        if self._request.logprobs is None:
            choice.no_logprobs = NULL_VALUE
        else:
            _add_scores(choice.logprobs, tokens, self._request.scored_token_ids)
        if isinstance(last.stop, str):
            choice.stop_text = last.stop
        elif last.stop in self._request.own_stop_token_ids:
            choice.stop_token_id = last.stop
        elif last.stop is not None and self._request.return_token_ids:
            choice.end_token_id = last.stop
        return choice


class Answer(_Messages):
    """A complete answer, joined from its pieces."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._pieces: list[list[list[Delta]]] = [[[] for _ in range(request.best_of)] for _ in request.prompts]

    def add(self, delta: Delta) -> None:
        """Adds a piece."""
        self._counts.add(delta)
        self._pieces[delta.prompt_index][delta.candidate].append(delta)

    def response(self, timings: pb.Timings | None = None) -> pb.CreateCompletionResponse:
        """The answer, with the `n` candidates of the highest mean log probability; equal ones stay in order."""
        response = self.usage_message(timings)
        for prompt, candidates in zip(self._request.prompts, self._pieces, strict=True):
            ranked = sorted(candidates, key=lambda pieces: -(pieces[-1].mean_logprob or 0.0))
            for pieces in ranked[: self._request.n]:
                text = "".join(piece.text for piece in pieces)
                tokens = (token for piece in pieces for token in piece.tokens)
                choice = self._add_choice(response, len(response.choices), text, tokens, pieces[-1])
                if self._request.return_token_ids:
                    choice.token_ids.extend(index for piece in pieces for index in piece.token_ids)
                    choice.prompt_token_ids.extend(prompt.token_ids)
        return response


class Pieces(_Messages):
    """Makes the messages of a streamed answer."""

    def __init__(self, request: Request, *, padded: bool = False) -> None:
        """`padded` messages have lengths that tell little of their texts."""
        super().__init__(request)
        self._padded = padded
        self._begun: set[int] = set()

    def usage_message(self, timings: pb.Timings | None = None) -> pb.CreateCompletionResponse:
        message = super().usage_message(timings)
        return _pad(message) if self._padded else message

    def message(self, delta: Delta, timings: pb.Timings | None = None) -> pb.CreateCompletionResponse:
        """The message of one piece; `timings` are given for the last one, which shows them if no usage follows."""
        self._counts.add(delta)
        message = self.usage_message() if self._request.continuous_usage else self._message()
        if timings is not None and not self._request.include_usage:
            message.timings.CopyFrom(timings)
        index = delta.prompt_index * self._request.n + delta.candidate
        choice = self._add_choice(message, index, delta.text, delta.tokens, delta)
        if self._request.return_token_ids:
            choice.token_ids.extend(delta.token_ids)
            if index not in self._begun:
                self._begun.add(index)
                choice.prompt_token_ids.extend(self._request.prompts[delta.prompt_index].token_ids)
        return _pad(message) if self._padded else message


def _pad(message: pb.CreateCompletionResponse) -> pb.CreateCompletionResponse:
    """Pads a message to a multiple of _PADDED_BYTES."""
    message.obfuscation = ""  # its tag and a length of one byte are counted now; from 128 on the length has two
    missing = -message.ByteSize() % _PADDED_BYTES
    message.obfuscation = _padding(missing if missing < 128 else missing - 1)
    if message.ByteSize() % _PADDED_BYTES:  # where 128 were missing, 127 are too few, and 128 too many
        message.obfuscation = _padding(_PADDED_BYTES + missing - 1)
    return message


def _padding(length: int) -> str:
    return secrets.token_urlsafe(length)[:length]


def _add_scores(message: pb.Logprobs, tokens: Iterable[Token], scored_token_ids: Sequence[int]) -> None:
    message.SetInParent()  # even without a token
    for token in tokens:
        message.tokens.append(token.text)
        message.text_offset.append(token.offset)
        if scored_token_ids:
            by_id = message.token_id_logprobs.add()
            for index, logprob in zip(scored_token_ids, token.by_id, strict=False):  # some tokens have no scores
                by_id.scores.add(token_id=index, logprob=logprob)
        score, top = message.token_logprobs.add(), message.top_logprobs.add()
        if token.logprob is None or token.top is None:
            score.null = top.null = NULL_VALUE
            continue
        score.logprob = token.logprob
        for text, logprob in token.top:
            top.alternatives.alternatives.add(token=text).score.logprob = logprob


@dataclass(frozen=True, slots=True)
class Form:
    """Which keys JSON has, also where their values are null or empty; `obfuscation` pads an event."""

    usage: bool
    token_ids: bool = False
    token_id_logprobs: bool = False
    obfuscation: bool = False

    @classmethod
    def of(cls, request: pb.CreateCompletionRequest) -> Form:
        """The form that a request asks for."""
        return cls(
            usage=not request.stream or request.stream_options.include_usage,
            token_ids=request.return_token_ids,
            token_id_logprobs=bool(request.logprob_token_ids),
            obfuscation=request.stream_options.include_obfuscation,
        )


def event(message: pb.CreateCompletionResponse, form: Form) -> bytes:
    """A streamed message as a server-sent event."""
    body = response_json(message, form)
    if form.obfuscation:
        body["obfuscation"] = ""
        body["obfuscation"] = _padding(-len(_event(body)) % _PADDED_BYTES)
    return _event(body)


def error_event(error: pb.Error) -> bytes:
    """An error as a server-sent event."""
    return _event(
        {
            "error": {
                "message": error.message,
                "type": error.type,
                "param": error.param if error.HasField("param") else None,
                "code": error.code if error.HasField("code") else None,
            }
        }
    )


DONE_EVENT = b"data: [DONE]\n\n"
# Clients ignore a comment; it shows proxies that the connection is in use.
WAITING_COMMENT = b": waiting\n\n"


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + _to_bytes(body) + b"\n\n"


def body(message: pb.CreateCompletionResponse, form: Form) -> bytes:
    """A whole answer as JSON."""
    return _to_bytes(response_json(message, form))


def _to_bytes(body: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def response_json(message: pb.CreateCompletionResponse, form: Form) -> dict[str, Any]:
    """The answer as OpenAI's JSON, equal to Envoy's transcoding of it."""
    body: dict[str, Any] = {
        "id": message.id,
        "object": message.object,
        "created": message.created,
        "model": message.model,
        "choices": [_choice_json(choice, form) for choice in message.choices],
    }
    if form.usage or message.HasField("usage"):
        body["usage"] = _usage_json(message.usage) if message.HasField("usage") else None
    if message.HasField("system_fingerprint"):
        body["system_fingerprint"] = message.system_fingerprint
    if message.HasField("timings"):
        body["timings"] = {field.name: getattr(message.timings, field.name) for field in pb.Timings.DESCRIPTOR.fields}
    return body


def _choice_json(choice: pb.Choice, form: Form) -> dict[str, Any]:
    body: dict[str, Any] = {
        "text": choice.text,
        "index": choice.index,
        "logprobs": _logprobs_json(choice.logprobs, form) if choice.HasField("logprobs") else None,
        "finish_reason": _FINISH_NAMES.get(choice.finish_reason),
    }
    stop = choice.WhichOneof("stop_reason")
    shown = getattr(choice, stop) if stop in _STOPS else None
    if form.token_ids or shown is not None:
        body["stop_reason"] = shown
    if form.token_ids:
        body["token_ids"] = list(choice.token_ids)
        if choice.prompt_token_ids:
            body["prompt_token_ids"] = list(choice.prompt_token_ids)
    return body


def _logprobs_json(logprobs: pb.Logprobs, form: Form) -> dict[str, Any]:
    body: dict[str, Any] = {
        "tokens": list(logprobs.tokens),
        "token_logprobs": [_score_json(score) for score in logprobs.token_logprobs],
        "top_logprobs": [
            {item.token: _score_json(item.score) for item in top.alternatives.alternatives}
            if top.HasField("alternatives")
            else None
            for top in logprobs.top_logprobs
        ],
        "text_offset": list(logprobs.text_offset),
    }
    if form.token_id_logprobs:
        body["token_id_logprobs"] = [
            {str(score.token_id): score.logprob for score in each.scores} or None for each in logprobs.token_id_logprobs
        ]
    return body


def _score_json(score: pb.TokenScore) -> float | None:
    return score.logprob if score.HasField("logprob") else None


def _usage_json(usage: pb.Usage) -> dict[str, Any]:
    body: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
    if usage.HasField("prompt_tokens_details"):
        body["prompt_tokens_details"] = {"cached_tokens": usage.prompt_tokens_details.cached_tokens}
    return body
