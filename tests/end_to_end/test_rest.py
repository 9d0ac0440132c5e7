"""The REST API as plain HTTP: the exact JSON of answers, and one error envelope on every path."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import time
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, MODEL, Answer, Stack

MINIMAL = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": 1})
JSON = {**AUTHORIZED, "content-type": "application/json"}


def post(stack: Stack, body: str | bytes, headers: dict[str, str] = JSON, path: str = "/v1/completions") -> Answer:
    return stack.request("POST", path, body, headers)


def assert_envelope(answer: Answer) -> dict:
    """Checks an error's form, and gives the error."""
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    assert set(answer.json) == {"error"}
    error = answer.json["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert error["type"]
    return error


def test_the_answer_to_the_readme_curl(stack: Stack) -> None:
    """The mission's request gets exactly OpenAI's keys and types: nulls printed, zero printed, numbers as numbers."""
    body = '{"model": "gpt-3.5-turbo-instruct", "prompt": "Hello,", "max_tokens": 30, "temperature": 0}'
    answer = post(stack, body)
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    found = answer.json
    assert list(found) == ["id", "object", "created", "model", "choices", "usage"]
    assert re.fullmatch(r"cmpl-[0-9A-Za-z]{29}", found["id"])
    assert abs(found["created"] - time.time()) < PATIENCE
    (choice,) = found["choices"]
    assert set(choice) == {"text", "index", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 30, "total_tokens": 32}
    assert answer.headers["x-request-id"]


def test_both_renderings_of_a_whole_answer_agree(stack: Stack) -> None:
    """Envoy's transcoding and the service's own JSON are the same, also where a body only seems to ask for a stream."""
    fields = {
        "model": MODEL,
        "prompt": 'Hi 😀 "there"\n',
        "max_tokens": 5,
        "temperature": 0,
        "logprobs": 2,
        "echo": True,
    }
    post(stack, json.dumps(fields))  # so that both find the same in the cache
    transcoded = post(stack, json.dumps(fields, ensure_ascii=False)).json
    own = post(stack, json.dumps({**fields, "stream": False}, ensure_ascii=False)).json
    for answer in (transcoded, own):
        del answer["id"], answer["created"]
    assert own == transcoded
    assert own["choices"][0]["logprobs"]["top_logprobs"][0] is None
    assert own["choices"][0]["text"].startswith(fields["prompt"])


def test_stream_of_events(stack: Stack) -> None:
    """A stream is server-sent events of the unary shape, closed by [DONE]; usage is a key only when asked for."""
    fields = {"prompt": "Hello,", "max_tokens": 4, "temperature": 0, "stream": True}
    answer = stack.complete(**fields)
    assert answer.headers["content-type"] == "text/event-stream"
    *events, done = answer.events
    assert done == "[DONE]"
    for event in map(json.loads, events):
        assert set(event) == {"id", "object", "created", "model", "choices"}
        assert set(event["choices"][0]) == {"text", "index", "logprobs", "finish_reason"}
    *events, done = stack.complete(**fields, stream_options={"include_usage": True}).events
    parsed = [json.loads(event) for event in events]
    assert [event["usage"] for event in parsed[:-1]] == [None] * (len(parsed) - 1)
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 4


def test_escaped_stream_key_is_honoured(stack: Stack) -> None:
    """The service goes by the parsed field, however the JSON spells it."""
    body = '{"model":"MODEL","prompt":"Hello,","max_tokens":2,"str\\u0065am":true}'.replace("MODEL", MODEL)
    assert post(stack, body).events[-1] == "[DONE]"


def test_stream_refusal_has_its_status(stack: Stack) -> None:
    """A streamed request that is refused gets its status and the envelope, not an event."""
    answer = stack.complete(prompt="a", stream=True, n=0)
    assert answer.status == 400
    assert assert_envelope(answer)["param"] == "n"


def test_slow_headers_time_out(stack: Stack) -> None:
    """Headers that do not arrive within five seconds are 408 with the envelope."""
    with socket.create_connection(("127.0.0.1", stack.http), timeout=PATIENCE) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n")
        received = b""
        while chunk := connection.recv(4096):
            received += chunk
            if b"}}" in received:
                break
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"error"' in received


def test_callers_cannot_forge_headers(stack: Stack) -> None:
    """A caller's grpc-timeout, request id and Envoy headers change nothing."""
    forged = {**JSON, "grpc-timeout": "1n", "x-request-id": "mine", "x-envoy-upstream-rq-timeout-ms": "1"}
    answer = post(stack, MINIMAL, forged)
    assert answer.status == 200
    assert answer.headers["x-request-id"] != "mine"


def test_grpc_web(stack: Stack) -> None:
    """The same listener answers gRPC-Web: a length-prefixed message, then the trailers in a frame of their own."""
    message = pb.CreateCompletionRequest(model=MODEL, text="Hello,", max_tokens=2, temperature=0).SerializeToString()
    headers = {**AUTHORIZED, "content-type": "application/grpc-web+proto", "x-grpc-web": "1"}
    frame = b"\0" + len(message).to_bytes(4, "big") + message
    answer = post(stack, frame, headers, "/completion.v1.CompletionService/CreateCompletion")
    assert answer.status == 200
    length = int.from_bytes(answer.body[1:5], "big")
    response = pb.CreateCompletionResponse.FromString(answer.body[5 : 5 + length])
    assert response.usage.completion_tokens == 2
    trailers = answer.body[5 + length :]
    assert trailers[0] == 0x80
    assert b"grpc-status:0" in trailers.replace(b" ", b"")


def test_models(stack: Stack) -> None:
    """The list of models is a list object whose numbers are numbers."""
    listed = stack.request("GET", "/v1/models").json
    assert set(listed) == {"object", "data"}
    assert listed["object"] == "list"
    for model in listed["data"]:
        assert set(model) == {"id", "object", "created", "owned_by", "max_model_len"}
        assert isinstance(model["created"], int)
        assert isinstance(model["max_model_len"], int)
        assert stack.request("GET", f"/v1/models/{model['id']}").json == model


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/v1/models/nothing", "/health", "/docs", "/"])
@pytest.mark.parametrize("version", ["--http1.1", "--http2-prior-knowledge"])
def test_head(stack: Stack, path: str, version: str) -> None:
    """HEAD is answered wherever GET is, with the headers of GET and no body."""
    address = f"http://{stack.envoy_address}{path}"
    command = ["curl", "-sS", "--include", version, "-H", f"authorization: {AUTHORIZED['authorization']}", address]
    got, head = (
        subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
        for more in ([], ["--head"])
    )
    (*lines, status), body = head_of(got)
    (*lines_of_head, status_of_head), nothing = head_of(head)
    assert (status_of_head, nothing) == (status, "")
    assert lines_of_head == lines
    assert not body or f"content-length: {len(body.encode())}" in lines


def head_of(text: str) -> tuple[list[str], str]:
    """An answer's headers but for what differs each time, then its status line; and its body."""
    status, *lines = text.replace("\r\n", "\n").partition("\n\n")[0].split("\n")
    varying = ("date:", "x-request-id:", "openai-processing-ms:", "content-length: 0", "transfer-encoding:")
    kept = sorted(line for line in lines if not line.startswith(varying))
    return [*kept, status.strip()], text.replace("\r\n", "\n").partition("\n\n")[2]


def test_how_long_it_took(stack: Stack) -> None:
    """Every answer of the API says how many milliseconds it took, Envoy's own took none."""
    began = time.monotonic()
    whole = stack.complete(prompt="Hello,", max_tokens=20, ignore_eos=True)
    elapsed = 1000 * (time.monotonic() - began)
    assert 0 < int(whole.headers["openai-processing-ms"]) <= elapsed
    for answer in (stack.complete(prompt="a", max_tokens=2, stream=True), stack.complete(n=0)):
        assert int(answer.headers["openai-processing-ms"]) >= 0
    assert stack.request("GET", "/v1/models").headers["openai-processing-ms"].isdecimal()
    assert stack.request("GET", "/v1/nothing").headers["openai-processing-ms"] == "0"


def test_the_callers_own_id_comes_back(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """`x-client-request-id` comes with every answer, by both doors, and is in both logs."""
    name, headers = f"mine {time.time()} ~", {**JSON, "x-client-request-id": "-"}
    for body in (MINIMAL, MINIMAL.replace("1}", '1,"stream":true}'), "{}", '{"model":"x"}', "["):
        answer = post(stack, body, {**headers, "x-client-request-id": name})
        assert answer.headers["x-client-request-id"] == name
    assert stack.request("GET", "/v1/x", headers={"x-client-request-id": name}).headers["x-client-request-id"] == name
    metadata = [*AUTHORIZED.items(), ("x-client-request-id", name)]
    _, call = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=metadata)
    assert dict(call.trailing_metadata())["x-client-request-id"] == name
    with grpc.insecure_channel(stack.envoy_address) as channel:
        through = completion_pb2_grpc.CompletionServiceStub(channel)
        _, call = through.ListModels.with_call(pb.ListModelsRequest(), metadata=metadata)
    assert dict(call.trailing_metadata())["x-client-request-id"] == name
    assert stack.logs is not None
    eventually(lambda: logged(stack.logs / "service.log", name) >= 6)
    eventually(lambda: logged(stack.logs / "envoy.log", name) >= 7)


def logged(path: Path, client_id: str) -> int:
    """How many lines of a log say this id."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    return sum(line.get("client_request_id") == client_id for line in lines)


def test_an_id_that_is_too_long_over_grpc(stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """It is refused with its bound there too."""
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListModels(pb.ListModelsRequest(), metadata=[*AUTHORIZED.items(), ("x-client-request-id", "x" * 513)])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 512 characters" in caught.value.details()


def test_messages_are_written_plainly(stack: Stack) -> None:
    """No escapes where none are needed, and a name that looks like one stays what it is."""
    refused = stack.complete(n=0)
    assert b"Expected a value >= 1, but got 0 instead." in refused.body
    assert refused.json["error"]["code"] == "integer_below_min_value"
    for name in ("<a> & 'b'", "\\u003e", "\\", '\\"', "\\\\u003c<"):
        answer = stack.complete(model=name)
        assert answer.json["error"]["message"].startswith("The model `" + name.replace("\\\\", "\\\\"))
        assert b"\\u003c" not in answer.body.replace(b"\\\\", b"")


def test_streams_are_not_held_back(stack: Stack) -> None:
    """An event stream tells proxies to pass it on as it comes; a whole answer has nothing to say of that."""
    streamed = stack.complete(prompt="a", max_tokens=2, stream=True)
    assert streamed.headers["x-accel-buffering"] == "no"
    assert streamed.headers["cache-control"] == "no-cache"
    for answer in (stack.complete(prompt="a", max_tokens=2), stack.complete(stream=True, n=0)):
        assert "x-accel-buffering" not in answer.headers


@pytest.mark.parametrize("protocol", ["websocket", "TLS/1.2", "h3", "h2c"])
def test_upgrades_are_ignored(stack: Stack, protocol: str) -> None:
    """A client that offers another protocol is answered over HTTP/1.1, whether its request is valid or refused."""
    offer = {"connection": "upgrade", "upgrade": protocol}
    assert post(stack, MINIMAL, {**JSON, **offer}).status == 200
    assert stack.request("GET", "/v1/models", headers={**AUTHORIZED, **offer}).status == 200
    refused = stack.request("GET", "/v1/realtime", headers={**AUTHORIZED, **offer})
    assert refused.status == 404
    assert "GET /v1/realtime" in assert_envelope(refused)["message"]


def test_nobody_is_told_what_serves(stack: Stack) -> None:
    """No header names the server, or is empty."""
    for answer in (stack.request("GET", "/health"), stack.request("GET", "/v1/models")):
        assert "server" not in answer.headers
        assert all(answer.headers.values())


def raw(stack: Stack, data: str) -> bytes:
    """All that comes back for these bytes until the connection is closed."""
    with socket.create_connection(("127.0.0.1", stack.http), timeout=PATIENCE) as connection:
        connection.sendall(data.encode("latin-1"))
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


@pytest.mark.parametrize("host", ["", "Host: a\r\n"])
def test_http_1_0(stack: Stack, host: str) -> None:
    """Health, whole answers and streams, with a Host header and without."""
    assert raw(stack, f"GET /health HTTP/1.0\r\n{host}\r\n").startswith(b"HTTP/1.0 200 OK")
    for body, part in (
        (MINIMAL, b'"text_completion"'),
        (MINIMAL.replace("1}", '1,"stream":true}'), b"data: [DONE]\n\n"),
    ):
        head = f"POST /v1/completions HTTP/1.0\r\n{host}Authorization: Bearer k\r\nContent-Length: {len(body)}\r\n\r\n"
        received = raw(stack, head + body)
        assert received.startswith(b"HTTP/1.0 200 OK")
        assert part in received


@pytest.mark.parametrize(
    "data",
    [
        "CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n",
        "NONSENSE\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: x\r\n\r\n",
    ],
)
def test_no_refusal_is_without_words(stack: Stack, data: str) -> None:
    """A request for something that this service does not have gets a 4xx status and an OpenAI error."""
    received = raw(stack, data)
    assert received.startswith(b"HTTP/1.1 4")
    error = json.loads(received.partition(b"\r\n\r\n")[2])["error"]
    assert len(error["message"]) > 20


def test_grpc_callers_keep_a_plain_message(stack: Stack) -> None:
    """An unknown method is UNIMPLEMENTED through Envoy, with words and without an envelope."""
    with grpc.insecure_channel(stack.envoy_address) as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/nothing.v1.Nothing/Nope")(b"", metadata=list(AUTHORIZED.items()))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == "Unknown URL."
