"""A real server in this process: interceptor, servicer, health and an engine over the alphabet."""

from __future__ import annotations

import hashlib

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.rpc import status_pb2
from grpc_health.v1 import health_pb2_grpc

from service.engine.cache import KVCache
from service.engine.engine import Engine, Stats
from service.engine.scheduler import Scheduler
from service.rpc.health import Health
from service.rpc.interceptors import CallInterceptor
from service.rpc.keys import Caller, KeyRing
from service.rpc.parse import Limits
from service.rpc.quota import UNLIMITED, Meter
from service.rpc.running import Running
from service.rpc.servicer import CompletionServicer, ServedModel
from service.rpc.workers import Workers
from tests.support.fakes import FakeModel, manifest
from tests.support.patience import eventually_async

KEY = (("authorization", "Bearer sk-right"),)
SEND_TIMEOUT_SECONDS = 1.0
METHOD = "/completion.v1.CompletionService/CreateCompletion"


class Served:
    """The server's parts: `stub` calls it."""

    def __init__(self, letters):
        self.model = FakeModel()
        self.engine = Engine(self.model, letters, Scheduler(KVCache(4), 16), max_waiting=100)
        self.workers = Workers(1, "parsing")
        self.meter = Meter(UNLIMITED)
        self.running = Running()
        served = ServedModel(manifest(), letters, self.engine, Limits(64, 4))
        digest = hashlib.sha256(b"sk-right")
        self.identity = digest.hexdigest()
        keys = KeyRing({digest.digest(): Caller("team", self.identity, self.identity)})
        patience = {"send_timeout": SEND_TIMEOUT_SECONDS, "last_word": SEND_TIMEOUT_SECONDS}
        interceptor = CallInterceptor(keys, self.workers, self.meter, self.running, **patience)
        self.server = grpc.aio.server(interceptors=[interceptor], options=[("grpc.so_reuseport", 0)])
        self.health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        self.servicer = CompletionServicer([served], self.workers, self.meter)
        completion_pb2_grpc.add_CompletionServiceServicer_to_server(self.servicer, self.server)
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def limit(self, quota):
        """Holds every key to a quota from now on."""
        self.meter.default = quota

    async def idle(self):
        """Waits until the engine has nothing left to do."""
        await eventually_async(lambda: self.engine.stats == Stats(0, 0), lambda: self.engine.stats)


def asked(**fields):
    return pb.CreateCompletionRequest(**{"model": "alphabet", "text": "ab", "temperature": 0, **fields})


def detail(error):
    """The typed error of a refused call."""
    metadata = dict(error.trailing_metadata())
    found = pb.ErrorResponse()
    assert status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details[0].Unpack(found)
    return found.error


async def refused(call):
    """The error with which a call, or a stream's first message, is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return caught.value
