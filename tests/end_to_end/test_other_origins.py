"""Pages of other origins: what a browser asks before it lets them call, and what it lets them read."""

from __future__ import annotations

import json
import socket

import pytest

from tests.support.patience import PATIENCE
from tests.support.stack import AUTHORIZED, MODEL, Answer, Stack

PAGE = "http://localhost:3000"
LET_IN = [PAGE, "http://127.0.0.1:8000", "https://localhost", "http://[::1]:3000", "http://app.localhost:3000"]
KEPT_OUT = [
    "https://evil.example",
    "http://localhost.evil.example",
    "http://evil-localhost:3000",
    "null",
    "app://obsidian.md",
]
# What openai-node sends from a browser, and what it sends where its options say so.
SENT = [
    "authorization",
    "content-type",
    *(
        f"x-stainless-{name}"
        for name in ("arch", "lang", "os", "package-version", "retry-count", "runtime", "runtime-version", "timeout")
    ),
    "openai-organization",
    "openai-project",
    "idempotency-key",
    "x-client-request-id",
]


def preflight(stack: Stack, path: str, method: str = "POST", origin: str = PAGE) -> Answer:
    headers = {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": ",".join(SENT),
    }
    return stack.request("OPTIONS", path, headers=headers)


@pytest.mark.parametrize("origin", LET_IN)
def test_preflights_pass(stack: Stack, origin: str) -> None:
    """A page of this machine may call by POST and GET with whatever headers its client sends."""
    for path in ("/v1/completions", "/v1/models", "/completion.v1.CompletionService/CreateCompletion"):
        answer = preflight(stack, path, origin=origin)
        assert answer.status in {200, 204}
        assert answer.headers["access-control-allow-origin"] == origin
        assert {"GET", "POST"} <= set(answer.headers["access-control-allow-methods"].split(", "))
        assert set(SENT) <= set(answer.headers["access-control-allow-headers"].split(","))


@pytest.mark.parametrize("origin", KEPT_OUT)
def test_others_stay_out(stack: Stack, origin: str) -> None:
    """Pages from elsewhere may neither call nor read."""
    assert "access-control-allow-origin" not in preflight(stack, "/v1/completions", origin=origin).headers
    for path in ("/v1/models", "/v1/nothing", "/health"):
        answer = stack.request("GET", path, headers={**AUTHORIZED, "origin": origin})
        assert "access-control-allow-origin" not in answer.headers


JSON = {**AUTHORIZED, "content-type": "application/json"}
OWN = {
    "unknown path": ("GET", "/v1/nothing", "", {}, 404),
    "query": ("POST", "/v1/completions?a=b", "{}", JSON, 400),
    "method": ("PUT", "/v1/completions", "{}", JSON, 405),
    "form": ("POST", "/v1/completions", "a=b", {"content-type": "application/x-www-form-urlencoded"}, 415),
    "too large": ("POST", "/v1/completions", " " * ((2 << 20) + 1), JSON, 413),
    "no JSON": ("POST", "/v1/completions", "[", JSON, 400),
    "twice": ("POST", "/v1/completions", '{"max_tokens":1,"maxTokens":1}', JSON, 400),
    "underscore": ("GET", "/v1/models", "", {"a_b": "1"}, 400),
    "many headers": ("GET", "/v1/models", "", {f"a-{number}": "1" for number in range(70)}, 431),
    "health": ("GET", "/health", "", {}, 200),
    "description": ("GET", "/docs/openapi.yaml", "", {}, 200),
    "services refusal": ("POST", "/v1/completions", "{}", JSON, 400),
    "answer": ("POST", "/v1/completions", json.dumps({"model": MODEL, "max_tokens": 0}), JSON, 200),
}


@pytest.mark.parametrize("name", OWN)
def test_every_answer_can_be_read(stack: Stack, name: str) -> None:
    """Envoy's own answers like the service's: the page gets to see the message, and each header."""
    method, path, body, headers, status = OWN[name]
    answer = stack.request(method, path, body, {**headers, "origin": PAGE})
    assert answer.status == status
    assert answer.headers["access-control-allow-origin"] in {PAGE, "*"}
    assert answer.headers["access-control-expose-headers"] == "*"
    if status >= 400:
        assert answer.json["error"]["message"]


def test_a_request_that_is_late_can_be_read(stack: Stack) -> None:
    """A page of another origin can read the error for a body that is too late, with the time limit."""
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nOrigin: {PAGE}\r\nContent-Length: 9\r\n\r\n"
    with socket.create_connection(("127.0.0.1", stack.http), timeout=PATIENCE) as connection:
        connection.sendall(head.encode())
        received = b""
        while b"}}" not in received:
            received += connection.recv(4096)
    assert received.startswith(b"HTTP/1.1 408")
    assert f"access-control-allow-origin: {PAGE}".encode() in received
    assert b"headers may take 5 seconds, all of it may take 10" in received
