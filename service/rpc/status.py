"""The one table from errors to statuses: gRPC's code, OpenAI's type, and what the caller may read."""

from __future__ import annotations

import math

import grpc
from completion.v1 import completion_pb2 as pb
from google.protobuf import any_pb2
from google.protobuf.struct_pb2 import NULL_VALUE
from google.rpc import status_pb2

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

Metadata = tuple[tuple[str, str | bytes], ...]

_TABLE: dict[type[ServiceError], tuple[grpc.StatusCode, str]] = {
    InvalidRequestError: (grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    AuthenticationError: (grpc.StatusCode.UNAUTHENTICATED, "invalid_request_error"),
    ForbiddenModelError: (grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    ModelNotFoundError: (grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    OverloadedError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "requests"),
    TokensExceededError: (grpc.StatusCode.RESOURCE_EXHAUSTED, "tokens"),
    UnavailableError: (grpc.StatusCode.UNAVAILABLE, "server_error"),
    DeadlineError: (grpc.StatusCode.DEADLINE_EXCEEDED, "server_error"),
    SlowReaderError: (grpc.StatusCode.ABORTED, "server_error"),
}


def status_of(error: Exception, request_id: str) -> tuple[grpc.StatusCode, pb.Error]:
    """The status and the error to send for an exception; one that is not expected says nothing of itself."""
    if isinstance(error, ServiceError):
        code, kind = _TABLE[type(error)]
        return code, error_message(error.message, kind, error.param, error.code)
    message = f"The server had an error while processing your request. Request id: {request_id}."
    return grpc.StatusCode.INTERNAL, error_message(message, "server_error", None, None)


def error_message(message: str, kind: str, param: str | None, code: str | None) -> pb.Error:
    """An error with its four fields, null where None."""
    error = pb.Error(message=message, type=kind)
    if param is None:
        error.no_param = NULL_VALUE
    else:
        error.param = param
    if code is None:
        error.no_code = NULL_VALUE
    else:
        error.code = code
    return error


def trailing_metadata(code: grpc.StatusCode, error: pb.Error, cause: Exception) -> Metadata:
    """The status's detail and, for an overload, when to come back."""
    detail = any_pb2.Any()
    detail.Pack(pb.ErrorResponse(error=error))
    status = status_pb2.Status(code=code.value[0], message=error.message, details=[detail])
    metadata: Metadata = (("grpc-status-details-bin", status.SerializeToString()),)
    if isinstance(cause, OverloadedError):
        milliseconds = f"{max(1, math.ceil(cause.retry_after * 1000))}"
        metadata += (("retry-after", f"{max(1, math.ceil(cause.retry_after))}"), ("retry-after-ms", milliseconds))
        metadata += (("grpc-retry-pushback-ms", milliseconds),)
    if isinstance(cause, AuthenticationError):
        metadata += (("www-authenticate", "Bearer"),)
    return metadata
