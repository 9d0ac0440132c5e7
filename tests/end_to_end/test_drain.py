"""SIGTERM under load: requests that can finish do, the others get an error, and the process exits with 0."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy import envoy_config, local
from tests.support.patience import PATIENCE, PATIENT_SERVICE, eventually
from tests.support.stack import AUTHORIZED, KEY, MODEL, ROOT, Stack, envoy, free_ports

ENDLESS = {"model": MODEL, "prompt": "Once", "max_tokens": 6000, "ignore_eos": True}


@contextmanager
def serving(model_dir: Path, folder: Path, *arguments: str) -> Iterator[tuple[Stack, subprocess.Popen[bytes]]]:
    """A service process of its own behind a real Envoy."""
    http_port, grpc_port, metrics_port = free_ports(3)
    command = [sys.executable, "-m", "service", "--model-dir", str(model_dir), "--port", str(grpc_port)]
    command += ["--drain-delay-seconds", "0", "--metrics-port", str(metrics_port), *arguments]
    with (folder / "service.log").open("wb") as log, envoy(http_port, grpc_port, folder):
        environment = os.environ | PATIENT_SERVICE
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            stack = Stack(http_port, grpc_port, None, metrics_port)
            stack.wait_until_ready()
            yield stack, process
        finally:
            process.kill()
            process.wait()


SLOW_START = """
import asyncio, sys, time
from service import __main__, server
wait = {"load": lambda *_: (print("here", file=sys.stderr), time.sleep(3600)), "warm up": None}[sys.argv.pop(1)]
async def warm_up(self):
    loop = asyncio.get_running_loop()
    add = loop.add_signal_handler
    def added(*arguments):
        add(*arguments)
        print("heard", file=sys.stderr)
    loop.add_signal_handler = added
    print("here", file=sys.stderr)
    await asyncio.sleep(3600)
if wait: server.models.load = wait
server.Server._warm_up = warm_up
sys.exit(__main__.main())
"""


@pytest.mark.parametrize(("stage", "signals"), [("load", 1), ("warm up", 2)])
def test_a_start_can_be_given_up(model_dir: Path, stage: str, signals: int) -> None:
    """While models load the first signal ends the process, while they warm up the second one."""
    (port,) = free_ports(1)
    given = ["--model-dir", str(model_dir), "--port", str(port), "--metrics-port", "0"]
    command = [sys.executable, "-c", SLOW_START, stage, *given]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == b"here\n"
        for _ in range(signals - 1):
            process.send_signal(signal.SIGTERM)
            assert process.stderr.readline() == b"heard\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 128 + signal.SIGTERM


def test_streams_that_outlast_the_drain_end_with_an_error(model_dir: Path, tmp_path: Path) -> None:
    """A stream cut off by the end of the drain ends with an error that the official client raises; unary gets 503."""
    with (
        serving(model_dir, tmp_path, "--drain-seconds", "1") as (stack, process),
        openai.OpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0) as client,
        grpc.insecure_channel(stack.grpc_address) as channel,
        ThreadPoolExecutor(1) as pool,
    ):
        extra = {"extra_body": {"ignore_eos": True}}
        fields = {name: value for name, value in ENDLESS.items() if name != "ignore_eos"}
        stream = iter(client.completions.create(**fields, **extra, stream=True))
        next(stream)
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        typed = stub.StreamCompletion(pb.CreateCompletionRequest(**typed_fields(ENDLESS)), metadata=metadata())
        next(typed)
        unary = pool.submit(lambda: stack.complete(**ENDLESS))
        eventually(lambda: stack.sample("llm_running") == 3)
        process.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopping"):
            list(stream)
        with pytest.raises(grpc.RpcError) as caught:
            list(typed)
        assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "stopping" in caught.value.details()
        assert unary.result().status == 503
        assert process.wait(PATIENCE) == 0
    assert "Traceback" not in (tmp_path / "service.log").read_text()


def test_running_requests_finish(model_dir: Path, tmp_path: Path) -> None:
    """After SIGTERM a running request gets its whole answer, health says NOT_SERVING, and new requests are refused."""
    with serving(model_dir, tmp_path) as (stack, process), grpc.insecure_channel(stack.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=200, ignore_eos=True)
        call = completion_pb2_grpc.CompletionServiceStub(channel).StreamCompletion(request, metadata=metadata())
        next(call)
        process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        assert list(call)[-1].choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert process.wait(PATIENCE) == 0
        assert stack.complete(prompt="a").status == 503
    lines = [line for line in (tmp_path / "service.log").read_text().splitlines() if '"draining"' in line]
    assert [json.loads(line)["running"] for line in lines] == [1]


def typed_fields(fields: dict) -> dict:
    return {("text" if name == "prompt" else name): value for name, value in fields.items()}


def metadata() -> list[tuple[str, str]]:
    return list(AUTHORIZED.items())


def test_envoy_ends_without_cutting_anyone_off(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By run.sh: whoever balances by /health loses no request to a restart of one of two Envoys, and streams finish."""
    http_port, admin_port = free_ports(2)
    for name, value in {"ADMIN_PORT": str(admin_port), "DRAIN_DELAY": "2", "DRAIN_SECONDS": str(PATIENCE)}.items():
        monkeypatch.setenv(name, value)
    ports = {"HTTP_PORT": http_port, "GRPC_PORT": stack.grpc, "ADMIN_PORT": admin_port}
    command = ["envoy/run.sh", *envoy_config.envoy_command(local.envoy_binary(), ports, tmp_path)]
    leaving = Stack(http_port, stack.grpc)
    statuses: list[tuple[int, bool]] = []
    child = local.Child("Envoy", command, tmp_path / "envoy.log")
    try:
        leaving.wait_until_ready()

        def balanced() -> None:
            while child.process.poll() is None:
                here = healthy(leaving)
                statuses.append(((leaving if here else stack).complete(prompt="a", max_tokens=1).status, here))

        with ThreadPoolExecutor(5) as pool, leaving.begin(max_tokens=400) as stream:
            whole = pool.submit(leaving.complete, prompt="Once", max_tokens=400, ignore_eos=True)
            eventually(lambda: stack.sample("llm_running") == 2)
            balancers = [pool.submit(balanced) for _ in range(4)]
            eventually(lambda: statuses)
            child.process.terminate()
            eventually(lambda: not listening(http_port))
            assert not whole.done(), "they have to outlast the delay"
            assert stream.read().endswith(b"data: [DONE]\n\n")
            assert whole.result().status == 200
            assert child.process.wait(PATIENCE) == 0
            for balancer in balancers:
                balancer.result()
    finally:
        child.process.kill()
    assert {status for status, _ in statuses} == {200}
    assert {here for _, here in statuses} == {True, False}


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def healthy(stack: Stack) -> bool:
    try:
        return stack.request("GET", "/health", headers={}).status == 200
    except ConnectionError:
        return False
