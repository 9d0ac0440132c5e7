"""Callers' headers after the real Envoy, as a recording server receives them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from grpc_health.v1 import health_pb2

from tests.support.stack import AUTHORIZED, MODEL, Stack, envoy, free_ports

METHOD = "/completion.v1.CompletionService/CreateCompletion"
# Headers by which a caller could claim another address, another name or other limits.
FORGED = {
    "x-forwarded-for": "203.0.113.9",
    "x-forwarded-host": "forged.example",
    "x-forwarded-proto": "forged",
    "x-forwarded-port": "4242",
    "x-forwarded-client-cert": "By=forged;Hash=forged",
    "forwarded": "for=203.0.113.9;host=forged.example",
    "x-client-id": "forged-client",
    "x-request-id": "forged-id",
    "x-envoy-external-address": "203.0.113.9",
    "x-envoy-internal": "forged",
    "x-envoy-upstream-rq-timeout-ms": "4242",
    "x-envoy-upstream-rq-per-try-timeout-ms": "4242",
    "x-envoy-max-retries": "4242",
    "x-envoy-retry-on": "forged",
    "x-envoy-original-path": "/forged",
    "x-envoy-decorator-operation": "forged",
    "x-envoy-attempt-count": "4242",
}


class Recorder(grpc.GenericRpcHandler):
    """Answers every method with an empty message and keeps the metadata of completions."""

    def __init__(self) -> None:
        self.seen: list[dict[str, str]] = []

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        if handler_call_details.method == METHOD:
            self.seen.append(dict(handler_call_details.invocation_metadata))
        healthy = health_pb2.HealthCheckResponse(status="SERVING").SerializeToString()
        answer = healthy if "Health" in handler_call_details.method else b""
        return grpc.unary_unary_rpc_method_handler(lambda request, context: answer)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Recorder]]:
    folder, recorder = tmp_path_factory.mktemp("forged"), Recorder()
    http_port, grpc_port = free_ports(2)
    server = grpc.server(ThreadPoolExecutor(2), handlers=(recorder,))
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    server.start()
    with envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port, folder)
        stack.wait_until_ready()
        yield stack, recorder
    server.stop(0)


def by_rest(stack: Stack, headers: dict[str, str]) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a"})
    assert stack.request("POST", "/v1/completions", body, {**AUTHORIZED, **headers}).status == 200


def by_grpc(stack: Stack, headers: dict[str, str]) -> None:
    with grpc.insecure_channel(stack.envoy_address) as channel:
        message = pb.CreateCompletionRequest(model=MODEL).SerializeToString()
        channel.unary_unary(METHOD)(message, metadata=[*AUTHORIZED.items(), *headers.items()])


@pytest.mark.parametrize("send", [by_rest, by_grpc])
@pytest.mark.parametrize("name", FORGED)
def test_forged_header(recorded: tuple[Stack, Recorder], send, name: str) -> None:
    """The service never sees what a caller forged, by either door, and neither does the log."""
    stack, recorder = recorded
    recorder.seen.clear()
    send(stack, {name: FORGED[name]})
    (seen,) = recorder.seen
    assert FORGED[name] not in seen.values(), seen
    assert seen["authorization"] == AUTHORIZED["authorization"]
    assert FORGED[name] not in access_log(stack.logs)


@pytest.mark.parametrize("name", ["grpc-timeout", "grpc-encoding", "x-anything", "cookie", "trace-bin"])
def test_rest_callers_send_no_metadata(recorded: tuple[Stack, Recorder], name: str) -> None:
    """Of a REST caller's headers the service sees a few that are named, and no others."""
    stack, recorder = recorded
    recorder.seen.clear()
    by_rest(stack, {name: "forged"})
    assert "forged" not in recorder.seen[0].values()


def access_log(folder: Path) -> str:
    return (folder / "envoy.log").read_text()
