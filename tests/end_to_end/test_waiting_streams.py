"""Streams that wait for their first token: headers and comments come, and what fails later is an event."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from service.engine.ort.model import Model
from service.rpc import servicer
from service.settings import Settings
from tests.support.patience import PATIENCE
from tests.support.processes import TINY
from tests.support.stack import AUTHORIZED, ServiceThread, Stack, envoy, free_ports

SILENCE = 0.4
BODY = {"model": TINY, "prompt": "the", "stream": True, "max_tokens": 4, "temperature": 0, "ignore_eos": True}


class Gate:
    """Stands before the model's steps: `allowed` pass while it is shut, and none succeeds while it is `broken`."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.allowed = 0
        self.broken = False

    def pass_through(self) -> None:
        if not self.open.is_set():
            self.allowed -= 1
            assert self.allowed >= 0 or self.open.wait(PATIENCE)
        if self.broken:
            raise RuntimeError("told to fail")


@dataclass(frozen=True)
class Held:
    """A stack, and the gate before its model."""

    stack: Stack
    gate: Gate


@pytest.fixture(scope="module")
def held(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Held]:
    """The service in this process, where a stream is silent for less long than 15 s before it says so."""
    gate, forward = Gate(), Model.forward

    def gated(model, *given):
        gate.pass_through()
        return forward(model, *given)

    http_port, grpc_port = free_ports(2)
    folder = tmp_path_factory.mktemp("held")
    settings = Settings(model_dir=tiny_model, port=grpc_port, drain_seconds=1, threads=1, metrics_port=0)
    with pytest.MonkeyPatch.context() as patch:
        assert servicer._SILENCE_SECONDS == 15
        patch.setattr(servicer, "_SILENCE_SECONDS", SILENCE)
        patch.setattr(Model, "forward", gated)
        with ServiceThread(settings), envoy(http_port, grpc_port, folder):
            stack = Stack(http_port, grpc_port)
            stack.wait_until_ready()
            yield Held(stack, gate)


@contextmanager
def closed(held: Held, after: int = 0) -> Iterator[None]:
    """The model pauses after `steps` more steps, until the block ends."""
    held.gate.allowed = after
    held.gate.open.clear()
    try:
        yield
    finally:
        held.gate.open.set()
        held.gate.broken = False


@contextmanager
def asked(held: Held, **fields: object) -> Iterator[http.client.HTTPResponse]:
    """The answer to a stream, as soon as its headers have come."""
    connection = http.client.HTTPConnection("127.0.0.1", held.stack.http, timeout=PATIENCE)
    try:
        headers = {**AUTHORIZED, "content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps({**BODY, **fields}), headers)
        yield connection.getresponse()
    finally:
        connection.close()


def blocks(answer: http.client.HTTPResponse, count: int) -> list[str]:
    """The next `count` blocks of an event stream: a line and an empty line each."""
    read = []
    for _ in range(count):
        read.append(answer.readline().decode())
        assert answer.readline() == b"\n"
    return read


def test_a_stream_that_waits_says_so(held: Held) -> None:
    """Its headers come without a token, with a comment, and then one comment after the other; then the tokens."""
    with closed(held):
        began = time.monotonic()
        with asked(held) as answer:
            assert answer.status == 200
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["x-accel-buffering"] == "no"
            waited = blocks(answer, 3)
            assert time.monotonic() - began >= 3 * SILENCE
            held.gate.open.set()
            rest = answer.read().decode()
    assert all(line.startswith(":") for line in waited)
    events = [line for line in rest.split("\n\n") if line and not line.startswith(":")]
    assert events[-1] == "data: [DONE]"
    tokens = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    assert tokens[-1]["finish_reason"] == "length"


def test_between_tokens_too(held: Held) -> None:
    """A stream that pauses after its first pieces sends comments too."""
    with closed(held, after=2), asked(held) as answer:
        first = blocks(answer, 1)[0]
        assert first.startswith("data: {")
        while not blocks(answer, 1)[0].startswith(":"):
            pass
        held.gate.open.set()
        assert answer.read().endswith(b"data: [DONE]\n\n")


def test_what_moves_says_nothing(held: Held) -> None:
    """A stream whose tokens come holds no comment."""
    answer = held.stack.complete(**{**BODY, "max_tokens": 300})
    assert all(block.startswith(("{", "[")) for block in answer.events)


def test_a_failure_after_the_comment_is_an_event(held: Held) -> None:
    """The status has been said: what goes wrong then comes as an event of the envelope, and the stream ends."""
    with closed(held), asked(held) as answer:
        assert blocks(answer, 1)[0].startswith(":")
        held.gate.broken = True
        held.gate.open.set()
        rest = [line for line in answer.read().decode().split("\n\n") if line and not line.startswith(":")]
    error = json.loads(rest[-1].removeprefix("data: "))["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "server_error"


def test_a_refusal_still_has_its_status(held: Held) -> None:
    """Requests that can be refused at once are."""
    with asked(held, n=0) as answer:
        assert answer.status == 400


def test_whole_answers_wait_in_silence(held: Held) -> None:
    """They have nothing to say before the end: one body, of JSON."""
    with ThreadPoolExecutor(1) as pool, closed(held):
        answer = pool.submit(held.stack.complete, **{**BODY, "stream": False})
        time.sleep(3 * SILENCE)
        assert not answer.done()
        held.gate.open.set()
        assert answer.result().json["object"] == "text_completion"


def test_the_official_client_skips_comments(held: Held) -> None:
    """The official client reads the tokens as if there had been no comments."""
    with openai.OpenAI(base_url=held.stack.base_url, api_key="k", max_retries=0) as client, closed(held):
        stream = client.completions.create(model=TINY, prompt="the", stream=True, max_tokens=4, temperature=0)
        time.sleep(2 * SILENCE)
        held.gate.open.set()
        assert [piece.choices[0].finish_reason for piece in stream][-1] in {"length", "stop"}
