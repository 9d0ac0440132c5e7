"""Every call passes through here: it gets its request id, its key is checked, and its error becomes a status."""

from __future__ import annotations

import asyncio
import inspect
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing, asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import grpc
from completion.v1 import completion_pb2 as pb
from grpc_health.v1 import health_pb2

from service.errors import EngineFaultError, InvalidRequestError, ServiceError, SlowReaderError
from service.rpc import tasks, wire
from service.rpc.calls import Context, RpcCall, current_call
from service.rpc.keys import UNAUTHENTICATED, KeyRing
from service.rpc.quota import Meter
from service.rpc.running import Running
from service.rpc.status import outcome_of, status_of, summary, trailing_metadata
from service.rpc.workers import Workers
from service.telemetry.log import get_logger
from service.telemetry.observer import Ended, Method, Observer

_log = get_logger(__name__)
_REQUEST_ID = re.compile(r"^[A-Za-z0-9_.:-]{1,128}$")
_CLIENT_REQUEST_ID = re.compile(r"[\x20-\x7e]{1,512}")

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Error = TypeVar("_Error", bound=BaseException)

# Characters of metadata that name fields.
_MOST_IGNORED = 1024
_CLOCKS_DIFFER_SECONDS = 0.25
_TRACE = ("traceparent", "tracestate")
_COMPLETIONS = frozenset({"CreateCompletion", "StreamCompletion", "StreamCompletionEvents"})
# The health service needs no key, and its calls are not logged.
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Authenticates calls, reads their requests, and reports their failures and ends; every RPC passes through it.

    Every method is registered with gRPC as a streaming one, so that no message is read, decompressed or parsed before
    the caller is authenticated. `workers` parse large messages. A caller that reads nothing for `send_timeout` seconds
    gets the call's error; if it does not read that within `last_word` seconds, its connection is closed. Fields that
    the contract does not have are refused, or with `ignore_unknown` named in the answer's metadata.
    """

    def __init__(
        self,
        keys: KeyRing,
        workers: Workers,
        meter: Meter,
        running: Running,
        *observers: Observer,
        send_timeout: float = 60.0,
        last_word: float = 60.0,
        ignore_unknown: bool = False,
    ) -> None:
        self._keys = keys
        self._workers = workers
        self._meter = meter
        self._running = running
        self._observers = observers
        self._send_timeout = send_timeout
        self._last_word = last_word
        self._ignore_unknown = ignore_unknown

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        handler = await continuation(handler_call_details)
        return handler and self._guarded(handler, _method(handler_call_details.method, handler))

    def _guarded(self, handler: Any, method: Method) -> Handler:
        inner = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream

        async def answer(messages: AsyncIterator[bytes], context: Context) -> None:
            async with self._call(method, context) as call:
                if handler.request_streaming:
                    request: Any = self._parsed(messages, handler.request_deserializer)
                else:
                    request = await self._parse(await _only(context), handler.request_deserializer)
                if not inspect.isasyncgenfunction(inner):
                    await self._send(await inner(request, context), call, context)
                    return
                async with aclosing(inner(request, context)) as answers:
                    async for message in answers:
                        await self._send(message, call, context)

        async def behaviour(messages: AsyncIterator[bytes], context: Context) -> None:
            try:
                await answer(messages, context)
            except (grpc.aio.AbortError, asyncio.CancelledError) as end:
                raise _without_frames(end) from None
            finally:
                del messages, context

        guarded: Handler = grpc.stream_stream_rpc_method_handler(behaviour, None, handler.response_serializer)
        return guarded

    async def _parsed(self, messages: AsyncIterator[bytes], deserialize: Any) -> AsyncIterator[Any]:
        async for data in messages:
            yield await self._parse(data, deserialize)

    async def _parse(self, data: bytes, deserialize: Any) -> Any:
        """The request in a message; a large one is parsed off the event loop, in its caller's turn."""
        call = current_call.get()
        if len(data) <= wire.LARGE:
            message, unknown = wire.parse(deserialize, data)
        elif call.caller is UNAUTHENTICATED:
            raise InvalidRequestError(f"The request has {len(data)} bytes, and may have {wire.LARGE}.")
        else:
            message, unknown = await self._workers.run(call.caller.identity, lambda: wire.parse(deserialize, data))
        if not self._ignore_unknown:
            wire.refuse_unknown(unknown)
        elif unknown:
            call.ignored = (("x-ignored-parameters", ", ".join(unknown)[:_MOST_IGNORED]),)
        return message

    async def _send(self, message: Any, call: RpcCall, context: Context) -> None:
        """Sends a message, and before the first one the answer's headers: until then Envoy may ask another replica."""
        try:
            async with asyncio.timeout(self._send_timeout):
                if headers := (*call.ignored, *call.headers):
                    await context.send_initial_metadata(headers)
                    call.headers = call.ignored = ()
                await context.write(message)
        except TimeoutError:
            call.stalled = True
            error = SlowReaderError("The answer was not read fast enough, and was given up.")
            call.end(error)
            raise error from None
        except grpc.aio.InternalError:  # the caller has left
            raise asyncio.CancelledError from None

    @asynccontextmanager
    async def _call(self, method: Method, context: Context) -> AsyncIterator[RpcCall]:
        """Surrounds a call: sets its request id and caller, reports its end, and aborts it with the error's status."""
        public = method.service == _HEALTH
        observers = () if public else self._observers
        for observer in observers:
            observer.call_began(method)
        metadata = [(key, value) for key, value in context.invocation_metadata() or () if isinstance(value, str)]
        call = _begin(dict(metadata))
        context.set_trailing_metadata(call.identifiers)
        finished = False
        with ExitStack() as held:
            try:
                if not public:
                    self._admit(call, metadata, held)
                    context.set_trailing_metadata(call.identifiers)
                held.enter_context(self._running.lasting(method))
                yield call
                context.set_trailing_metadata(call.identifiers)
                finished = True
            except grpc.aio.AbortError:
                raise
            except Exception as error:
                await self._refuse(error, call, context)
            finally:
                if not public:
                    self._report(method, call, finished=finished, late=_late(context))

    async def _refuse(self, error: Exception, call: RpcCall, context: Context) -> None:
        """Ends a call with its error's status, or without one if the caller has left."""
        code, message = explain(error)
        _without_frames(error)
        metadata = (*call.identifiers, *call.ignored, *call.headers, *trailing_metadata(code, message, error))
        if call.stalled:
            tasks.cut_off_in(self._last_word)
        try:
            await context.abort(code, message.message, metadata)
        except grpc.aio.InternalError:  # the caller has left
            raise asyncio.CancelledError from None

    def _admit(self, call: RpcCall, metadata: Sequence[tuple[str, str]], held: ExitStack) -> None:
        """Authenticates the caller, and counts the call. Raises the error that refuses the call.

        It also records the caller's own id of its request, which the answer returns.
        """
        client_id = dict(metadata).get("x-client-request-id")
        if client_id:
            if not _CLIENT_REQUEST_ID.fullmatch(client_id):
                message = "Invalid x-client-request-id: it may have at most 512 characters, all of them ASCII."
                raise InvalidRequestError(message, code="invalid_header")
            call.identifiers += (("x-client-request-id", client_id),)
            call.notes["client_request_id"] = client_id
        # A header that comes twice is one with a comma, as HTTP has it.
        values = [value for key, value in metadata if key == "authorization"]
        caller = self._keys.authenticate(",".join(values) if values else None)
        call.caller = caller
        held.enter_context(self._running.admitted(caller.identity, call))
        try:
            self._meter.request(caller.key, caller.quota)
        finally:
            call.headers = self._meter.headers(caller.key, caller.quota)

    def _report(self, method: Method, call: RpcCall, *, finished: bool, late: bool) -> None:
        """Reports a call's end to the observers and the log; `late` if its deadline had passed."""
        seconds = time.monotonic() - call.began
        begun = call.usage is not None
        code, outcome, refusal = outcome_of(call.error, begun=begun, finished=finished, late=late)
        unexpected = not isinstance(call.error, ServiceError | EngineFaultError | None)
        fields: dict[str, object] = {"method": f"/{method.service}/{method.name}", "code": code.name}
        fields |= {"caller": call.caller.name, "request_id": call.request_id}
        ended = None
        if method.name in _COMPLETIONS:
            status = code.value[0]
            ended = Ended(
                method, call.request_id, outcome, refusal, status, seconds, call.usage, call.trace, call.model
            )
            fields |= summary(ended)
        for observer in self._observers:
            observer.call_ended(method, code.name, seconds)
            if unexpected:
                observer.failed_unexpectedly()
            if ended is not None:
                observer.request_ended(ended)
        _log.info("call", **fields, seconds=round(seconds, 4), **call.notes)


def _begin(metadata: dict[str, str]) -> RpcCall:
    """A call that begins now, set as the current one."""
    proposed = metadata.get("x-request-id", "")
    request_id = proposed if _REQUEST_ID.match(proposed) else str(uuid.uuid4())
    trace = {name: metadata[name] for name in _TRACE if name in metadata}
    call = RpcCall(time.monotonic(), request_id, trace, (("x-request-id", request_id),))
    current_call.set(call)
    return call


def _without_frames(error: _Error) -> _Error:
    """Removes an error's frames, which hold the call, which holds the error: a cycle for the garbage collector."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


async def _only(context: Context) -> bytes:
    """The one message of a call that sends one."""
    data: bytes | object = await context.read()
    if not isinstance(data, bytes):
        raise InvalidRequestError("The call has no request message.")
    return data


def _late(context: Context) -> bool:
    """Whether the deadline has passed. The caller cancels by its own clock, which may be slightly ahead of ours."""
    left = context.time_remaining()
    return left is not None and left <= _CLOCKS_DIFFER_SECONDS


def _method(path: str, handler: Any) -> Method:
    """The method of a path, /package.Service/Name."""
    service, _, name = path.removeprefix("/").rpartition("/")
    requests, responses = handler.request_streaming, handler.response_streaming
    kinds = {(False, False): "unary", (True, False): "client_stream", (False, True): "server_stream"}
    return Method(service, name, kinds.get((requests, responses), "bidi_stream"))


def explain(error: Exception) -> tuple[grpc.StatusCode, pb.Error]:
    """The status and the error to send for an exception, which ends the call; an unexpected one is logged."""
    call = current_call.get()
    call.error = error
    if not isinstance(error, ServiceError):
        _log.error("call failed", exc_info=error, request_id=call.request_id)
    return status_of(error, call.request_id)
