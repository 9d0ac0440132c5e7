"""The REST door as plain HTTP: the exact JSON of answers, and one error envelope on every path."""

from __future__ import annotations

import json
import re
import socket
import time

from completion.v1 import completion_pb2 as pb

from tests.patience import PATIENCE
from tests.stack import AUTHORIZED, MODEL, Answer, Stack

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
