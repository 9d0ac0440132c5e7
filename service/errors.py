"""The service's errors: expected ones that callers read, faults of the engine, and reasons not to start.

ServiceError
  InvalidRequestError
  ModelNotFoundError
    ForbiddenModelError
  AuthenticationError
  PriorityError
  OverloadedError
    TokensExceededError
  UnavailableError
  DeadlineError
  SlowReaderError
EngineFaultError
  NotFiniteError
EngineDiedError
StartupError
  ModelDirectoryError
"""

from __future__ import annotations


class ServiceError(Exception):
    """An expected failure whose message may be shown to the caller."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequestError(ServiceError):
    """The request is outside what the contract or the model allows."""


class ModelNotFoundError(ServiceError):
    """No served model has this id or alias."""


class AuthenticationError(ServiceError):
    """The caller sent no valid key."""


class PriorityError(ServiceError):
    """The caller's key may not ask for a priority as urgent as the request's."""


class ForbiddenModelError(ModelNotFoundError):
    """The caller's key may not use the model; the caller gets the same answer as for one that does not exist."""


class OverloadedError(ServiceError):
    """The queue is full, or the caller has reached a limit; a retry may succeed after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class TokensExceededError(OverloadedError):
    """The caller has used its tokens per minute; enough are available again after `retry_after` seconds."""


class UnavailableError(ServiceError):
    """The service is stopping or its engine has died."""


class DeadlineError(ServiceError):
    """The call's deadline has passed, or will pass before the request can start."""


class SlowReaderError(ServiceError):
    """The caller reads too slowly: its unread answer grew too large or too old."""


class EngineFaultError(Exception):
    """The model failed on this request; the cause is logged and never shown to the caller."""


class NotFiniteError(EngineFaultError):
    """The model's logits are unusable: NaN, or plus infinity, so no result of that row can be trusted."""


class EngineDiedError(Exception):
    """An error ended the step thread; the process must be restarted."""


class StartupError(Exception):
    """The service cannot start; the message says what to change."""


class ModelDirectoryError(StartupError):
    """A model directory is incomplete or damaged, or a directory is not a model directory."""
