"""The doors to compare, each started alone on the same machine, weights and threads, and stopped again."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from completion.v1 import completion_pb2, completion_pb2_grpc

from bench.load import Job, Stream, rest
from deploy import local
from service.server import load_model
from service.settings import Settings
from service.types import Prompt, Request, SamplingParams
from tests.stack import Stack, envoy, free_ports

START_SECONDS = 120


@contextmanager
def rest_through_envoy(model_dir: Path, threads: int) -> Iterator[Stream]:
    """Our product as its users reach it: REST, Envoy, gRPC, engine, each process its own."""
    http_port, grpc_port = free_ports(2)
    with (
        _service(model_dir, grpc_port, threads),
        tempfile.TemporaryDirectory() as folder,
        envoy(http_port, grpc_port, Path(folder)),
    ):
        Stack(http_port, grpc_port).wait_until_ready(START_SECONDS)
        yield rest(http_port, local.MODEL)


@contextmanager
def grpc_direct(model_dir: Path, threads: int) -> Iterator[Stream]:
    """The service without Envoy."""
    (port,) = free_ports(1)
    with _service(model_dir, port, threads):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as probe:
            grpc.channel_ready_future(probe).result(START_SECONDS)

        async def stream(job: Job) -> AsyncIterator[int]:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                stub = completion_pb2_grpc.CompletionServiceStub(channel)
                request = completion_pb2.CreateCompletionRequest(
                    model=local.MODEL,
                    tokens=completion_pb2.Tokens(ids=job.prompt),
                    max_tokens=job.new_tokens,
                    temperature=0,
                    ignore_eos=True,
                    stream_options=completion_pb2.StreamOptions(include_usage=True),
                )
                call = stub.StreamCompletion(request, metadata=(("authorization", "Bearer bench"),))
                async for message in call:
                    yield message.usage.completion_tokens

        yield stream


@contextmanager
def bare_engine(model_dir: Path, threads: int) -> Iterator[Stream]:
    """The engine alone, in the client's process: no gRPC, no JSON."""
    served = load_model(Settings(model_dir=model_dir, threads=threads))
    engine = served.engine
    started = False

    async def stream(job: Job) -> AsyncIterator[int]:
        nonlocal started
        if not started:
            engine.start(asyncio.get_running_loop())
            started = True
        with engine.submit(_request(job)) as generation:
            async for delta in generation:
                yield delta.completion_tokens

    try:
        yield stream
    finally:
        if started:
            engine.stop()


def _request(job: Job) -> Request:
    return Request(
        id="bench",
        model="bench",
        created=0,
        identity="bench",
        prompts=(Prompt(job.prompt, ""),),
        max_tokens=job.new_tokens,
        n=1,
        best_of=1,
        stream=True,
        include_usage=False,
        continuous_usage=False,
        logprobs=None,
        echo=False,
        stop=(),
        stop_token_ids=frozenset(),
        min_tokens=0,
        sampling=SamplingParams(temperature=0),
    )


@contextmanager
def _service(model_dir: Path, port: int, threads: int) -> Iterator[None]:
    command = [sys.executable, "-m", "service", "--model-dir", str(model_dir), "--port", str(port)]
    with _running("the service", [*command, "--threads", str(threads), "--log-level", "warning"]):
        yield


@contextmanager
def _running(name: str, command: list[str]) -> Iterator[None]:
    """A process that must live as long as the block."""
    with tempfile.TemporaryDirectory() as folder:
        child = local.Child(name, command, Path(folder) / "log")
        try:
            yield
            child.check()
        finally:
            child.stop()
