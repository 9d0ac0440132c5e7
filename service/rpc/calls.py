"""What is known of a call while it goes on, where whoever works for it finds it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc

from service.engine.generation import Generation
from service.rpc.keys import Caller
from service.telemetry.observer import Usage

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


@dataclass(eq=False, slots=True)
class Call:
    """A call; `began` is on the monotonic clock, `identifiers` are what its answer is told apart by.

    `trace` are the caller's traceparent and tracestate. `caller` is the name of its key, `model` the id of the served
    model that it asks for. `notes` go into its line in the log: never content, keys, or names in clear. `usage` is what
    a completion request came to, once the engine has taken it; `error` is what ended the call, also where gRPC cannot
    show it any more. `hold` counts bytes of an answer that is kept whole until it is sent; it raises OverloadedError.
    """

    began: float
    request_id: str
    trace: dict[str, str]
    identifiers: tuple[tuple[str, str], ...] = ()
    notes: dict[str, str] = field(default_factory=dict)
    caller: str = ""
    model: str = ""
    usage: Usage | None = None
    error: Exception | None = None
    stalled: bool = False
    hold: Callable[[int], None] = lambda _: None
    _generation: Generation | None = None
    _ended_by: Exception | None = None

    def generates(self, generation: Generation | None) -> None:
        """From now on the call is about this generation, or about none any more."""
        self._generation = generation
        if generation is not None and self._ended_by is not None:
            generation.end(self._ended_by)

    def end(self, error: Exception) -> None:
        """Ends the call's generation with `error`, now or as soon as it has one."""
        self._ended_by = error
        if self._generation is not None:
            self._generation.end(error)


current_call: contextvars.ContextVar[Call] = contextvars.ContextVar("current_call")
current_caller: contextvars.ContextVar[Caller] = contextvars.ContextVar("current_caller")
current_request_id: contextvars.ContextVar[str] = contextvars.ContextVar("current_request_id")
# What goes with the answer besides: sent before its first message, or with the error.
answer_headers: contextvars.ContextVar[list[tuple[str, str]]] = contextvars.ContextVar("answer_headers")
