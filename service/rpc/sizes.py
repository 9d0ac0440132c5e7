"""Estimates the largest possible size of an answer from its request."""

from __future__ import annotations

from service.rpc.checks import invalid
from service.types import Request

# In bytes. Envoy's limit is 64 MiB, and the JSON can be twice as large as the message.
MAX_BYTES = 32 << 20
# Approximate bytes of a generated token's text, of a scored token, of each alternative to it, and of a token's id.
_TEXT, _SCORED, _ALTERNATIVE, _ID = 4, 64, 32, 6


def answer_bytes(request: Request) -> int:
    """The estimated maximum size of the answer, in bytes: of each prompt's choices, the texts and the scores."""
    per_score = 0 if request.logprobs is None else _SCORED + _ALTERNATIVE * (request.logprobs + 1)
    if request.logprobs is not None:
        per_score += _ALTERNATIVE * len(request.scored_token_ids)
    per_id = _ID if request.return_token_ids else 0
    size = 0
    for prompt in request.prompts:
        text = request.max_tokens * _TEXT + (len(prompt.text.encode()) if request.echo else 0)
        scored = request.max_tokens + (len(prompt.token_ids) if request.echo else 0)
        ids = (request.max_tokens + len(prompt.token_ids)) * per_id
        size += request.n * (text + scored * per_score + ids)
    return size


def check_size(request: Request) -> None:
    """Raises InvalidRequestError, with the reasons, if the answer could be too large."""
    size = answer_bytes(request)
    if size <= MAX_BYTES:
        return
    prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
    problem = (
        f"the answer would have about {size >> 20} MiB, and may have at most {MAX_BYTES >> 20} MiB: {prompt_tokens} "
        f"prompt tokens and {request.max_tokens} for the completion, {request.n} times. Please ask for fewer in one "
        f"request, or without echo or logprobs."
    )
    raise invalid("n", problem, "answer_too_large")
