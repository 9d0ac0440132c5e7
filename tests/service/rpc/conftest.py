"""Fixtures of the tests of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest
from completion.v1 import completion_pb2_grpc

from service.rpc import tasks
from service.text.tokenizer import Tokenizer
from tests.support.served import Served


@pytest.fixture
async def served(letters: Tokenizer) -> AsyncIterator[Served]:
    """The server's parts, serving."""
    served = Served(letters)
    loop = asyncio.get_running_loop()
    tasks.remember(loop)
    served.engine.start(loop)
    await served.server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{served.port}") as channel:
        served.channel = channel
        served.stub = completion_pb2_grpc.CompletionServiceStub(channel)
        yield served
    loop.set_task_factory(None)
    await served.server.stop(0)
    served.engine.stop()
    served.workers.shutdown()
