"""How a completion request ended, and why it was refused if it was."""

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
from service.observer import Outcome, Refusal

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
