"""Bad input, row by row, over REST through the real Envoy and over gRPC.

Whatever comes in: no failure of the service's own, nothing left behind, and the next good request succeeds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.protobuf import json_format, struct_pb2
from grpc_status import rpc_status

from service.engine.engine import Stats
from service.rpc import render
from service.settings import Settings
from tests.end_to_end.bad_input import GOOD, ROWS, Ask, Row, paris
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, KEY, MODEL, Answer, ServiceThread, Stack, envoy, free_ports

METADATA = list(AUTHORIZED.items())
STATUSES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
}


@dataclass(frozen=True)
class Watched:
    """A service in this process behind a real Envoy: what it holds can be seen."""

    stack: Stack
    envoy: int
    service: ServiceThread
    stub: completion_pb2_grpc.CompletionServiceStub

    def ask(self, ask: Ask) -> Answer:
        return self.stack.request(ask.method, ask.path, ask.content, ask.headers)

    def check_nothing_came(self) -> None:
        """Envoy still answers, and the service has no sequence: nothing of the request has reached it."""
        assert self.stack.request("GET", "/v1/models").status == 200
        assert self.service.server.models[0].engine.stats == Stats(0, 0)

    def check_nothing_left(self) -> None:
        """The next good request is answered, and then no sequence holds or waits for keys and values."""
        answer = self.ask(Ask())
        assert answer.status == 200
        assert paris(answer.json)
        engine = self.service.server.models[0].engine
        eventually(lambda: engine.stats == Stats(0, 0), lambda: engine.stats)


@pytest.fixture(scope="module")
def watched(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("bad-input")
    keys = folder / "keys"
    keys.write_text(
        f"{hashlib.sha256(KEY.encode()).hexdigest()} tests\n"
        f"{hashlib.sha256(b'limited-key').hexdigest()} limited models=another\n"
    )
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, api_keys_file=keys)
    made = envoy(http_port, grpc_port, folder, api_keys_file=keys)
    with ServiceThread(settings) as service, made as gateway:
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        with grpc.insecure_channel(stack.grpc_address) as channel:
            yield Watched(stack, gateway.process.pid, service, completion_pb2_grpc.CompletionServiceStub(channel))


def name(row: Row) -> str:
    shown = row.ask.fields or (row.ask.body or b"")[-40:] or row.ask.path
    return f"{row.by}-{str(shown)[:60]}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.rest], ids=name)
def test_rest(watched: Watched, row: Row) -> None:
    """Each row has its status and error over REST."""
    answer = watched.ask(row.ask)
    assert answer.status == row.status, answer.body
    if answer.status == 200:
        assert b"\xef\xbf\xbd" not in answer.body  # no replacement character for part of another one
        assert "event-stream" in answer.headers["content-type"] or row.holds(answer.json), answer.body
    else:
        check_envelope(answer, row)
    if row.by == "EDGE":
        watched.check_nothing_came()
    else:
        watched.check_nothing_left()


def check_envelope(answer: Answer, row: Row) -> None:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    (error,) = answer.json.values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert not error["message"].startswith("{")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", row.param, row.code)
    assert (row.says.split(", ")[0] if row.status == 405 else row.says) in error["message"]
    assert len(error["message"]) < 700
    if row.status == 401:
        assert answer.headers["www-authenticate"] == "Bearer"
    if row.status == 405:
        assert answer.headers["allow"] == row.says


@pytest.mark.parametrize("row", [row for row in ROWS if row.typed and row.ask.body is None], ids=name)
def test_grpc(watched: Watched, row: Row) -> None:
    """Bad input that a typed message can express gets the same answer and the same error over gRPC."""
    request, metadata = message(row.ask.merged), list(row.ask.headers.items())
    if row.by == "OK":
        answer = watched.stub.CreateCompletion(request, metadata=metadata)
        assert row.holds(json_of(answer)), answer
    else:
        stream = row.ask.fields.get("stream")
        call = watched.stub.StreamCompletion if stream else watched.stub.CreateCompletion
        with pytest.raises(grpc.RpcError) as caught:
            list(call(request, metadata=metadata))
        check_status(caught.value, row)
    watched.check_nothing_left()


def message(fields: dict[str, Any]) -> pb.CreateCompletionRequest:
    """The typed request that says the same as a REST body; whether it streams is for the method to say."""
    typed = {name: value for name, value in fields.items() if name not in {"prompt", "stream"}}
    if isinstance(typed.get("stop"), str):
        typed["stop"] = [typed["stop"]]
    if fields.get("prompt") is not None:
        typed["json_prompt"] = fields["prompt"]
    return json_format.ParseDict(typed, pb.CreateCompletionRequest())


def check_status(call: grpc.RpcError, row: Row) -> None:
    assert call.code() == STATUSES[row.status], call
    (detail,) = rpc_status.from_call(call).details
    wrapped = pb.ErrorResponse()
    assert detail.Unpack(wrapped)
    error = wrapped.error
    assert error.message == call.details()
    assert row.says in error.message
    assert error.type == "invalid_request_error"
    assert (error.param if error.HasField("param") else None) == row.param
    assert (error.code if error.HasField("code") else None) == row.code


def json_of(answer: pb.CreateCompletionResponse) -> dict[str, Any]:
    return render.response_json(answer, render.Form(usage=True))


@pytest.mark.parametrize(
    ("fields", "param", "code", "says"),
    [
        ({"tokens": pb.Tokens()}, "prompt", "empty_array", "must not be empty"),
        ({"texts": pb.TextBatch()}, "prompt", "empty_array", "must not be empty"),
        ({"token_batch": pb.TokenBatch()}, "prompt", "empty_array", "must not be empty"),
        ({"token_batch": pb.TokenBatch(prompts=[pb.Tokens()])}, "prompt", "empty_array", "must not be empty"),
        ({"tokens": pb.Tokens(ids=[-1])}, "prompt", "invalid_value", "Token id -1 is out of vocabulary (0..49151)"),
        ({"tokens": pb.Tokens(ids=[49152])}, "prompt", "invalid_value", "Token id 49152 is out of vocabulary"),
        ({"texts": pb.TextBatch(texts=["a"] * 129)}, "prompt", "array_above_max_length", "at most 128 prompts"),
        ({"texts": pb.TextBatch(texts=["a"] * 64), "n": 4}, "n", "invalid_value", "prompts*best_of must be <= 128"),
        ({"text": "a" * 2_000_000}, "prompt", "context_length_exceeded", "2000000 characters"),
        ({"text": "a", "json_prompt": struct_pb2.Value(string_value="b")}, "prompt", None, "not both"),
        ({"stop": ["a"], "json_stop": struct_pb2.Value(string_value="b")}, "stop", None, "not both"),
        ({"stream": True}, "stream", "invalid_value", "call StreamCompletion to stream"),
    ],
)
def test_typed(watched: Watched, fields, param, code, says) -> None:
    """Mistakes that only typed callers can make."""
    with pytest.raises(grpc.RpcError) as caught:
        watched.stub.CreateCompletion(pb.CreateCompletionRequest(model=MODEL, **fields), metadata=METADATA)
    check_status(caught.value, Row(Ask(), "SVC", 400, code, param, says))
    watched.check_nothing_left()


def nested(depth: int) -> bytes:
    """A request whose prompt is a list in a list in a list ..., as bytes: Python would not build it."""
    value = b"\x11" + bytes(8)  # Value.number_value
    for _ in range(depth):
        value = b"\x0a" + encoded_length(value) + value  # ListValue.values
        value = b"\x32" + encoded_length(value) + value  # Value.list_value
    return b"\x32" + encoded_length(value) + value  # CreateCompletionRequest.json_prompt


def encoded_length(data: bytes) -> bytes:
    length, digits = len(data), b""
    while length > 127:
        digits += bytes([length & 127 | 128])
        length >>= 7
    return digits + bytes([length])


@pytest.mark.parametrize(
    "data",
    [
        b"\x0a\x01\xff",
        b"\x12\x03\xed\xa0\x80",
        nested(101),
        nested(10_000),
        b"\xff\xff\xff",
        b"\x0a\xff",
        b"\x0a\x05ab",
    ],
    ids=lambda value: str(value)[:40],
)
def test_bytes_that_are_no_message(watched: Watched, data: bytes) -> None:
    """The answer is INVALID_ARGUMENT, with the service's own message."""
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        unary = channel.unary_unary("/completion.v1.CompletionService/CreateCompletion")
        stream = channel.unary_stream("/completion.v1.CompletionService/StreamCompletion")
        for call in (unary, lambda *given, **more: list(stream(*given, **more))):
            with pytest.raises(grpc.RpcError) as caught:
                call(data, metadata=METADATA)
            check_status(caught.value, Row(Ask(), "SVC", 400, says="not a valid protobuf message"))
    watched.check_nothing_left()


@pytest.mark.parametrize(
    ("method", "metadata", "size", "status"),
    [
        ("completion.v1.CompletionService/Nope", (), 0, grpc.StatusCode.UNIMPLEMENTED),
        ("nothing.v1.Nothing/Nope", (), 0, grpc.StatusCode.UNIMPLEMENTED),
        ("completion.v1.CompletionService/CreateCompletion", 12_000, 0, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("completion.v1.CompletionService/CreateCompletion", 20_000, 0, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ("completion.v1.CompletionService/CreateCompletion", (), 17 << 20, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_refused_by_grpc(watched: Watched, method, metadata, size, status) -> None:
    """Unknown methods, large metadata and large messages, which gRPC itself refuses, every time."""
    extra = [("x-large", "x" * metadata)] if metadata else []
    with grpc.insecure_channel(watched.stack.grpc_address) as channel:
        for _ in range(8):
            with pytest.raises(grpc.RpcError) as caught:
                channel.unary_unary(f"/{method}")(bytes(size), metadata=[*METADATA, *extra])
            assert caught.value.code() == status
    watched.check_nothing_left()


def test_deadline_that_has_passed(watched: Watched) -> None:
    """A call whose deadline has passed gets DEADLINE_EXCEEDED, and never reaches the engine."""
    before = watched.service.server.models[0].engine.reuse
    for _ in range(5):
        with pytest.raises(grpc.RpcError) as caught:
            watched.stub.CreateCompletion(message(GOOD), metadata=METADATA, timeout=-1)
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert watched.service.server.models[0].engine.reuse == before
    watched.check_nothing_left()


def test_zero_is_not_unset(watched: Watched) -> None:
    """Temperature 0 is greedy and max_tokens 0 generates nothing, while unset fields take their defaults."""
    ask = watched.stub.CreateCompletion
    request = pb.CreateCompletionRequest(model=MODEL, text="a", ignore_eos=True)
    assert ask(request, metadata=METADATA).usage.completion_tokens == 16
    request.temperature = 0
    assert len({ask(request, metadata=METADATA).choices[0].text for _ in range(2)}) == 1
    request.max_tokens = 0
    assert ask(request, metadata=METADATA).choices[0].text == ""
    watched.check_nothing_left()


HEAD = "POST /v1/completions HTTP/1.1\r\nAuthorization: Bearer test-key\r\n"
BODY = json.dumps(GOOD)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (f"{HEAD}Host: a\r\nContent-Length: {len(BODY)}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (f"{HEAD}Host: a\r\nContent-Length: 5\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}", 400),
        (f"{HEAD}Content-Length: {len(BODY)}\r\n\r\n{BODY}", 400),
        (f"{HEAD.replace('1.1', '1.0')}Host: a\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}", 200),
        (f"{HEAD.replace('1.1', '1.0')}Content-Length: {len(BODY)}\r\n\r\n{BODY}", 200),
        (f"{HEAD}Host: a\r\nX-Null: a\0b\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}", 400),
        ("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + "\0" * 64, 400),
    ],
    ids=["both lengths", "two lengths", "no host", "HTTP/1.0", "HTTP/1.0 without host", "NUL in a header", "TLS"],
)
def test_broken_http(watched: Watched, data: str, status: int) -> None:
    """Malformed HTTP is refused before anything else happens; HTTP/1.0 is well-formed."""
    with socket.create_connection(("127.0.0.1", watched.stack.http), timeout=PATIENCE) as connection:
        connection.sendall(data.encode("latin-1"))
        received = connection.recv(65536)
    assert re.match(rf"HTTP/1\.[01] {status} ".encode(), received), received
    watched.check_nothing_left()


@pytest.mark.parametrize(("padding", "status"), [((2 << 20) - 1024, 200), (2 << 20, 413)])
def test_many_small_chunks(watched: Watched, padding: int, status: int) -> None:
    """Two megabytes in chunks of six bytes are a normal body, and take no more of Envoy's memory."""
    body = (" " * (padding - padding % 6) + BODY).encode()
    pieces = (body[start : start + 6] for start in range(0, len(body), 6))
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    before = resident_mib(watched.envoy)
    with socket.create_connection(("127.0.0.1", watched.stack.http), timeout=PATIENCE) as connection:
        connection.sendall(f"{HEAD}Host: a\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):  # refused while still sending
            connection.sendall(chunks + b"0\r\n\r\n")
        received = connection.recv(65536)
    assert received.startswith(f"HTTP/1.1 {status} ".encode()), received
    assert resident_mib(watched.envoy) - before < 64
    watched.check_nothing_left()


def resident_mib(pid: int) -> int:
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(line) // 1024
