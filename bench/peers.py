"""The ways to reach our own service, each started separately: REST through Envoy, gRPC, and the bare engine."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import grpc
from completion.v1 import completion_pb2, completion_pb2_grpc

from bench.client import API_KEY, Job, Piece, Stream, rest
from bench.processes import START_SECONDS, answers, healthy, memory, running, wait_until
from deploy.envoy_config import envoy_command, free_ports
from deploy.local import MODEL, Child, Options, envoy_binary
from service.engine.engine import Engine
from service.serving import models
from service.settings import Settings
from service.types import Prompt, Request, SamplingParams


@dataclass(frozen=True)
class Setup:
    """What every peer is started with: the same weights and threads, and room for the same load.

    `model_dir` is `weights` exported; `slots` sequences of `context` tokens run at once; `cache` is the folder of
    converted models. Our service computes on `device`, and refuses requests that would wait longer than
    `queue_seconds`, an hour by default.
    """

    model_dir: Path
    weights: Path
    threads: int
    slots: int
    context: int
    cache: Path
    flash_attention: Literal["on", "off"] = "on"
    device: Literal["cpu", "cuda"] = "cpu"
    queue_seconds: float = 3600.0

    @property
    def max_running(self) -> int:
        """The setting that gives one caller `slots` slots: one of sixteen is kept for callers who hold none."""
        return self.slots + self.slots // 15


@dataclass(frozen=True)
class Served:
    """A running peer: how to send it requests, the ids of its processes by name, and the engine in this process.

    A peer has either processes or runs within this one; only the bare engine has `engine`.
    """

    stream: Stream
    processes: Mapping[str, int] = field(default_factory=dict)
    engine: Engine | None = None

    def resident(self) -> int:
        """Bytes of the service's memory that are resident now; 0 where it has no process of its own."""
        return memory(self.processes["service"], "VmRSS") if "service" in self.processes else 0


Start = Callable[[Setup], AbstractContextManager[Served]]


@contextmanager
def services_behind_envoy(
    arguments: Sequence[str], count: int = 1, affinity: bool = False
) -> Iterator[tuple[int, list[Child], Child]]:
    """Envoy's HTTP port, `count` services started with the same arguments, and Envoy; all are healthy.

    With `affinity` each session keeps to one of the services.
    """
    http_port, admin_port, *grpc_ports = free_ports(2 + count)
    ports = {"HTTP_PORT": http_port, "GRPC_PORT": grpc_ports[0], "ADMIN_PORT": admin_port}
    with ExitStack() as started:
        folder = Path(started.enter_context(tempfile.TemporaryDirectory()))
        longest = Options.from_environment().longest_request
        command = envoy_command(envoy_binary(), ports, folder, grpc_ports[1:], affinity, longest_request=longest)
        services = [started.enter_context(_service(arguments, port)) for port in grpc_ports]
        gateway = started.enter_context(running("Envoy", command))
        for service in services:
            wait_until(lambda: answers(http_port, "/v1/models"), service)
        wait_until(lambda: healthy(admin_port) == count, services[-1])
        yield http_port, services, gateway


@contextmanager
def replicas_through_envoy(setup: Setup, count: int = 1, affinity: bool = False) -> Iterator[Served]:
    """Our product as its users reach it, with `count` services that share the threads: REST, Envoy, gRPC, engine."""
    share = replace(setup, threads=max(1, setup.threads // count))
    with services_behind_envoy(_arguments(share), count, affinity) as (http_port, services, gateway):
        processes = {"service": services[0], "Envoy": gateway}
        processes |= {f"service {number}": service for number, service in enumerate(services[1:], 2)}
        yield Served(rest(http_port, MODEL), {name: child.process.pid for name, child in processes.items()})


@contextmanager
def grpc_direct(setup: Setup) -> Iterator[Served]:
    """The service without Envoy."""
    (port,) = free_ports(1)
    with _service(_arguments(setup), port) as service:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as probe:
            grpc.channel_ready_future(probe).result(START_SECONDS)
        yield Served(_grpc_stream(port), {"service": service.process.pid})


def _grpc_stream(port: int) -> Stream:
    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        prompts = [completion_pb2.Tokens(ids=prompt) for prompt in job.prompts]
        request = completion_pb2.CreateCompletionRequest(
            model=MODEL,
            token_batch=completion_pb2.TokenBatch(prompts=prompts),
            max_tokens=job.new_tokens,
            n=job.n,
            temperature=0,
            ignore_eos=True,
            stream_options=completion_pb2.StreamOptions(include_usage=True),
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            async for message in stub.StreamCompletion(request, metadata=(("authorization", f"Bearer {API_KEY}"),)):
                text = "".join(choice.text for choice in message.choices) if message.choices else None
                usage = message.usage
                yield Piece(text, usage.completion_tokens, usage.prompt_tokens_details.cached_tokens)

    return stream


@contextmanager
def bare_engine(setup: Setup) -> Iterator[Served]:
    """The engine in the client's process, without gRPC and JSON."""
    settings = Settings(
        model_dir=setup.model_dir, threads=setup.threads, max_running=setup.max_running, device=setup.device
    )
    engine = models.load(settings)[0].engine
    started = False

    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        nonlocal started
        if not started:
            engine.start(asyncio.get_running_loop())
            started = True
        with engine.submit(request(job)) as generation:
            async for delta in generation:
                yield Piece(delta.text, delta.completion_tokens, delta.cached_tokens)

    try:
        yield Served(stream, engine=engine)
    finally:
        if started:
            engine.stop()


def on_cuda(start: Start) -> Start:
    """The same peer on a GPU."""
    return lambda setup: start(replace(setup, device="cuda"))


def request(job: Job) -> Request:
    """The job as a request to the engine. Jobs with several choices would report only the last one's tokens."""
    return Request(
        id="bench",
        model="bench",
        created=0,
        identity="bench",
        prompts=tuple(Prompt(prompt, "") for prompt in job.prompts),
        max_tokens=job.new_tokens,
        n=job.n,
        best_of=job.n,
        stream=True,
        sampling=SamplingParams(temperature=0),
    )


def _arguments(setup: Setup) -> list[str]:
    arguments = ["--model-dir", str(setup.model_dir), "--threads", str(setup.threads)]
    arguments += ["--max-running", str(setup.max_running), "--max-queue-seconds", str(setup.queue_seconds)]
    return [*arguments, "--log-level", "warning", "--device", setup.device]


def _service(arguments: Sequence[str], port: int) -> AbstractContextManager[Child]:
    command = [sys.executable, "-m", "service", "--port", str(port), "--drain-delay-seconds", "0", *arguments]
    return running("the service", command)
