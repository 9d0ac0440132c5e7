"""Everything that can go wrong by name: what a caller did, what the service lacks, what stops it from starting."""

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


class ForbiddenModelError(ModelNotFoundError):
    """The caller's key may not use the model, of which it is told no more than of one that does not exist."""


class OverloadedError(ServiceError):
    """The queue is full, or a limit of the caller reached; after `retry_after` seconds it is worth another try."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message, code="rate_limit_exceeded")
        self.retry_after = retry_after


class TokensExceededError(OverloadedError):
    """The caller has used its tokens per minute; after `retry_after` seconds there are enough again."""


class UnavailableError(ServiceError):
    """The service is stopping or its engine has died."""


class DeadlineError(ServiceError):
    """The call's deadline has come, or comes before the request could begin."""


class SlowReaderError(ServiceError):
    """The caller reads too slowly: what waits for it grew too large or too old."""


class EngineFaultError(Exception):
    """The model failed on this request; the cause is logged and never shown to the caller."""


class NotFiniteError(EngineFaultError):
    """The model's logits are not numbers: of such a row nothing can be trusted."""


class EngineDiedError(Exception):
    """The step thread has ended by an error: the process is of no more use."""


class StartupError(Exception):
    """The service cannot start; the message says what to change."""


class ModelDirectoryError(StartupError):
    """A model directory is incomplete, damaged or not one."""
