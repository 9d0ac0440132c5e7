"""Limits of a key, a full queue and a flood, as callers meet them through the real Envoy."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.engine.engine import Engine
from service.settings import Settings
from tests.stack import MODEL, Answer, Replica, ServiceThread, Stack, envoy, free_ports
from tests.test_openapi import described

PER_MINUTE = 6


@dataclass(frozen=True)
class Limited:
    """A stack that limits keys, and its engine."""

    stack: Stack
    engine: Engine

    def ask(self, key: str, **fields: object) -> Answer:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        return self.stack.request("POST", "/v1/completions", json.dumps({"model": MODEL, **fields}), headers)


@pytest.fixture(scope="module")
def limited(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """A real server in this process that limits tokens and waits, behind a real Envoy."""
    http_port, grpc_port = free_ports(2)
    settings = Settings(
        model_dir=model_dir,
        port=grpc_port,
        max_running=16,
        max_queue_seconds=2,
        tokens_per_minute=20_000,
        drain_seconds=1,
    )
    folder = tmp_path_factory.mktemp("limits")
    with ServiceThread(settings) as service, envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Limited(stack, service.server.models[0].engine)


@pytest.fixture
def counted(model_dir: Path, tmp_path: Path) -> Iterator[Limited]:
    """A real server in this process that limits requests, behind a real Envoy."""
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, requests_per_minute=PER_MINUTE, drain_seconds=1)
    with ServiceThread(settings) as service, envoy(http_port, grpc_port, tmp_path):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Limited(stack, service.server.models[0].engine)


def test_requests_per_minute(counted: Limited) -> None:
    """So many at once, and then one each ten seconds, by whatever spelling of the header; other keys have their own."""
    answers = [counted.ask("rpm", prompt="a", max_tokens=1)]
    key = {"authorization": "bearer  rpm"}
    answers += [counted.stack.request("GET", "/v1/models", headers=key) for _ in range(PER_MINUTE - 1)]
    assert [answer.status for answer in answers] == [200] * PER_MINUTE
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["5", "4", "3", "2", "1", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"6"}
    for number in range(50):
        junk = {"authorization": f"Bearer junk-{number}"}
        assert counted.stack.request("GET", "/v1/models", headers=junk).status == 200
    refused = counted.stack.request("GET", "/v1/models", headers=key)
    assert refused.status == 429
    assert refused.json["error"]["type"] == "requests"
    assert refused.json["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["retry-after"]) <= 10
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert re.fullmatch(r"5\d(\.\d+)?s|1m0s", refused.headers["x-ratelimit-reset-requests"])
    assert refused.headers["x-request-id"]
    described(refused, "/v1/models", "get")
    described(answers[0], "/v1/completions", "post")
    with grpc.insecure_channel(counted.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(pb.ListModelsRequest(), metadata=[("authorization", "Bearer rpm")])
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        stub.ListModels(pb.ListModelsRequest(), metadata=[("authorization", "Bearer rpm-2")])


def test_tokens_per_minute(limited: Limited) -> None:
    """Over REST by OpenAI's headers, unary and streamed, and as an error that the official client raises as 429."""
    answer = limited.ask("tpm", prompt="Hello", max_tokens=9)
    assert answer.headers["x-ratelimit-limit-tokens"] == "20000"
    assert answer.headers["x-ratelimit-remaining-tokens"] == str(20_000 - 10)
    assert answer.headers["x-ratelimit-reset-tokens"] == "30ms"
    stream = limited.ask("tpm", prompt="Hello", max_tokens=9, stream=True)
    assert 19_980 <= int(stream.headers["x-ratelimit-remaining-tokens"]) <= 19_990
    assert stream.events[-1] == "[DONE]"
    with (
        openai.OpenAI(base_url=limited.stack.base_url, api_key="tpm", max_retries=0) as client,
        pytest.raises(openai.RateLimitError) as caught,
    ):
        client.completions.create(model=MODEL, prompt="Hello", max_tokens=4001, n=5)
    assert caught.value.type == "tokens"
    assert caught.value.code == "rate_limit_exceeded"
    assert caught.value.response.headers["retry-after"] == "60"
    assert int(caught.value.response.headers["x-ratelimit-remaining-tokens"]) > 19_900


def test_a_full_queue_refuses_at_once(limited: Limited) -> None:
    """Who would wait longer than allowed is told how long, at once; the queue does not grow, and others get in."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=600, n=32, ignore_eos=True)
    metadata = [("authorization", "Bearer full")]
    with grpc.insecure_channel(limited.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        # Of its sequences fifteen run; another request would wait for all others.
        held = stub.CreateCompletion.future(request, metadata=metadata)
        wait_for(lambda: limited.engine.stats.waiting == 17)
        time.sleep(1)  # some steps, by which the engine knows its pace
        began = time.monotonic()
        refused = [limited.ask("full", prompt="Once", max_tokens=10, stream=stream) for stream in (False, True, False)]
        seconds = time.monotonic() - began
        waiting = limited.engine.stats.waiting
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateCompletion(request, metadata=metadata, timeout=60)
        other = limited.ask("other", prompt="a", max_tokens=1)
        held.cancel()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]
    for answer in refused:
        assert answer.status == 429
        described(answer, "/v1/completions", "post")
        assert answer.json["error"]["type"] == "requests"
        assert answer.json["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) > 2
        assert 0 <= int(answer.headers["retry-after"]) - int(answer.headers["retry-after-ms"]) / 1000 < 1
    assert seconds < 0.5
    assert waiting == 17
    assert other.status == 200


def test_a_flood_does_not_keep_others_waiting(limited: Limited) -> None:
    """While one key sends more than can be computed, another's requests begin at once."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=24, ignore_eos=True)
    codes: Counter[grpc.StatusCode] = Counter()
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            call = stub.CreateCompletion.future(request, metadata=[("authorization", "Bearer flood")])
            codes[call.code()] += 1
            time.sleep(0.2 * (call.code() is not grpc.StatusCode.OK))

    with (
        grpc.insecure_channel(limited.stack.grpc_address) as channel,
        ThreadPoolExecutor(40) as pool,
        openai.OpenAI(base_url=limited.stack.base_url, api_key="light", max_retries=0) as client,
    ):
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        flooding = [pool.submit(flood) for _ in range(40)]
        wait_for(lambda: limited.engine.stats.running == 15 and limited.engine.stats.waiting > 0)
        waits = []
        for _ in range(3):
            began = time.monotonic()
            stream = iter(client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, stream=True))
            next(stream)
            waits.append(time.monotonic() - began)
            assert limited.engine.stats.waiting > 0
            list(stream)
        over.set()
        for each in flooding:
            each.result()
    assert max(waits) < 2
    assert codes[grpc.StatusCode.OK] > 0
    assert set(codes) <= {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}


def test_keys_change_without_a_restart(model_dir: Path, tmp_path: Path) -> None:
    """SIGHUP, or the file's change alone, brings new keys in and old ones out; a file that is gone changes nothing."""
    keys = tmp_path / "keys"

    def write(key: str) -> None:
        keys.write_text(f"{hashlib.sha256(key.encode()).hexdigest()} {key}\n")

    def opens(key: str) -> bool:
        metadata = [("authorization", f"Bearer {key}")]
        code = stub.ListModels.future(pb.ListModelsRequest(), metadata=metadata).code()
        assert code in {grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED}
        return code is grpc.StatusCode.OK

    write("first")
    (port,) = free_ports(1)
    service = Replica(model_dir, port, tmp_path, "--api-keys-file", str(keys))
    service.start()
    try:
        service.wait_until_serving()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            assert [opens(key) for key in ("first", "second")] == [True, False]
            write("second")
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: opens("second"))
            assert not opens("first")
            write("third")
            wait_for(lambda: opens("third"))
            keys.unlink()
            service.process.send_signal(signal.SIGHUP)
            wait_for(lambda: "stay as they were" in service.log.read_text())
            assert opens("third")
        assert service.process.poll() is None
    finally:
        service.kill()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
