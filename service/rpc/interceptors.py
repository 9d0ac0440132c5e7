"""What every call passes through: its request id, the caller's key, and the one place that turns errors to statuses."""

from __future__ import annotations

import contextvars
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from completion.v1 import completion_pb2 as pb

from service import telemetry
from service.errors import EngineFaultError, InvalidRequestError, ServiceError
from service.observer import Ended, Method, Observer, Usage
from service.rpc.keys import Caller, KeyRing
from service.rpc.outcome import outcome_of
from service.rpc.status import status_of, trailing_metadata

_log = telemetry.get_logger(__name__)
_REQUEST_ID = re.compile(r"^[A-Za-z0-9_.:-]{1,128}$")
_CLIENT_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,512}")

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller")
current_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_request_id")
# What goes with the answer besides: sent before its first message, or with the error.
answer_headers: contextvars.ContextVar[list[tuple[str, str]]] = contextvars.ContextVar("answer_headers")


_CLOCKS_DIFFER_SECONDS = 0.25
_TRACE = ("traceparent", "tracestate")
_COMPLETIONS = frozenset({"CreateCompletion", "StreamCompletion", "StreamCompletionEvents"})


@dataclass(slots=True)
class Call:
    """What becomes known of a call while it goes on; `began` is on the monotonic clock.

    `trace` are the caller's traceparent and tracestate. `model` is the id of the served model that it asks for. `notes`
    go into its line in the log: never content, keys, or names in clear. `usage` is what a completion request came to,
    once the engine has taken it; `error` is what ended the call, also where gRPC cannot show it any more.
    """

    began: float
    request_id: str
    trace: dict[str, str]
    notes: dict[str, str] = field(default_factory=dict)
    model: str = ""
    usage: Usage | None = None
    error: Exception | None = None


current_call: contextvars.ContextVar[Call] = contextvars.ContextVar("current_call")


class _Malformed:
    """Stands for a request that could not be decoded."""


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates calls and reports their failures and ends; every RPC but health passes through it."""

    def __init__(self, keys: KeyRing, *observers: Observer) -> None:
        self._keys = keys
        self._observers = observers

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith("/grpc.health.v1.Health/"):
            return handler
        return self._guarded(handler, _method(handler_call_details.method, handler))

    def _guarded(self, handler: Any, method: Method) -> Handler:
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
    async def _call(self, method: Method, context: Context) -> AsyncIterator[None]:
        """Surrounds a call: sets its request id and caller, reports its end, and aborts it with the error's status."""
        for observer in self._observers:
            observer.call_began(method)
        began = time.monotonic()
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        request_id = _request_id(metadata.get("x-request-id"))
        trace = {name: metadata[name] for name in _TRACE if name in metadata}
        call = Call(began, request_id, trace)
        current_call.set(call)
        current_request_id.set(request_id)
        headers: list[tuple[str, str]] = []
        answer_headers.set(headers)
        identifiers = [("x-request-id", request_id)]
        name, finished = "", False
        try:
            if client_id := _client_request_id(metadata.get("x-client-request-id")):
                identifiers.append(("x-client-request-id", client_id))
                call.notes["client_request_id"] = client_id
            context.set_trailing_metadata(tuple(identifiers))
            caller = self._keys.authenticate(_authorization(context))
            current_caller.set(caller)
            name = caller.name
            yield
            finished = True
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            code, message = _explain(error)
            metadata_out = (*identifiers, *headers, *trailing_metadata(code, message, error))
            await context.abort(code, message.message, metadata_out)
        finally:
            self._report(method, call, name, finished=finished, late=_late(context))

    def _report(self, method: Method, call: Call, caller: str, *, finished: bool, late: bool) -> None:
        """Tells observers and log of a call's end; `late` if its deadline had passed."""
        seconds = time.monotonic() - call.began
        code = grpc.StatusCode.OK if finished else _left(late)
        unexpected = False
        if call.error is not None:
            code = status_of(call.error, call.request_id)[0]
            unexpected = not isinstance(call.error, ServiceError | EngineFaultError)
        fields: dict[str, object] = {"method": f"/{method.service}/{method.name}", "code": code.name, "caller": caller}
        fields["request_id"] = call.request_id
        ended = None
        if method.name in _COMPLETIONS:
            begun = call.usage is not None
            outcome, refusal = outcome_of(call.error, begun=begun, finished=finished, late=late)
            status = code.value[0]
            ended = Ended(
                method, call.request_id, outcome, refusal, status, seconds, call.usage, call.trace, call.model
            )
            fields |= _summary(ended)
        for observer in self._observers:
            observer.call_ended(method, code.name, seconds)
            if unexpected:
                observer.failed_unexpectedly()
            if ended is not None:
                observer.request_ended(ended)
        _log.info("call", **fields, seconds=round(seconds, 4), **call.notes)


def _summary(ended: Ended) -> dict[str, object]:
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


def _left(late: bool) -> grpc.StatusCode:
    """The status of a call that ended without an answer or an error."""
    return grpc.StatusCode.DEADLINE_EXCEEDED if late else grpc.StatusCode.CANCELLED


def _late(context: Context) -> bool:
    """Whether the deadline has passed: by the caller's clock, on which it cancels, that is a little earlier."""
    left = context.time_remaining()
    return left is not None and left <= _CLOCKS_DIFFER_SECONDS


def _method(path: str, handler: Any) -> Method:
    """The method of a path, /package.Service/Name."""
    service, _, name = path.removeprefix("/").rpartition("/")
    requests, responses = handler.request_streaming, handler.response_streaming
    kinds = {(False, False): "unary", (True, False): "client_stream", (False, True): "server_stream"}
    return Method(service, name, kinds.get((requests, responses), "bidi_stream"))


async def _send_headers(context: Context) -> None:
    """Sends the answer's headers, once: Envoy calls another replica only as long as there are none."""
    headers = answer_headers.get()
    if headers:
        await context.send_initial_metadata(tuple(headers))
        headers.clear()


def _request_id(given: str | None) -> str:
    return given if given and _REQUEST_ID.match(given) else str(uuid.uuid4())


def _client_request_id(given: str | None) -> str | None:
    """The caller's own name for its request, which comes back; InvalidRequestError where it could not."""
    if given and not _CLIENT_REQUEST_ID.fullmatch(given):
        message = "Invalid x-client-request-id: it may have at most 512 characters, all of them ASCII."
        raise InvalidRequestError(message)
    return given or None


def _authorization(context: Context) -> str | None:
    """The header of this name; of several all, as HTTP joins them."""
    given = [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]
    return ",".join(given) if given else None


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
    """What to tell the caller of a failure after the answer has begun, of which gRPC itself shows nothing."""
    return _explain(error)[1]


def _explain(error: Exception) -> tuple[grpc.StatusCode, pb.Error]:
    """The status and the error to send for an exception, which ends the call; one that is not expected is logged."""
    current_call.get().error = error
    request_id = current_request_id.get()
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error, request_id=request_id)
    return status_of(error, request_id)
