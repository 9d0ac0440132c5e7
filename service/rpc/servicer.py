"""The RPCs: parse, submit, and put the pieces into messages."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.api import httpbody_pb2

from service.engine.engine import Engine
from service.engine.generation import Generation
from service.errors import DeadlineError, ForbiddenModelError, InvalidRequestError, ModelNotFoundError
from service.manifest import Manifest
from service.rpc import bounds, render
from service.rpc.calls import Call, Context, answer_headers, current_call, current_caller
from service.rpc.checks import shown
from service.rpc.interceptors import failure
from service.rpc.keys import pseudonym
from service.rpc.parse import Limits, parse
from service.rpc.quota import Meter
from service.rpc.sizes import answer_bytes
from service.rpc.workers import Workers
from service.telemetry.observer import Usage
from service.text.tokenizer import Tokenizer
from service.types import Delta, FinishReason, Request

# The word of the end must be on its way before the deadline: then gRPC, or Envoy, cuts the call off.
_LAST_WORDS_SECONDS = 0.5
# A stream of events that has nothing to say for so long says that: proxies close what is silent for a minute.
_SILENCE_SECONDS = 15.0
# What is made of fewer bytes, or of a piece of fewer scored tokens, takes the event loop no longer than others' calls.
_LARGE_ANSWER = 256 << 10
_MANY_TOKENS = 512

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that answers requests. `aliases` are its names besides its id; its manifest's if they are not given."""

    manifest: Manifest
    tokenizer: Tokenizer
    engine: Engine
    limits: Limits
    aliases: tuple[str, ...] | None = None

    @property
    def id(self) -> str:
        """What logs, metrics and traces call it."""
        return self.manifest.id

    @property
    def names(self) -> tuple[str, ...]:
        """Its id and its aliases."""
        return (self.id, *(self.manifest.aliases if self.aliases is None else self.aliases))


class CompletionServicer(completion_pb2_grpc.CompletionServiceServicer):
    """Implements completion.v1.CompletionService over served models, by id and alias."""

    def __init__(
        self, models: Iterable[ServedModel], workers: Workers, meter: Meter, longest_request: float = math.inf
    ) -> None:
        """No two models have a name in common. `workers` tokenize; `meter` holds callers to their quotas.

        `longest_request` seconds after it has come, a request is ended.
        """
        self._models = {name: model for model in models for name in model.names}
        self._longest_request = longest_request
        self._workers = workers
        self._meter = meter

    async def CreateCompletion(  # noqa: N802, the contract's name
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> pb.CreateCompletionResponse:
        if request.stream:
            message = "CreateCompletion answers once: call StreamCompletion to stream."
            raise InvalidRequestError(message, param="stream", code="invalid_value")
        return await self._whole(request, self._deadline(context))

    async def StreamCompletion(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> AsyncIterator[pb.CreateCompletionResponse]:
        deadline = self._deadline(context)
        if request.HasField("stream") and not request.stream:
            yield await self._whole(request, deadline)
            return
        model, parsed = await self._parse(request, deadline, streaming=True)
        pieces = render.Pieces(parsed)
        with self._submitted(model, parsed, deadline) as generation:
            async for delta in generation:
                yield await self._made(partial(pieces.message, delta), len(delta.tokens) > _MANY_TOKENS)
        if parsed.include_usage:
            yield pieces.usage_message()

    async def StreamCompletionEvents(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        deadline = self._deadline(context, events=True)
        if not request.stream:
            answer = await self._whole(request, deadline)
            large = answer.ByteSize() > _LARGE_ANSWER
            body = await self._made(lambda: render.to_bytes(render.response_json(answer, usage_key=True)), large)
            yield httpbody_pb2.HttpBody(content_type="application/json", data=body)
            return
        model, parsed = await self._parse(request, deadline, streaming=True)
        with self._submitted(model, parsed, deadline) as generation:
            pieces = generation.pieces(_SILENCE_SECONDS, since=current_call.get().began)
            async for event in self._events(parsed, pieces):
                yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=event)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        caller = current_caller.get()
        data = [_describe(name, model) for name, model in self._models.items() if caller.may_use(*model.names)]
        return pb.ListModelsResponse(object="list", data=data)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802
        return _describe(request.model, self._find(request.model))

    def _deadline(self, context: Context, *, events: bool = False) -> _Deadline:
        return _Deadline(context, self._longest_request, events=events)

    async def _whole(self, request: pb.CreateCompletionRequest, deadline: _Deadline) -> pb.CreateCompletionResponse:
        model, parsed = await self._parse(request, deadline, streaming=False)
        size = answer_bytes(parsed)
        current_call.get().hold(size)
        answer = render.Answer(parsed)
        with self._submitted(model, parsed, deadline) as generation:
            async for delta in generation:
                answer.add(delta)
        return await self._made(answer.response, size > _LARGE_ANSWER)

    async def _made(self, make: Callable[[], _Made], large: bool) -> _Made:
        """What `make` makes; where that takes long, off the event loop and in its caller's turn."""
        return await self._workers.run(current_caller.get().identity, make) if large else make()

    async def _events(self, request: Request, deltas: AsyncIterator[Delta | None]) -> AsyncIterator[bytes]:
        """A stream's events, and a comment where there is no piece.

        Once something is sent, HTTP shows a later failure only as an event: the stream ends with it.
        """
        pieces = render.Pieces(request)
        begun = False
        try:
            async for delta in deltas:
                if delta is None:
                    yield render.WAITING_COMMENT
                    begun = True
                    continue
                message = await self._made(partial(pieces.message, delta), len(delta.tokens) > _MANY_TOKENS)
                event = partial(render.event, message, usage_key=request.include_usage)
                yield await self._made(event, len(delta.tokens) > _MANY_TOKENS)
                begun = True
            if request.include_usage:
                yield render.event(pieces.usage_message(), usage_key=True)
            yield render.DONE_EVENT
        except Exception as error:
            if not begun:
                raise
            yield render.error_event(failure(error))

    async def _parse(
        self, request: pb.CreateCompletionRequest, deadline: _Deadline, *, streaming: bool
    ) -> tuple[ServedModel, Request]:
        """The model and the valid request; tokenizing happens off the event loop, and only if the request may queue."""
        if not request.model:
            bounds.check(request)  # raises: the contract requires a model
        model = self._find(request.model)
        if request.user:
            current_call.get().notes["user"] = pseudonym(request.user)
        caller = current_caller.get()
        identity = caller.identity
        model.engine.check(identity, deadline.left)
        parsed = await self._workers.run(
            identity,
            lambda: parse(
                request, model.manifest, model.tokenizer, model.limits, identity=identity, streaming=streaming
            ),
        )
        return model, parsed

    @contextmanager
    def _submitted(self, model: ServedModel, request: Request, deadline: _Deadline) -> Iterator[Generation]:
        """A request in the engine, charged to its caller: with all that it may use, in the end with what it used."""
        caller = current_caller.get()
        sequences = len(request.prompts) * request.best_of
        prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        charged = prompt_tokens + sequences * request.max_tokens
        try:
            self._meter.take(caller.identity, caller.quota, charged, sequences)
        finally:
            answer_headers.get()[:] = self._meter.headers(caller.identity, caller.quota)
        used = 0
        try:
            with model.engine.submit(request, deadline.left) as generation:
                call = current_call.get()
                usage = call.usage = _usage(request, model.id, sequences, prompt_tokens)
                call.generates(generation)
                try:
                    with deadline.ending(generation):
                        yield generation
                finally:
                    call.generates(None)
                    used = prompt_tokens + generation.completion_tokens
                    _fill(usage, generation, call)
        finally:
            self._meter.give_back(caller.identity, charged - used, sequences)

    def _find(self, name: str) -> ServedModel:
        """The model of this name. One that the caller's key may not use is to its caller as one that does not exist."""
        message = f"The model `{shown(name)}` does not exist or you do not have access to it."
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(message, code="model_not_found")
        current_call.get().model = model.id
        if not current_caller.get().may_use(*model.names):
            raise ForbiddenModelError(message, code="model_not_found")
        return model


def _usage(request: Request, model: str, sequences: int, prompt_tokens: int) -> Usage:
    return Usage(
        id=request.id,
        model=model,
        max_tokens=request.max_tokens,
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        n=request.n,
        sequences=sequences,
        prompt_tokens=prompt_tokens,
    )


def _fill(usage: Usage, generation: Generation, call: Call) -> None:
    """Notes what a generation came to."""
    usage.cached_tokens = generation.cached_tokens
    usage.completion_tokens = generation.completion_tokens
    usage.longest = generation.longest
    usage.stopped = generation.finished[FinishReason.STOP]
    usage.cut_off = generation.finished[FinishReason.LENGTH]
    usage.queued_seconds = generation.queued_at - call.began
    if generation.started_at is not None:
        usage.started_seconds = generation.started_at - call.began
    if generation.first_piece_at is not None:
        usage.first_token_seconds = generation.first_piece_at - call.began


class _Deadline:
    """Until when a call is to be answered, on the monotonic clock: gRPC tells it by the wall clock."""

    def __init__(self, context: Context, longest: float, *, events: bool) -> None:
        """No call takes longer than `longest` seconds; of one that answers by `events` these have to say its end."""
        left = context.time_remaining()
        self._at = None if left is None else time.monotonic() + left
        self._longest = longest
        self._longest_at = current_call.get().began + longest
        self._events = events

    @property
    def left(self) -> float | None:
        """Seconds left of the caller's own deadline, None where there is none: the longest request refuses nothing."""
        return None if self._at is None else self._at - time.monotonic()

    @contextmanager
    def ending(self, generation: Generation) -> Iterator[None]:
        """Has a generation fail just before the call has taken too long; gRPC itself keeps its callers' deadlines."""
        ends = [(self._longest_at, f"The request took longer than {self._longest:g} seconds, the longest it may.")]
        if self._at is not None and self._events:
            ends.append((self._at, "The request took longer than it may."))
        at, message = min(ends)
        if math.isinf(at):
            yield
            return
        seconds = max(0.0, at - _LAST_WORDS_SECONDS - time.monotonic())
        timer = asyncio.get_running_loop().call_later(seconds, generation.fail, DeadlineError(message))
        try:
            yield
        finally:
            timer.cancel()


def _describe(name: str, model: ServedModel) -> pb.Model:
    return pb.Model(
        id=name,
        object="model",
        created=model.manifest.created,
        owned_by=model.manifest.owned_by,
        max_model_len=model.limits.context_length,
    )
