"""Limits of a key, a full queue and a flood, as callers meet them through the real Envoy."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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

from service.engine.engine import Engine, Stats
from service.engine.ort.model import Model
from service.settings import Settings
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import MODEL, Answer, Replica, ServiceThread, Stack, envoy, free_ports
from tests.test_openapi import described

PER_MINUTE = 6
INTERVAL = 60 // PER_MINUTE


@dataclass(frozen=True)
class Limited:
    """A stack that limits keys, and its engine."""

    stack: Stack
    engine: Engine

    def ask(self, key: str, **fields: object) -> Answer:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        return self.stack.request("POST", "/v1/completions", json.dumps({"model": MODEL, **fields}), headers)


@contextmanager
def limiting(model_dir: Path, folder: Path, **settings: float) -> Iterator[Limited]:
    """A real server of sixteen slots in this process behind a real Envoy."""
    http_port, grpc_port = free_ports(2)
    made = Settings(model_dir=model_dir, port=grpc_port, max_running=16, drain_seconds=1, **settings)
    with ServiceThread(made) as service, envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Limited(stack, service.server.models[0].engine)


@pytest.fixture(scope="module")
def limited(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Limited]:
    """It allows 20,000 tokens a minute to a key, and waits of 2 s."""
    with limiting(model_dir, tmp_path_factory.mktemp("limits"), max_queue_seconds=2, tokens_per_minute=20_000) as made:
        yield made


@pytest.fixture
def counted(model_dir: Path, tmp_path: Path) -> Iterator[Limited]:
    """It allows PER_MINUTE requests a minute to a key."""
    with limiting(model_dir, tmp_path, requests_per_minute=PER_MINUTE) as made:
        yield made


def test_requests_per_minute(counted: Limited) -> None:
    """So many at once, and then one each ten seconds, by whatever spelling of the header; other keys have their own."""
    began = time.monotonic()
    key = {"authorization": "bearer  rpm"}
    answers = until_refused(lambda: counted.ask("rpm", prompt="a", max_tokens=1))
    for number in range(50):
        junk = {"authorization": f"Bearer junk-{number}"}
        assert counted.stack.request("GET", "/v1/models", headers=junk).status == 200
    models = until_refused(lambda: counted.stack.request("GET", "/v1/models", headers=key))
    with grpc.insecure_channel(counted.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)

        def code(key: str) -> grpc.StatusCode:
            return stub.ListModels.future(pb.ListModelsRequest(), metadata=[("authorization", f"Bearer {key}")]).code()

        typed = list(iter(lambda: code("rpm"), grpc.StatusCode.RESOURCE_EXHAUSTED))
        assert set(typed) <= {grpc.StatusCode.OK}
        allowed = len(answers[:-1]) + len(models[:-1]) + len(typed)
        assert PER_MINUTE <= allowed <= PER_MINUTE + (time.monotonic() - began) // INTERVAL + 1
        assert code("rpm-2") is grpc.StatusCode.OK
    remaining = [int(answer.headers["x-ratelimit-remaining-requests"]) for answer in answers]
    assert (remaining[0], remaining[-2:]) == (PER_MINUTE - 1, [0, 0])
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {str(PER_MINUTE)}
    for refused in (answers[-1], models[-1]):
        assert refused.status == 429
        assert refused.json["error"]["type"] == "requests"
        assert refused.json["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= INTERVAL
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        assert re.fullmatch(r"5\d(\.\d+)?s|1m0s", refused.headers["x-ratelimit-reset-requests"])
        assert refused.headers["x-request-id"]
    described(models[-1], "/v1/models", "get")
    described(answers[0], "/v1/completions", "post")


def until_refused(ask: Callable[[], Answer]) -> list[Answer]:
    """The answers up to the first that is no success, that included."""
    answers = [ask()]
    while answers[-1].status == 200:
        answers.append(ask())
    return answers


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
    """A request that would wait too long is refused at once with the estimate; other callers still get in."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=600, n=32, ignore_eos=True)
    metadata = [("authorization", "Bearer full")]
    with grpc.insecure_channel(limited.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        # Of its sequences fifteen run; another request would wait for all others.
        held = stub.CreateCompletion.future(request, metadata=metadata)
        eventually(lambda: limited.engine.stats.waiting == 17)
        steps = limited.engine.steps.turns + 20
        eventually(lambda: limited.engine.steps.turns > steps)  # by which the engine knows its pace
        began = time.monotonic()
        refused = [limited.ask("full", prompt="Once", max_tokens=10, stream=stream) for stream in (False, True, False)]
        print(f"three requests refused within {time.monotonic() - began:.3f} s")
        meanwhile = limited.engine.stats
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateCompletion(request, metadata=metadata, timeout=PATIENCE)
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
    assert meanwhile == Stats(running=15, waiting=17)  # no request has got a slot in the meantime
    assert other.status == 200


def test_a_flood_does_not_keep_others_waiting(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one key sends more than is taken, another's requests begin before any that runs for that key has ended.

    Until then a step of the tiny model takes 50 ms, so what runs for that key takes 30 s.
    """
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=600, ignore_eos=True)
    codes: Counter[grpc.StatusCode] = Counter()
    over, hurry = threading.Event(), threading.Event()
    forward = Model.forward

    def slowly(*arguments: Any) -> Any:
        hurry.wait(0.05)
        return forward(*arguments)

    def flood() -> None:
        while not over.is_set():
            call = stub.CreateCompletion.future(request, metadata=[("authorization", "Bearer flood")])
            codes[call.code()] += 1
            over.wait(0.2 * (call.code() is not grpc.StatusCode.OK))

    with (
        limiting(tiny_model, tmp_path, max_queue_seconds=1e9, max_waiting=20) as flooded,
        grpc.insecure_channel(flooded.stack.grpc_address) as channel,
        ThreadPoolExecutor(40) as pool,
        openai.OpenAI(base_url=flooded.stack.base_url, api_key="light", max_retries=0) as client,
    ):
        monkeypatch.setattr(Model, "forward", slowly)
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        for _ in range(40):
            pool.submit(flood)
        try:
            eventually(lambda: flooded.engine.stats == Stats(15, 10) and codes[grpc.StatusCode.RESOURCE_EXHAUSTED])
            for _ in range(3):
                began = time.monotonic()
                stream = iter(client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, stream=True))
                next(stream)
                print(f"first token after {time.monotonic() - began:.2f} s")
                assert not codes[grpc.StatusCode.OK]
                list(stream)
            hurry.set()
            eventually(lambda: codes[grpc.StatusCode.OK])
            assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
        finally:
            hurry.set()
            over.set()
            channel.close()


def test_keys_change_without_a_restart(tiny_model: Path, tmp_path: Path) -> None:
    """SIGHUP, or just the changed file, replaces the keys; a missing file changes nothing."""
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
    service = Replica(tiny_model, port, tmp_path, "--api-keys-file", str(keys))
    service.start()
    try:
        service.wait_until_serving()
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            assert [opens(key) for key in ("first", "second")] == [True, False]
            write("second")
            service.process.send_signal(signal.SIGHUP)
            eventually(lambda: opens("second"))
            assert not opens("first")
            write("third")
            eventually(lambda: opens("third"))
            keys.unlink()
            service.process.send_signal(signal.SIGHUP)
            eventually(lambda: "stay as they were" in service.log.read_text())
            assert opens("third")
        assert service.process.poll() is None
    finally:
        service.kill()
