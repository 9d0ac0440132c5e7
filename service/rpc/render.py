"""Renders the engine's pieces as messages, and messages as OpenAI's JSON for event streams."""

from __future__ import annotations

import json
from collections.abc import Iterable
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
_FINISH_NAMES = {_FINISH_REASONS[reason]: reason.value for reason in FinishReason}


class _Messages:
    """What whole and streamed answers have in common: the request, and its token counts so far."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        self._counts = TokenCounts()

    def usage_message(self) -> pb.CreateCompletionResponse:
        """A message without choices, with the usage so far: the last one of a stream."""
        message = self._message()
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
        )

    def _add_choice(
        self,
        message: pb.CreateCompletionResponse,
        index: int,
        text: str,
        tokens: Iterable[Token],
        finish: FinishReason | None,
    ) -> None:
        choice = message.choices.add(text=text, index=index, finish_reason=_FINISH_REASONS[finish])
        if self._request.logprobs is None:
            choice.no_logprobs = NULL_VALUE
        else:
            _add_scores(choice.logprobs, tokens)


class Answer(_Messages):
    """A complete answer, joined from its pieces."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._pieces: list[list[list[Delta]]] = [[[] for _ in range(request.best_of)] for _ in request.prompts]

    def add(self, delta: Delta) -> None:
        """Adds a piece."""
        self._counts.add(delta)
        self._pieces[delta.prompt_index][delta.candidate].append(delta)

    def response(self) -> pb.CreateCompletionResponse:
        """The answer, with the `n` candidates of the highest mean log probability; equal ones stay in order."""
        response = self.usage_message()
        for candidates in self._pieces:
            ranked = sorted(candidates, key=lambda pieces: -(pieces[-1].mean_logprob or 0.0))
            for pieces in ranked[: self._request.n]:
                text = "".join(piece.text for piece in pieces)
                tokens = (token for piece in pieces for token in piece.tokens)
                self._add_choice(response, len(response.choices), text, tokens, pieces[-1].finish_reason)
        return response


class Pieces(_Messages):
    """Makes the messages of a streamed answer."""

    def message(self, delta: Delta) -> pb.CreateCompletionResponse:
        """The message of one piece."""
        self._counts.add(delta)
        message = self.usage_message() if self._request.continuous_usage else self._message()
        index = delta.prompt_index * self._request.n + delta.candidate
        self._add_choice(message, index, delta.text, delta.tokens, delta.finish_reason)
        return message


def _add_scores(message: pb.Logprobs, tokens: Iterable[Token]) -> None:
    message.SetInParent()  # even without a token
    for token in tokens:
        message.tokens.append(token.text)
        message.text_offset.append(token.offset)
        score, top = message.token_logprobs.add(), message.top_logprobs.add()
        if token.logprob is None or token.top is None:
            score.null = top.null = NULL_VALUE
            continue
        score.logprob = token.logprob
        for text, logprob in token.top:
            top.alternatives.alternatives.add(token=text).score.logprob = logprob


def event(message: pb.CreateCompletionResponse, *, usage_key: bool) -> bytes:
    """A streamed message as a server-sent event; `usage_key` includes `usage` even if it is null."""
    return _event(response_json(message, usage_key=usage_key))


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
    return b"data: " + to_bytes(body) + b"\n\n"


def to_bytes(body: dict[str, Any]) -> bytes:
    """Compact JSON in UTF-8."""
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def response_json(message: pb.CreateCompletionResponse, *, usage_key: bool) -> dict[str, Any]:
    """The answer as OpenAI's JSON, equal to Envoy's transcoding of it."""
    body: dict[str, Any] = {
        "id": message.id,
        "object": message.object,
        "created": message.created,
        "model": message.model,
        "choices": [_choice_json(choice) for choice in message.choices],
    }
    if usage_key or message.HasField("usage"):
        body["usage"] = _usage_json(message.usage) if message.HasField("usage") else None
    return body


def _choice_json(choice: pb.Choice) -> dict[str, Any]:
    return {
        "text": choice.text,
        "index": choice.index,
        "logprobs": _logprobs_json(choice.logprobs) if choice.HasField("logprobs") else None,
        "finish_reason": _FINISH_NAMES.get(choice.finish_reason),
    }


def _logprobs_json(logprobs: pb.Logprobs) -> dict[str, Any]:
    return {
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
