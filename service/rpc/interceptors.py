"""What every call passes through: its request id, the caller's key, and the one place that turns errors to statuses."""

from __future__ import annotations

import contextvars
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias

import grpc
from completion.v1 import completion_pb2 as pb

from service.errors import InvalidRequestError, ServiceError
from service.rpc.keys import Caller, KeyRing
from service.rpc.status import status_of, trailing_metadata

_log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"^[A-Za-z0-9_.:-]{1,128}$")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller")
current_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_request_id")
# What the call's line in the log says besides: never content, keys, or names in clear.
call_notes: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("call_notes")
# What goes with the answer besides: sent before its first message, or with the error.
answer_headers: contextvars.ContextVar[list[tuple[str, str]]] = contextvars.ContextVar("answer_headers")


class _Malformed:
    """Stands for a request that could not be decoded."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates calls and reports their failures; every RPC but health passes through it."""

    def __init__(self, keys: KeyRing) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc.health.v1.Health/"):
            return handler
        return self._guarded(handler, handler_call_details.method)

    def _guarded(self, handler: Any, method: str) -> Handler:
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def unary(request: Any, context: Context) -> Any:
            async with self._call(method, context):
                _check_decoded(request)
                answer = await inner(request, context)
                await _send_headers(context)
                return answer

        async def stream(request: Any, context: Context) -> AsyncIterator[Any]:
            async with self._call(method, context):
                if handler.request_streaming:
                    request = _decoded(request)
                else:
                    _check_decoded(request)
                async with aclosing(inner(request, context)) as messages:
                    async for message in messages:
                        await _send_headers(context)
                        yield message

        request_kind = "stream" if handler.request_streaming else "unary"
        response_kind = "stream" if handler.response_streaming else "unary"
        make = getattr(grpc, f"{request_kind}_{response_kind}_rpc_method_handler")
        behaviour = stream if handler.response_streaming else unary
        guarded: Handler = make(behaviour, _tolerant(handler.request_deserializer), handler.response_serializer)
        return guarded

    @asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[None]:
        """Surrounds a call: sets its request id and caller, logs its end, and aborts it with the error's status."""
        started = time.monotonic()
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = _request_id(metadata.get("x-request-id"))
        current_request_id.set(request_id)
        notes: dict[str, str] = {}
        call_notes.set(notes)
        headers: list[tuple[str, str]] = []
        answer_headers.set(headers)
        context.set_trailing_metadata((("x-request-id", request_id),))
        name, code = "", grpc.StatusCode.CANCELLED
        try:
            caller = self._keys.authenticate(metadata.get("authorization"))
            current_caller.set(caller)
            name = caller.name
            yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code, message = _explain(error)
            metadata_out = (("x-request-id", request_id), *headers, *trailing_metadata(code, message, error))
            await context.abort(code, message.message, metadata_out)
        finally:
            fields = {
                "method": method,
                "code": code.name,
                "caller": name,
                "request_id": request_id,
                "seconds": round(time.monotonic() - started, 4),
                **notes,
            }
            _log.info("call", extra={"fields": fields})


async def _send_headers(context: Context) -> None:
    """Sends the answer's headers, once: Envoy calls another replica only as long as there are none."""
    headers = answer_headers.get()
    if headers:
        await context.send_initial_metadata(tuple(headers))
        headers.clear()


def _request_id(given: str | None) -> str:
    return given if given and _REQUEST_ID.match(given) else str(uuid.uuid4())


def _check_decoded(request: Any) -> None:
    if isinstance(request, _Malformed):
        raise InvalidRequestError("The request is not a valid protobuf message of the method's type.")


async def _decoded(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        _check_decoded(request)
        yield request


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """A deserializer whose failures reach the call as _Malformed: gRPC itself would answer UNKNOWN with the details."""
    if deserialize is None:
        return None

    def decode(data: bytes) -> Any:
        try:
            return deserialize(data)
        except Exception:
            return _Malformed()

    return decode


def failure(error: Exception) -> pb.Error:
    """What to tell the caller of a failure after the answer has begun; the call's line in the log names its status."""
    code, message = _explain(error)
    call_notes.get()["code"] = code.name  # in place of the call's own, which ends well as far as gRPC can see
    return message


def _explain(error: Exception) -> tuple[grpc.StatusCode, pb.Error]:
    """The status and the error to send for an exception; one that is not expected is logged."""
    request_id = current_request_id.get()
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error, extra={"fields": {"request_id": request_id}})
    return status_of(error, request_id)
