"""A gRPC server in the service's place, which answers when and how a test says: what Envoy does can be seen at it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.api import httpbody_pb2
from grpc_health.v1 import health, health_pb2_grpc

from tests.support.patience import PATIENCE

MESSAGE_BYTES = 16 << 20
Context = grpc.ServicerContext


class Stub(completion_pb2_grpc.CompletionServiceServicer):
    """Takes `seconds` for each completion, or aborts it with `code`; `calls` are the messages' sizes, as they came.

    A stream of events has `pieces`, each of which is sent when `turns` lets it.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.code: grpc.StatusCode | None = None
        self.calls: list[int] = []
        self.pieces = 0
        self.turns = threading.Semaphore(0)
        self.let_go = threading.Event()
        self.health = health.HealthServicer()
        self.server: grpc.Server | None = None

    def stop(self) -> None:
        """Ends the server, and what it answers."""
        self.let_go.set()
        assert self.server is not None
        self.server.stop(0).wait()

    def _answer(self, request: pb.CreateCompletionRequest, context: Context) -> None:
        self.calls.append(request.ByteSize())
        self.let_go.wait(self.seconds)
        if self.code is not None:
            context.abort(self.code, "not now")

    def CreateCompletion(  # noqa: N802, the contract's name
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> pb.CreateCompletionResponse:
        self._answer(request, context)
        return pb.CreateCompletionResponse(id="cmpl-stub", object="text_completion", model=request.model)

    def StreamCompletion(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> Iterator[pb.CreateCompletionResponse]:
        yield self.CreateCompletion(request, context)

    def StreamCompletionEvents(  # noqa: N802
        self, request: pb.CreateCompletionRequest, context: Context
    ) -> Iterator[httpbody_pb2.HttpBody]:
        self._answer(request, context)
        for number in range(self.pieces):
            assert self.turns.acquire(timeout=PATIENCE)
            yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=b"data: %d\n\n" % number)
        yield httpbody_pb2.HttpBody(content_type="text/event-stream", data=b"data: [DONE]\n\n")

    def ListModels(  # noqa: N802
        self, request: pb.ListModelsRequest, context: Context
    ) -> pb.ListModelsResponse:
        self.let_go.wait(self.seconds)
        return pb.ListModelsResponse(object="list")


@contextmanager
def serving(stub: Stub) -> Iterator[int]:
    """The stub as a healthy server on 127.0.0.1; gives its port."""
    server = grpc.server(ThreadPoolExecutor(128), options=[("grpc.max_receive_message_length", MESSAGE_BYTES)])
    completion_pb2_grpc.add_CompletionServiceServicer_to_server(stub, server)
    health_pb2_grpc.add_HealthServicer_to_server(stub.health, server)
    bound = server.add_insecure_port("127.0.0.1:0")
    server.start()
    stub.server = server
    try:
        yield bound
    finally:
        stub.stop()


def message(**fields: Any) -> pb.CreateCompletionRequest:
    """A typed request for the stub."""
    return pb.CreateCompletionRequest(**{"model": "stub", "text": "a", **fields})
