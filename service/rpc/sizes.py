"""The largest size that an answer can have, estimated from its request before anything is computed."""

from __future__ import annotations

from service.rpc.checks import invalid
from service.types import Request

# An answer's bytes; Envoy passes 64 MiB on, and JSON can be twice the message.
MOST_BYTES = 32 << 20
# About what a generated token's text takes, a scored token, and each alternative to it.
_TEXT, _SCORED, _ALTERNATIVE = 4, 64, 32


def answer_bytes(request: Request) -> int:
    """About how many bytes the answer has at most."""
    return sum(map(sum, _parts(request)))


def check_size(request: Request) -> None:
    """Refuses a request whose answer would be too large: InvalidRequestError names what makes it so."""
    size = answer_bytes(request)
    if size <= MOST_BYTES:
        return
    prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
    problem = (
        f"the answer would have about {size >> 20} MiB, and may have {MOST_BYTES >> 20}: {prompt_tokens} prompt tokens"
        f" and {request.max_tokens} for the completion, {request.n} times. Please ask for fewer in one request, or"
        f" without echo or logprobs."
    )
    raise invalid("n", problem, "answer_too_large")


def _parts(request: Request) -> list[tuple[int, int]]:
    """Bytes of text, and bytes of scores, of each prompt's choices."""
    each = 0 if request.logprobs is None else _SCORED + _ALTERNATIVE * (request.logprobs + 1)
    found = []
    for prompt in request.prompts:
        echoed = len(prompt.text.encode()) if request.echo else 0
        scored = request.max_tokens + (len(prompt.token_ids) if request.echo else 0)
        found.append((request.n * (echoed + request.max_tokens * _TEXT), request.n * scored * each))
    return found
