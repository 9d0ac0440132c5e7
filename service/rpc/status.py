"""The one table of errors: the status that a caller gets, and the outcome that observers and the log get."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc
from completion.v1 import completion_pb2 as pb
from google.protobuf.any import pack
from google.protobuf.struct_pb2 import NULL_VALUE
from google.rpc import status_pb2

from service.errors import (
    AuthenticationError,
    DeadlineError,
    EngineFaultError,
    ForbiddenModelError,
    InvalidRequestError,
    ModelNotFoundError,
    OverloadedError,
    PriorityError,
    ServiceError,
    SlowReaderError,
    TokensExceededError,
    UnavailableError,
)
from service.telemetry.observer import Ended, Outcome, Refusal

Metadata = tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class _Row:
    """How an error is reported: gRPC's code, OpenAI's type, and how metrics count the request.

    They count `refusal` if the engine had not accepted the request, else `outcome`.
    """

    code: grpc.StatusCode
    type: str
    refusal: Refusal | None
    outcome: Outcome = Outcome.FAILED


# By exact type: a subclass needs a row of its own.
_TABLE: dict[type[Exception], _Row] = {
    InvalidRequestError: _Row(grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error", Refusal.INVALID),
    # The outcome is that of a key which was revoked while the engine worked on the request.
    AuthenticationError: _Row(
        grpc.StatusCode.UNAUTHENTICATED, "invalid_request_error", Refusal.UNAUTHENTICATED, Outcome.CANCELLED
    ),
    ForbiddenModelError: _Row(grpc.StatusCode.NOT_FOUND, "invalid_request_error", Refusal.FORBIDDEN),
    PriorityError: _Row(grpc.StatusCode.PERMISSION_DENIED, "invalid_request_error", Refusal.FORBIDDEN),
    ModelNotFoundError: _Row(grpc.StatusCode.NOT_FOUND, "invalid_request_error", Refusal.UNKNOWN_MODEL),
    OverloadedError: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "requests", Refusal.OVERLOADED),
    TokensExceededError: _Row(grpc.StatusCode.RESOURCE_EXHAUSTED, "tokens", Refusal.TOKENS_PER_MINUTE),
    UnavailableError: _Row(grpc.StatusCode.UNAVAILABLE, "server_error", Refusal.STOPPING),
    DeadlineError: _Row(grpc.StatusCode.DEADLINE_EXCEEDED, "server_error", Refusal.DEADLINE, Outcome.DEADLINE),
    SlowReaderError: _Row(grpc.StatusCode.ABORTED, "server_error", None, Outcome.SLOW_READER),
}
_UNEXPECTED = _Row(grpc.StatusCode.INTERNAL, "server_error", None)


def status_of(error: Exception, request_id: str) -> tuple[grpc.StatusCode, pb.Error]:
    """The status and the error to send for an exception; an unexpected one reveals only the request id."""
    row = _TABLE.get(type(error), _UNEXPECTED)
    if isinstance(error, ServiceError):
        return row.code, error_message(error.message, row.type, error.param, error.code)
    message = f"The server had an error while processing your request. Request id: {request_id}."
    return row.code, error_message(message, row.type, None, None)


def error_message(message: str, openai_type: str, param: str | None, code: str | None) -> pb.Error:
    """An error with its four fields, null where None."""
    fields: dict[str, Any] = {"no_param": NULL_VALUE} if param is None else {"param": param}
    fields |= {"no_code": NULL_VALUE} if code is None else {"code": code}
    return pb.Error(message=message, type=openai_type, **fields)


def trailing_metadata(code: grpc.StatusCode, error: pb.Error, cause: Exception) -> Metadata:
    """The status's detail; for an overload when to retry, and for a fault of the engine that a retry is no use."""
    details = [pack(pb.ErrorResponse(error=error))]
    status = status_pb2.Status(code=code.value[0], message=error.message, details=details)
    metadata: Metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    if isinstance(cause, OverloadedError):
        milliseconds = f"{max(1, math.ceil(cause.retry_after * 1000))}"
        metadata += (
            ("retry-after", f"{max(1, math.ceil(cause.retry_after))}"),
            ("retry-after-ms", milliseconds),
            ("grpc-retry-pushback-ms", milliseconds),
        )
    if isinstance(cause, EngineFaultError):
        metadata += (("x-should-retry", "false"),)
    if isinstance(cause, AuthenticationError):
        metadata += (("www-authenticate", "Bearer"),)
    return metadata


def outcome_of(
    error: Exception | None, *, begun: bool, finished: bool, late: bool
) -> tuple[grpc.StatusCode, Outcome, Refusal | None]:
    """How a call ended: its status, and for a completion request its outcome and why it was refused, if it was.

    `begun`: the engine accepted the request. Without an error the call `finished` or was cancelled; `late`: its
    deadline had passed.
    """
    if error is not None:
        row = _TABLE.get(type(error), _UNEXPECTED)
        refused = row.refusal is not None and not begun
        return (row.code, Outcome.REFUSED, row.refusal) if refused else (row.code, row.outcome, None)
    if finished:
        return grpc.StatusCode.OK, Outcome.COMPLETED, None
    if late:
        return grpc.StatusCode.DEADLINE_EXCEEDED, Outcome.DEADLINE, None
    return grpc.StatusCode.CANCELLED, Outcome.CANCELLED, None


def summary(ended: Ended) -> dict[str, object]:
    """The log's fields for a completion request; a time is null if the request ended before it."""
    fields: dict[str, object] = {"outcome": ended.outcome.value}
    if ended.model:
        fields["model"] = ended.model
    if ended.refusal is not None:
        fields["reason"] = ended.refusal.value
    usage = ended.usage
    if usage is not None:
        started = usage.started_seconds
        waited = None if started is None else round(started - usage.queued_seconds, 4)
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
