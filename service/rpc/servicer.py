"""The RPCs: parse, submit, and put the pieces into messages."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.api import httpbody_pb2
from google.protobuf.message import Message

from service.engine.engine import Engine
from service.engine.generation import Generation
from service.errors import ForbiddenModelError, InvalidRequestError, ModelNotFoundError
from service.manifest import Manifest
from service.rpc import render, tokenizing
from service.rpc.calls import Context, RpcCall, current_call
from service.rpc.checks import model_missing, shown
from service.rpc.deadline import Deadline
from service.rpc.interceptors import explain
from service.rpc.keys import pseudonym
from service.rpc.parse import Limits, parse
from service.rpc.quota import Meter
from service.rpc.sizes import answer_bytes
from service.rpc.usage import timing_metadata, timings_of, usage_of
from service.rpc.workers import Workers
from service.text.tokenizer import Tokenizer
from service.types import Request

# A stream of events without a piece for this long sends a comment: proxies close idle connections after a minute.
_SILENCE_SECONDS = 15.0
# Above either size, in bytes or in scored tokens of a piece, a message is built off the event loop.
_LARGE_ANSWER = 256 << 10
_MANY_TOKENS = 512

_Made = TypeVar("_Made")
_Answer = TypeVar("_Answer", bound=Message)
_Tokenizing = pb.TokenizeRequest | pb.DetokenizeRequest | pb.GetTokenizerRequest


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that answers requests. `aliases` are its names besides its id; its manifest's if they are not given.

    `fingerprint` identifies all that decides its answers. It is shown where a request asks for it, or `always`.
    """

    manifest: Manifest
    tokenizer: Tokenizer
    engine: Engine
    limits: Limits
    aliases: tuple[str, ...] | None = None
    chat_template: str | None = None
    fingerprint: str = ""
    always_fingerprint: bool = False

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
        return await self._whole(request, Deadline(context, self._longest_request))

    async def StreamCompletion(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> AsyncIterator[pb.CreateCompletionResponse]:
        deadline = Deadline(context, self._longest_request)
        if request.HasField("stream") and not request.stream:
            yield await self._whole(request, deadline)
            return
        model, parsed = await self._parse(request, deadline, streaming=True)
        pieces = render.Pieces(parsed, padded=parsed.obfuscate)
        with self._submitted(model, parsed, deadline) as generation:
            async for delta in generation:
                message = partial(pieces.message, delta, timings_of(parsed, generation))
                yield await self._made(message, len(delta.tokens) > _MANY_TOKENS)
            if parsed.include_usage:
                yield pieces.usage_message(timings_of(parsed, generation))

    async def StreamCompletionEvents(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> AsyncIterator[httpbody_pb2.HttpBody]:
        deadline = Deadline(context, self._longest_request, events=True)
        if not request.stream:
            answer = await self._whole(request, deadline)
            large = answer.ByteSize() > _LARGE_ANSWER
            body = await self._made(lambda: render.body(answer, render.Form.of(request)), large)
            yield httpbody_pb2.HttpBody(content_type="application/json", data=body)
            return
        model, parsed = await self._parse(request, deadline, streaming=True)
        with self._submitted(model, parsed, deadline) as generation:
            async for event in self._events(parsed, render.Form.of(request), generation):
                yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=event)

    async def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        caller = current_call.get().caller
        data = [_describe(name, model) for name, model in self._models.items() if caller.may_use(*model.names)]
        return pb.ListModelsResponse(object="list", data=data)

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.Model:  # noqa: N802
        return _describe(request.model, self._find(request.model))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:  # noqa: N802
        model = self._find_or_first(request)
        return await self._tokenized(lambda: tokenizing.tokenize(request, model.tokenizer, model.limits))

    async def Detokenize(  # noqa: N802
        self, request: pb.DetokenizeRequest, context: Context
    ) -> pb.DetokenizeResponse:
        model = self._find_or_first(request)
        return await self._tokenized(lambda: tokenizing.detokenize(request, model.tokenizer, model.limits))

    async def GetTokenizer(  # noqa: N802
        self, request: pb.GetTokenizerRequest, context: Context
    ) -> pb.GetTokenizerResponse:
        model = self._find_or_first(request)
        return tokenizing.describe(model.manifest, model.tokenizer, model.limits, model.chat_template)

    async def _tokenized(self, make: Callable[[], _Answer]) -> _Answer:
        """The answer of `make`, which runs off the event loop in its caller's turn."""
        answer = await self._made(make, large=True)
        current_call.get().hold(answer.ByteSize())
        return answer

    async def _whole(self, request: pb.CreateCompletionRequest, deadline: Deadline) -> pb.CreateCompletionResponse:
        model, parsed = await self._parse(request, deadline, streaming=False)
        size = answer_bytes(parsed)
        current_call.get().hold(size)
        answer = render.Answer(parsed)
        with self._submitted(model, parsed, deadline) as generation:
            async for delta in generation:
                answer.add(delta)
        return await self._made(lambda: answer.response(timings_of(parsed, generation)), size > _LARGE_ANSWER)

    async def _made(self, make: Callable[[], _Made], large: bool) -> _Made:
        """The result of `make`, which runs off the event loop in its caller's turn if it is `large`."""
        return await self._workers.run(current_call.get().caller.identity, make) if large else make()

    async def _events(self, request: Request, form: render.Form, generation: Generation) -> AsyncIterator[bytes]:
        """A stream's events, and a comment where there is no piece.

        Once something is sent, HTTP shows a later failure only as an event: the stream ends with it.
        """
        pieces = render.Pieces(request)
        event = partial(render.event, form=form)
        begun = False
        try:
            async for delta in generation.pieces(_SILENCE_SECONDS, since=current_call.get().began):
                if delta is None:
                    yield render.WAITING_COMMENT
                    begun = True
                    continue
                made, large = partial(pieces.message, delta), len(delta.tokens) > _MANY_TOKENS
                message = await self._made(partial(made, timings_of(request, generation)), large)
                yield await self._made(partial(event, message), large)
                begun = True
            if request.include_usage:
                yield event(pieces.usage_message(timings_of(request, generation)))
            yield render.DONE_EVENT
        except Exception as error:
            if not begun:
                raise
            yield render.error_event(explain(error)[1])

    async def _parse(
        self, request: pb.CreateCompletionRequest, deadline: Deadline, *, streaming: bool
    ) -> tuple[ServedModel, Request]:
        """The model and the valid request; tokenizing happens off the event loop, and only if the request may queue."""
        if not request.model:
            raise model_missing()
        model = self._find(request.model)
        call = current_call.get()
        if request.user:
            call.notes["user"] = pseudonym(request.user)
        identity = call.caller.identity
        model.engine.check(identity, deadline.left, priority=request.priority)
        fingerprinted = model.always_fingerprint or request.HasField("seed") or request.return_token_ids
        parsed = await self._workers.run(
            identity,
            lambda: parse(
                request,
                model.manifest,
                model.tokenizer,
                model.limits,
                identity=identity,
                streaming=streaming,
                ceiling=call.caller.most_urgent,
                fingerprint=model.fingerprint if fingerprinted else None,
            ),
        )
        return model, parsed

    @contextmanager
    def _submitted(self, model: ServedModel, request: Request, deadline: Deadline) -> Iterator[Generation]:
        """Submits a request, and charges its caller the most that it may use; fills in the call's usage at the end."""
        call = current_call.get()
        sequences = len(request.prompts) * request.best_of
        prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
        with (
            self._charged(call, prompt_tokens + sequences * request.max_tokens, sequences),
            model.engine.submit(request, deadline.left) as generation,
            deadline.ending(generation),
        ):
            call.generates(generation)
            try:
                yield generation
            finally:
                call.generates(None)
                call.usage = usage_of(request, model.id, generation, call.began)
                call.identifiers += timing_metadata(timings_of(request, generation))

    @contextmanager
    def _charged(self, call: RpcCall, tokens: int, sequences: int) -> Iterator[None]:
        """Charges a call's caller, and refunds at the end what the call's usage does not contain."""
        caller = call.caller
        try:
            self._meter.take(caller.key, caller.quota, tokens, sequences)
        finally:
            call.headers = self._meter.headers(caller.key, caller.quota)
        try:
            yield
        finally:
            used = 0 if call.usage is None else call.usage.prompt_tokens + call.usage.completion_tokens
            self._meter.give_back(caller.key, tokens - used, sequences)

    def _find_or_first(self, request: _Tokenizing) -> ServedModel:
        """The model that a request names, or the first one that its caller's key may use."""
        if request.HasField("model"):
            if not request.model:
                raise model_missing()
            return self._find(request.model)
        may_use = current_call.get().caller.may_use
        usable = (name for name, model in self._models.items() if may_use(*model.names))
        return self._find(next(usable, ""))

    def _find(self, name: str) -> ServedModel:
        """The model of this name. One that the caller's key may not use is refused as if it did not exist."""
        message = f"The model `{shown(name)}` does not exist or you do not have access to it."
        model = self._models.get(name)
        if model is None:
            raise ModelNotFoundError(message, code="model_not_found")
        call = current_call.get()
        call.model = model.id
        if not call.caller.may_use(*model.names):
            raise ForbiddenModelError(message, code="model_not_found")
        return model


def _describe(name: str, model: ServedModel) -> pb.Model:
    return pb.Model(
        id=name,
        object="model",
        created=model.manifest.created,
        owned_by=model.manifest.owned_by,
        max_model_len=model.limits.context_length,
    )
