"""The state of the current call, available to all code that works on it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from service.engine.generation import Generation
from service.rpc.keys import UNAUTHENTICATED, Caller
from service.rpc.quota import Headers
from service.telemetry.observer import Usage

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(eq=False, slots=True)
class RpcCall:
    """A call; `began` is on the monotonic clock, `identifiers` are the metadata that identify its answer.

    `trace` are the caller's traceparent and tracestate. `caller` may use no model until the call is authenticated;
    `model` is the id of the requested model. `headers` are sent before the answer's first message, or with the error;
    so is `ignored`, which names the fields that the contract does not have.
    `notes` go into the call's line in the log: never content, keys, or names in clear. `usage` are the counts of a
    completion request that has ended, if the engine had accepted it; `error` is what ended the call, even if gRPC can
    no longer send it; `stalled` says that the caller did not read.
    `hold` counts bytes of an answer that is kept whole until it is sent; it raises OverloadedError.
    """

    began: float
    request_id: str
    trace: dict[str, str]
    identifiers: tuple[tuple[str, str], ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    caller: Caller = UNAUTHENTICATED
    headers: Headers = ()
    ignored: Headers = ()
    model: str = ""
    usage: Usage | None = None
    error: Exception | None = None
    stalled: bool = False
    hold: Callable[[int], None] = lambda _: None
    _generation: Generation | None = None
    _ended_by: Exception | None = None  # by `end`, for a generation that comes later

    def generates(self, generation: Generation | None) -> None:
        """Sets the generation that `end` ends, None once it is over."""
        self._generation = generation
        if generation is not None and self._ended_by is not None:
            generation.end(self._ended_by)

    def end(self, error: Exception) -> None:
        """Ends the call's generation with `error`, now or as soon as it has one."""
        self._ended_by = error
        if self._generation is not None:
            self._generation.end(error)


current_call: contextvars.ContextVar[RpcCall] = contextvars.ContextVar("current_call")
