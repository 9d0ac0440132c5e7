"""How a completion request ended, why it was refused if it was, and what the log says of it."""

from __future__ import annotations

from service.errors import (
    AuthenticationError,
    DeadlineError,
    ForbiddenModelError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    ServiceError,
    SlowReaderError,
    TokensExceededError,
    UnavailableError,
)
from service.telemetry.observer import Ended, Outcome, Refusal

_REFUSALS: dict[type[ServiceError], Refusal] = {
    InvalidRequestError: Refusal.INVALID,
    AuthenticationError: Refusal.UNAUTHENTICATED,
    ForbiddenModelError: Refusal.FORBIDDEN,
    ModelNotFoundError: Refusal.UNKNOWN_MODEL,
    OverloadedError: Refusal.OVERLOADED,
    TokensExceededError: Refusal.TOKENS_PER_MINUTE,
    DeadlineError: Refusal.DEADLINE,
    UnavailableError: Refusal.STOPPING,
}
_OUTCOMES: dict[type[Exception], Outcome] = {
    DeadlineError: Outcome.DEADLINE,
    SlowReaderError: Outcome.SLOW_READER,
    AuthenticationError: Outcome.CANCELLED,  # its key was revoked meanwhile
}


def outcome_of(error: Exception | None, *, begun: bool, finished: bool, late: bool) -> tuple[Outcome, Refusal | None]:
    """`begun` if the engine had taken the request; without an error it `finished`, or was cancelled, `late` or not."""
    if error is None:
        if finished:
            return Outcome.COMPLETED, None
        return Outcome.DEADLINE if late else Outcome.CANCELLED, None
    refusal = _REFUSALS.get(type(error)) if isinstance(error, ServiceError) else None
    if refusal is not None and not begun:
        return Outcome.REFUSED, refusal
    return _OUTCOMES.get(type(error), Outcome.FAILED), None


def summary(ended: Ended) -> dict[str, object]:
    """What the log says of a completion request; times are null where it did not get so far."""
    fields: dict[str, object] = {"outcome": ended.outcome.value}
    if ended.model:
        fields["model"] = ended.model
    if ended.refusal is not None:
        fields["reason"] = ended.refusal.value
    usage = ended.usage
    if usage is not None:
        waited = None
        if usage.queued_seconds is not None and usage.started_seconds is not None:
            waited = round(usage.started_seconds - usage.queued_seconds, 4)
        first = None if usage.first_token_seconds is None else round(usage.first_token_seconds, 4)
        fields |= {
            "sequences": usage.sequences,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "queue_seconds": waited,
            "first_token_seconds": first,
        }
    return fields
