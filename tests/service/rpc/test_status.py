"""The table from errors to statuses."""

from __future__ import annotations

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from google.rpc import status_pb2

from service import errors
from service.rpc.status import status_of, trailing_metadata

TABLE = [
    (errors.InvalidRequestError("m", param="n", code="c"), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request_error"),
    (errors.AuthenticationError("m"), grpc.StatusCode.UNAUTHENTICATED, "invalid_request_error"),
    (errors.ForbiddenModelError("m"), grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    (errors.PriorityError("m", param="p", code="c"), grpc.StatusCode.PERMISSION_DENIED, "invalid_request_error"),
    (errors.ModelNotFoundError("m"), grpc.StatusCode.NOT_FOUND, "invalid_request_error"),
    (errors.OverloadedError("m", retry_after=1), grpc.StatusCode.RESOURCE_EXHAUSTED, "requests"),
    (errors.TokensExceededError("m", retry_after=1), grpc.StatusCode.RESOURCE_EXHAUSTED, "tokens"),
    (errors.DeadlineError("m"), grpc.StatusCode.DEADLINE_EXCEEDED, "server_error"),
    (errors.UnavailableError("m"), grpc.StatusCode.UNAVAILABLE, "server_error"),
    (errors.DeadlineError("m"), grpc.StatusCode.DEADLINE_EXCEEDED, "server_error"),
    (errors.SlowReaderError("m"), grpc.StatusCode.ABORTED, "server_error"),
]


@pytest.mark.parametrize(("error", "code", "kind"), TABLE)
def test_expected_errors(error, code, kind):
    """Each has its status and OpenAI's type, and its message, param and code reach the caller."""
    found, message = status_of(error, "id")
    assert (found, message.type, message.message) == (code, kind, "m")
    assert (message.param, message.code) == (error.param or "", error.code or "")
    assert message.HasField("param") == (error.param is not None)
    assert message.HasField("no_param") == (error.param is None)
    assert message.HasField("no_code") == (error.code is None)


def test_every_service_error_is_in_the_table():
    """A new kind of error cannot be forgotten."""
    kinds = set(errors.ServiceError.__subclasses__())
    kinds |= {deeper for kind in kinds for deeper in kind.__subclasses__()}
    assert {type(error) for error, _, _ in TABLE} == kinds


@pytest.mark.parametrize("error", [ValueError("/secret/path"), errors.EngineFaultError("secret"), KeyError("secret")])
def test_other_errors_say_nothing_of_themselves(error):
    """The caller reads a constant text and the request id."""
    code, message = status_of(error, "id-1")
    assert code is grpc.StatusCode.INTERNAL
    assert "secret" not in message.message
    assert "id-1" in message.message


def test_detail_holds_the_whole_error():
    """The status proto repeats code and message, and carries the typed error."""
    error = errors.InvalidRequestError("Schön.", param="n")
    code, message = status_of(error, "id")
    metadata = dict(trailing_metadata(code, message, error))
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    detail = pb.ErrorResponse()
    assert status.details[0].Unpack(detail)
    assert (status.code, status.message, detail.error) == (3, "Schön.", message)
    assert "retry-after" not in metadata


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"), [(0.2, "1", "200"), (2.4, "3", "2400"), (2.00001, "3", "2001")]
)
def test_overload_says_when_to_come_back(seconds, whole, milliseconds):
    """In whole seconds and in milliseconds, both rounded up, also as gRPC's own retries read it."""
    error = errors.OverloadedError("m", retry_after=seconds)
    metadata = dict(trailing_metadata(*status_of(error, "id"), error))
    assert (metadata["retry-after"], metadata["retry-after-ms"]) == (whole, milliseconds)
    assert metadata["grpc-retry-pushback-ms"] == milliseconds


def test_missing_key_says_how_to_authenticate():
    """As HTTP wants it of a 401."""
    error = errors.AuthenticationError("m")
    assert dict(trailing_metadata(*status_of(error, "id"), error))["www-authenticate"] == "Bearer"
