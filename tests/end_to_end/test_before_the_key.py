"""The requests that Envoy forwards to the service when keys are required, and when they are not."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from service.settings import Settings
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, KEY, MODEL, ServiceThread, Stack, envoy, free_ports

REQUEST = pb.CreateCompletionRequest(model=MODEL, text="a", max_tokens=1)
METADATA = list(AUTHORIZED.items())


@dataclass(frozen=True)
class Keyed:
    """A stack that requires keys, and its key file."""

    stack: Stack
    keys: Path
    log: Path

    def replace(self, *keys: str) -> None:
        """Moves a file with these keys over the old one."""
        new = self.keys.with_name("new")
        new.write_text("".join(f"{hashlib.sha256(key.encode()).hexdigest()} {key}\n" for key in keys))
        new.replace(self.keys)


@pytest.fixture(scope="module")
def keyed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed")
    http_port, grpc_port = free_ports(2)
    made = Keyed(Stack(http_port, grpc_port), folder / "keys", folder / "envoy.log")
    made.replace(KEY)
    settings = Settings(model_dir=model_dir, port=grpc_port, api_keys_file=made.keys, drain_seconds=1)
    with ServiceThread(settings), envoy(http_port, grpc_port, folder, api_keys_file=made.keys):
        made.stack.wait_until_ready()
        yield made


@pytest.fixture(params=["envoy", "service"])
def address(keyed: Keyed, request: pytest.FixtureRequest) -> str:
    """Both doors of a typed caller."""
    return keyed.stack.envoy_address if request.param == "envoy" else keyed.stack.grpc_address


@pytest.mark.parametrize(
    "header", ["", "Authorization: Basic test-key", "Authorization: Bearer", "Authorization: test-key"]
)
@pytest.mark.parametrize("line", ["POST /v1/completions", "POST //v1/completions?x=1", "GET /v1/models"])
def test_no_bearer_no_body(keyed: Keyed, line: str, header: str) -> None:
    """A request without a bearer token is refused before its body; the error says how to authenticate."""
    with socket.create_connection(("127.0.0.1", keyed.stack.http), timeout=8) as connection:
        lines = [f"{line} HTTP/1.1", "Host: a", "Content-Length: 2000000", *filter(None, [header]), "", ""]
        connection.sendall("\r\n".join(lines).encode())
        received = b""
        while b"}}" not in received:
            received += connection.recv(65536)
    headers, _, body = received.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 401 ")
    assert b"www-authenticate: Bearer" in headers
    assert b"x-request-id: " in headers
    error = json.loads(body)["error"]
    assert error["message"].startswith("You didn't provide an API key.")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")


def test_typed_callers_without_a_bearer(keyed: Keyed) -> None:
    """UNAUTHENTICATED for whoever speaks gRPC, also over HTTP/1.1 as browsers do."""
    with grpc.insecure_channel(keyed.stack.envoy_address) as channel, pytest.raises(grpc.RpcError) as caught:
        completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(REQUEST)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "didn't provide" in caught.value.details()
    headers = {"content-type": "application/grpc-web+proto"}
    answer = keyed.stack.request("POST", "/completion.v1.CompletionService/CreateCompletion", b"\0" * 5, headers)
    assert (answer.headers.get("grpc-status") or answer.body.partition(b"grpc-status:")[2][:2].decode()) == "16"


def test_every_call_but_health_needs_a_key(keyed: Keyed) -> None:
    """At the service's own port, with the typed detail: completions, models and reflection."""
    with grpc.insecure_channel(keyed.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (
            lambda: stub.CreateCompletion(REQUEST),
            lambda: list(stub.StreamCompletion(REQUEST)),
            lambda: stub.ListModels(pb.ListModelsRequest()),
            lambda: stub.GetModel(pb.GetModelRequest(model=MODEL)),
            lambda: list(reflection.ServerReflectionInfo(iter([asked]))),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            (detail,) = rpc_status.from_call(caught.value).details
            error = pb.ErrorResponse()
            assert detail.Unpack(error)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert error.error.code == "invalid_api_key"
        for name in ("", "completion.v1.CompletionService"):
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("metadata", [METADATA, [], [("authorization", "Bearer wrong")]])
def test_compressed_messages(address: str, compression: grpc.Compression, metadata: list[tuple[str, str]]) -> None:
    """UNIMPLEMENTED at both doors, with whatever key; one that says that it is not compressed is as good as another."""
    large = pb.CreateCompletionRequest(model=MODEL, text="a" * (8 << 20))
    with grpc.insecure_channel(address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        for call in (stub.CreateCompletion, lambda *given, **more: list(stub.StreamCompletion(*given, **more))):
            with pytest.raises(grpc.RpcError) as caught:
                call(large, metadata=metadata, compression=compression)
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert stub.CreateCompletion(REQUEST, metadata=METADATA, compression=grpc.Compression.NoCompression).choices
        assert stub.CreateCompletion(REQUEST, metadata=[*METADATA, ("grpc-encoding", "identity")]).choices


def test_health_at_the_public_port(keyed: Keyed) -> None:
    """A check is answered, also one that is no message; what lasts, or tells of more, is not there."""
    with grpc.insecure_channel(keyed.stack.envoy_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (
            lambda: health.List(health_pb2.HealthListRequest()),
            lambda: next(health.Watch(health_pb2.HealthCheckRequest())),
            lambda: next(reflection.ServerReflectionInfo(iter([asked]), metadata=METADATA)),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    with grpc.insecure_channel(keyed.stack.grpc_address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_without_a_key_file_no_key_is_asked_for(stack: Stack) -> None:
    """With no authorization at all, and with one that is no bearer, over both doors."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1})
    for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Basic YTpi"}, AUTHORIZED):
        assert stack.request("POST", "/v1/completions", body, headers).status == 200
    for target in (stack.envoy_address, stack.grpc_address):
        with grpc.insecure_channel(target) as channel:
            assert completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(REQUEST).choices


def test_the_setting_is_nobodys_to_send(keyed: Keyed, stack: Stack) -> None:
    """A caller's own header of that name changes nothing, on either stack."""
    for value in ("-", "", "/some/file"):
        forged = {"x-api-keys-file": value}
        assert keyed.stack.request("GET", "/v1/models", headers=forged).status == 401
        assert keyed.stack.request("GET", "/v1/models", headers={**AUTHORIZED, **forged}).status == 200
        assert stack.request("GET", "/v1/models", headers={**AUTHORIZED, **forged}).status == 200


def test_keys_that_are_moved_over_the_old_ones(keyed: Keyed) -> None:
    """The new key opens, the old one does not, and its stream ends with the reason."""
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 4000, "stream": True, "ignore_eos": True})
    with socket.create_connection(("127.0.0.1", keyed.stack.http), timeout=PATIENCE) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        received = connection.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 ")
        keyed.replace("another")
        try:
            while b"has been revoked" not in received:
                chunk = connection.recv(65536)
                assert chunk, received[-500:]
                received = received[-1000:] + chunk
            assert b'"error"' in received
            assert keyed.stack.request("GET", "/v1/models").status == 401
            other = {"authorization": "Bearer another"}
            assert keyed.stack.request("GET", "/v1/models", headers=other).status == 200
        finally:
            keyed.replace(KEY)
    eventually(lambda: keyed.stack.request("GET", "/v1/models").status == 200)


def test_connect_is_refused_with_words(keyed: Keyed) -> None:
    """Envoy's refusal of a method that it does not know says something."""
    with socket.create_connection(("127.0.0.1", keyed.stack.http), timeout=PATIENCE) as connection:
        connection.sendall(b"CONNECT a:443 HTTP/1.1\r\nHost: a:443\r\n\r\n")
        received = connection.recv(65536)
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"], received


def test_lines_of_the_access_log_are_bounded(keyed: Keyed) -> None:
    """Also that of a path of 30,000 characters."""
    keyed.stack.request("GET", "/" + "p" * 30_000)
    lines = eventually(lambda: [line for line in keyed.log.read_text().splitlines() if "/pppp" in line])
    assert len(lines[-1]) < 2000
