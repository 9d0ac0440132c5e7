"""Leaving early: whatever way a caller goes, its sequences and their keys and values are free within one step."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from deploy import envoy_config
from service.engine.engine import Engine, Stats
from service.settings import Settings
from tests.support.patience import PATIENCE, ended_by_deadline, eventually
from tests.support.stack import AUTHORIZED, KEY, MODEL, ServiceThread, Stack, envoy, free_ports

METADATA = list(AUTHORIZED.items())
TOKENS = 4000
ENDLESS = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
IDLE = Stats(running=0, waiting=0)


@dataclass(frozen=True)
class Watched:
    """A stack whose engine the test can look into."""

    stack: Stack
    engine: Engine

    def wait_for(self, expected: Stats) -> None:
        """Waits until the engine holds exactly that."""
        eventually(lambda: self.engine.stats == expected, lambda: self.engine.stats)

    def wait_until_left(self) -> None:
        """Waits until the engine holds nothing, which it must long before who has left would have had all its tokens.

        A step gives each sequence one; the message that somebody left takes some steps' time. Who only reads nothing is
        given up after a thousand.
        """
        left, seconds = self.engine.steps.turns, time.monotonic()
        self.wait_for(IDLE)
        steps = self.engine.steps.turns - left
        print(f"freed within {steps} steps, {1000 * (time.monotonic() - seconds):.0f} ms")
        assert steps < TOKENS / 8


@pytest.fixture(scope="module")
def watched(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """A real server in this process behind a real Envoy."""
    http_port, grpc_port = free_ports(2)
    # What leaves early may queue as long as it likes: the estimate expects all tokens of each.
    settings = Settings(model_dir=model_dir, port=grpc_port, max_running=8, max_queue_seconds=1e9, drain_seconds=1)
    written = envoy_config.envoy_config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            envoy_config, "envoy_config", lambda *given: written(*given).replace("value: 598S", "value: 9999999S")
        )
        with ServiceThread(settings) as service, envoy(http_port, grpc_port, tmp_path_factory.mktemp("envoy")):
            stack = Stack(http_port, grpc_port)
            stack.wait_until_ready()
            yield Watched(stack, service.server.models[0].engine)


def test_two_hundred_cancelled_streams_leave_nothing(watched: Watched) -> None:
    """200 streams through Envoy, closed after their first event or before it, leave no sequence and no slot held."""
    with openai.OpenAI(base_url=watched.stack.base_url, api_key=KEY, max_retries=0) as client:

        def leave(number: int) -> None:
            stream = client.completions.create(**ENDLESS, stream=True, seed=number, n=1 + number % 3)
            if number % 2:
                next(iter(stream))
            stream.close()

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(leave, range(200)))
        watched.wait_until_left()
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=2).usage.completion_tokens <= 2
    watched.wait_for(IDLE)


def test_closed_connection_of_a_unary_request(watched: Watched) -> None:
    """A REST caller that hangs up while its whole answer is computed frees the sequence."""
    connection = http.client.HTTPConnection("127.0.0.1", watched.stack.http, timeout=PATIENCE)
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": TOKENS, "ignore_eos": True})
    connection.request("POST", "/v1/completions", body, {**AUTHORIZED, "content-type": "application/json"})
    watched.wait_for(Stats(running=1, waiting=0))
    connection.close()
    watched.wait_until_left()


def test_cancelled_and_timed_out_grpc_calls(watched: Watched) -> None:
    """Cancelling a gRPC call, or its deadline, frees what runs and what still waits."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=TOKENS, n=12, ignore_eos=True)
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        call = stub.CreateCompletion.future(request, metadata=METADATA)
        watched.wait_for(Stats(running=8, waiting=4))
        call.cancel()
        watched.wait_until_left()
        ended_by_deadline(lambda seconds: stub.StreamCompletion(request, timeout=seconds, metadata=METADATA))
        watched.wait_until_left()


def test_a_cancelled_call_gives_its_slot_back_at_once(watched: Watched) -> None:
    """On an idle engine a whole answer that is cancelled is gone; test_engine_faults.py counts the steps."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=TOKENS, ignore_eos=True)
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        for _ in range(5):
            call = stub.CreateCompletion.future(request, metadata=METADATA)
            watched.wait_for(Stats(running=1, waiting=0))
            call.cancel()
            watched.wait_until_left()


def test_cancel_during_a_long_prompt(watched: Watched) -> None:
    """A caller that leaves while its prompt is computed is gone after the chunk at hand, and others go on."""
    with grpc.insecure_channel(watched.stack.grpc_address) as channel, ThreadPoolExecutor(1) as pool:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        request = pb.CreateCompletionRequest(model=MODEL, text="word " * 4000, max_tokens=TOKENS, ignore_eos=True)
        call = stub.CreateCompletion.future(request, metadata=METADATA)
        watched.wait_for(Stats(running=1, waiting=0))
        neighbour = pool.submit(watched.stack.complete, prompt="Hello", max_tokens=30)
        call.cancel()
        watched.wait_until_left()
        assert neighbour.result().status == 200
    watched.wait_for(IDLE)
