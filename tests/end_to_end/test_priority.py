"""Priority orders one caller's requests; keys of one name are one caller, and a key may have a bound."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.engine.engine import Engine
from service.settings import Settings
from tests.support.patience import eventually
from tests.support.stack import MODEL, Answer, ServiceThread, Stack, envoy, free_ports
from tests.test_openapi import described


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


LINES = f"""
{digest("one")} team
{digest("two")} team most_urgent=-5
{digest("slow")} batch most_urgent=20
"""


@dataclass(frozen=True)
class Keyed:
    """A stack of one slot whose keys are in `file`."""

    stack: Stack
    engine: Engine
    file: Path

    def ask(self, key: str, **fields: Any) -> Answer:
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        body = {"model": MODEL, "prompt": "a", "max_tokens": 1, **fields}
        return self.stack.request("POST", "/v1/completions", json.dumps(body), headers)

    @contextmanager
    def held(self, key: str) -> Iterator[Any]:
        """A stream that keeps the slot while the block runs."""
        request = pb.CreateCompletionRequest(model=MODEL, text="a", max_tokens=4000, ignore_eos=True)
        with grpc.insecure_channel(self.stack.grpc_address) as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            stream = stub.StreamCompletion(request, metadata=[("authorization", f"Bearer {key}")])
            next(stream)
            yield stream
            stream.cancel()


def healthy(stack: Stack) -> bool:
    """Whether Envoy answers, and sends requests to the service."""
    try:
        return stack.request("GET", "/health").status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def keyed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("priority")
    file = folder / "keys"
    file.write_text(LINES)
    http_port, grpc_port = free_ports(2)
    settings = Settings(
        model_dir=model_dir,
        port=grpc_port,
        max_running=1,
        max_queue_seconds=3600,
        drain_seconds=1,
        api_keys_file=file,
        metrics_port=0,
    )
    with ServiceThread(settings) as running, envoy(http_port, grpc_port, folder, api_keys_file=file):
        stack = Stack(http_port, grpc_port)
        eventually(lambda: healthy(stack))
        yield Keyed(stack, running.server.models[0].engine, file)


def order(keyed: Keyed, asked: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The order in which requests by key and priority are answered, sent one after the other while the slot is held."""
    done: list[tuple[str, int]] = []
    lock = threading.Lock()

    def ask(key: str, priority: int) -> None:
        assert keyed.ask(key, priority=priority).status == 200
        with lock:
            done.append((key, priority))

    with ThreadPoolExecutor(len(asked)) as pool:
        waiting = []
        with keyed.held("one"):
            for number, (key, priority) in enumerate(asked, 1):
                waiting.append(pool.submit(ask, key, priority))
                eventually(lambda number=number: keyed.engine.stats.waiting == number, lambda: keyed.engine.stats)
        for each in waiting:
            each.result()
    return done


def test_priority_orders_what_waits(keyed: Keyed) -> None:
    """Of the caller that both keys are, the more urgent first, whichever key it came with."""
    asked = [("one", 10), ("two", 3), ("one", 0), ("two", -5), ("one", -7)]
    assert order(keyed, asked) == [("one", -7), ("two", -5), ("one", 0), ("two", 3), ("one", 10)]


def test_a_keys_bound(keyed: Keyed) -> None:
    """More urgent is 403 and PERMISSION_DENIED, with the bound; at the bound it is served, and without a priority."""
    for key, bound in (("two", -5), ("slow", 20)):
        refused = keyed.ask(key, priority=bound - 1)
        described(refused, "/v1/completions", "post")
        error = refused.json["error"]
        assert (refused.status, error["param"], error["code"]) == (403, "priority", "priority_not_allowed")
        assert f"more urgent than {bound}, but got {bound - 1} instead" in error["message"]
        with grpc.insecure_channel(keyed.stack.envoy_address) as channel, pytest.raises(grpc.RpcError) as caught:
            completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(
                pb.CreateCompletionRequest(model=MODEL, text="a", priority=bound - 1),
                metadata=[("authorization", f"Bearer {key}")],
            )
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, error["message"])
        assert keyed.ask(key, priority=bound).status == 200
        assert keyed.ask(key).status == 200
    assert keyed.ask("one", priority=-100).status == 200


def test_a_removed_key_ends_its_own_calls(keyed: Keyed) -> None:
    """Not those of another key of the same name."""
    with keyed.held("one") as stream, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(keyed.ask, "two")
        eventually(lambda: keyed.engine.stats.waiting == 1, lambda: keyed.engine.stats)
        fresh = keyed.file.with_name("fresh")
        fresh.write_text(LINES.replace(f"{digest('two')} team most_urgent=-5\n", ""))
        fresh.replace(keyed.file)
        refused = waiting.result()
        assert refused.status == 401
        assert "revoked" in refused.json["error"]["message"]
        assert next(stream).choices
