"""The longest request: one setting, by which every route and both protocols go, in Envoy's own view and in fact."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from deploy import envoy_config, local
from service.settings import Settings
from tests.support.patience import PATIENCE
from tests.support.processes import service
from tests.support.stack import AUTHORIZED, ROOT, Answer, Stack, envoy, free_ports
from tests.support.stub import Stub, message, serving

LONGEST = 6
# What ends a stream on which nothing moves, where no route says otherwise.
IDLE = "stream_idle_timeout: 300s"


@dataclass(frozen=True)
class Slow:
    """A stub behind an Envoy whose minutes are seconds."""

    stack: Stack
    stub: Stub
    admin: int


@contextmanager
def slow(folder: Path, longest: int | None = LONGEST) -> Iterator[Slow]:
    """Envoy as the launcher configures it, with its idle timeout shortened as much as the longest request."""
    stub = Stub()
    http_port, admin_port = free_ports(2)
    written = envoy_config.envoy_config
    with pytest.MonkeyPatch.context() as patch, serving(stub) as grpc_port:
        if longest is not None:
            patch.setenv("COMPLETION_LONGEST_REQUEST_SECONDS", str(longest))
            assert IDLE in written({"HTTP_PORT": 1, "GRPC_PORT": 2})
            short = IDLE.replace("300", str(longest // 4))
            patch.setattr(envoy_config, "envoy_config", lambda *given: written(*given).replace(IDLE, short))
        with envoy(http_port, grpc_port, folder, admin_port=admin_port):
            made = Slow(Stack(http_port, grpc_port), stub, admin_port)
            made.stack.wait_until_ready()
            yield made


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    with slow(tmp_path_factory.mktemp("short")) as made:
        yield made


@pytest.fixture
def answering(short: Slow) -> Iterator[Slow]:
    """The stub answers after two thirds of the longest request: long after the idle timeout."""
    short.stub.seconds = 2 / 3 * LONGEST
    yield short
    short.stub.seconds = 0


@pytest.fixture
def too_slow(short: Slow) -> Iterator[Slow]:
    """The stub would answer after the longest request."""
    short.stub.seconds = 3 * LONGEST
    yield short
    short.stub.let_go.set()
    short.stub.seconds, short.stub.let_go = 0, threading.Event()


def routes(port: int) -> list[dict[str, Any]]:
    """The routes to the service, as Envoy says that it has them."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/config_dump")
        dumped = json.load(connection.getresponse())["configs"]
    finally:
        connection.close()
    configs = [config for each in dumped for config in each.get("static_route_configs", [])]
    hosts = [host for config in configs for host in config["route_config"]["virtual_hosts"]]
    found = [route for host in hosts for route in host["routes"] if "route" in route]
    return [route for route in found if route["route"]["cluster"] == "service"]


def seconds(duration: str) -> float:
    return float(duration.removesuffix("s"))


@pytest.mark.parametrize("longest", [None, LONGEST, 3600])
def test_envoys_own_view(tmp_path: Path, longest: int | None) -> None:
    """On every route to the service nothing ends a request before the longest one's time; without a setting 600 s."""
    with slow(tmp_path, longest) as made:
        found = routes(made.admin)
    assert len(found) >= 3  # gRPC; completions and models over REST
    for route in found:
        action = route["route"]
        assert seconds(action["timeout"]) == 0
        assert seconds(action["idle_timeout"]) == 0
        assert seconds(action["max_stream_duration"]["max_stream_duration"]) == (longest or 600)
        assert seconds(action["max_stream_duration"].get("grpc_timeout_header_max", "0s")) in {0, longest or 600}


def typed(made: Slow, method: str) -> Any:
    """One typed call through Envoy, without a deadline of its own."""
    with grpc.insecure_channel(made.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        if method == "ListModels":
            return stub.ListModels(pb.ListModelsRequest())
        answer = getattr(stub, method)(message())
        return list(answer) if method == "StreamCompletion" else answer


def grpc_web(made: Slow) -> Answer:
    data = message().SerializeToString()
    headers = {**AUTHORIZED, "content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    frame = b"\0" + len(data).to_bytes(4, "big") + data
    return made.stack.request("POST", "/completion.v1.CompletionService/CreateCompletion", frame, headers)


def test_every_route_and_protocol_waits(answering: Slow) -> None:
    """Whole answers, streams without a first byte, models, gRPC and gRPC-Web, all silent for most of the time."""
    made = answering
    with ThreadPoolExecutor(8) as pool:
        rest = [
            pool.submit(made.stack.complete, prompt="a"),
            pool.submit(made.stack.complete, prompt="a", stream=True),
            pool.submit(made.stack.request, "GET", "/v1/models"),
            pool.submit(grpc_web, made),
        ]
        calls = [pool.submit(typed, made, method) for method in ("CreateCompletion", "StreamCompletion", "ListModels")]
        assert [each.result().status for each in rest] == [200] * 4
        assert b"grpc-status:0" in rest[-1].result().body.replace(b" ", b"")
        assert all(each.result() for each in calls)


def test_what_takes_longer_is_ended(too_slow: Slow) -> None:
    """504 in the envelope, which no client should try again, or DEADLINE_EXCEEDED."""
    made = too_slow
    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(made.stack.complete, prompt="a", stream=stream) for stream in (False, True)]
        call = pool.submit(typed, made, "CreateCompletion")
        with pytest.raises(grpc.RpcError) as caught:
            call.result()
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        for answer in (each.result() for each in answers):
            assert answer.status == 504
            assert answer.headers["x-should-retry"] == "false"
            error = answer.json["error"]
            assert (error["type"], error["message"]) == ("server_error", "The request took too long.")
    assert round(time.monotonic() - began, 3) >= LONGEST  # Envoy's timers count in whole milliseconds


def test_the_official_client_does_not_ask_again(short: Slow) -> None:
    """One call of openai's client whose deadline passes is one call of the service, though it would try three times."""
    short.stub.code = grpc.StatusCode.DEADLINE_EXCEEDED
    short.stub.calls.clear()
    try:
        with (
            openai.OpenAI(base_url=short.stack.base_url, api_key="k") as client,
            pytest.raises(openai.APIStatusError) as caught,
        ):
            client.completions.create(model="stub", prompt="a")
    finally:
        short.stub.code = None
    assert caught.value.status_code == 504
    assert len(short.stub.calls) == 1


def test_the_service_ends_it_first(tmp_path: Path, tiny_model: Path) -> None:
    """The service goes by the same setting: over gRPC at its own port, and in a stream of events by an event."""
    flags = ("--longest-request-seconds", "6")
    (http_port,) = free_ports(1)
    long = {"max_tokens": 4000, "ignore_eos": True}
    with service(tiny_model, tmp_path, *flags, step_seconds=0.02) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPLETION_LONGEST_REQUEST_SECONDS", "6")
        with envoy(http_port, running.port, tmp_path), ThreadPoolExecutor(3) as pool:
            stack = Stack(http_port, running.port)
            stack.wait_until_ready()
            streamed = pool.submit(stack.complete, model="tiny", prompt="the", stream=True, **long)
            whole = pool.submit(stack.complete, model="tiny", prompt="the", **long)
            with pytest.raises(grpc.RpcError) as caught:
                running.complete(timeout=PATIENCE, max_tokens=4000)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert "longer than 6 seconds" in caught.value.details()
            *events, last = streamed.result().events
            assert len(events) > 2
            assert "longer than 6 seconds" in json.loads(last)["error"]["message"]
            assert whole.result().status == 504
            assert running.complete(max_tokens=2, timeout=PATIENCE).usage.completion_tokens == 2
            running.stop()
    assert running.logged("draining") | {"running": 0, "waiting": 0} == running.logged("draining")
    outcomes = {line["outcome"] for line in running.log if line.get("completion_tokens", 0) > 2}
    assert outcomes == {"deadline"}


@pytest.mark.parametrize("given", ["0", "many", "1.5", "86401"])
def test_a_wrong_time_is_a_clear_error(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    """It is named with its range before anything starts."""
    monkeypatch.setenv("COMPLETION_LONGEST_REQUEST_SECONDS", given)
    with pytest.raises(local.LaunchError, match=r"it has to be 1\.\.86400 whole seconds"):
        local.Options.from_environment()


def test_the_services_flag_alone_is_refused() -> None:
    """The launcher requires the variable, which Envoy reads too."""
    with pytest.raises(local.LaunchError, match="set COMPLETION_LONGEST_REQUEST_SECONDS instead"):
        local.run(["--longest-request-seconds=30"], local.Options.from_environment())


def test_the_configuration_says_it_once() -> None:
    """envoy.yaml has the time at one place, the service's default."""
    text = (ROOT / "envoy" / "envoy.yaml").read_text()
    assert text.count(envoy_config.LONGEST_REQUEST_ANCHOR) == 1
    assert re.findall(r"\b600s", text) == ["600s"]
    assert Settings.model_fields["longest_request_seconds"].default == 600
