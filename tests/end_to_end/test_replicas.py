"""Two service processes behind one Envoy: what callers notice when one of them is killed, hangs or is restarted."""

from __future__ import annotations

import http.client
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from tests.support.patience import eventually
from tests.support.replicas import Pair, serving_pair
from tests.support.stack import AUTHORIZED, MODEL, Replica, Stack, envoy, envoy_counts, free_ports

# What takes far longer than to begin as many streams.
TOKENS = 300


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with serving_pair(tiny_model, tmp_path_factory.mktemp("replicas")) as made:
        yield made


# Between two requests of a thread, in seconds: a load that leaves the processor some time to start a replica in.
_PAUSE = 0.05


class Load:
    """Unary requests from some threads, one after the other each, counted by status while the block runs."""

    def __init__(self, stack: Stack, threads: int, max_tokens: int) -> None:
        self.statuses: Counter[int | str] = Counter()
        self._ask = lambda: stack.complete(prompt="Once", max_tokens=max_tokens, ignore_eos=True)
        self._threads = threads
        self._stop = threading.Event()
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        return self.statuses.total()

    def wait_for(self, count: int) -> None:
        """Returns once `count` requests have been answered."""
        eventually(lambda: self.done >= count, lambda: self.statuses)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                found: int | str = self._ask().status
            except (OSError, http.client.HTTPException) as error:
                found = repr(error)
            with self._lock:
                self.statuses[found] += 1
            self._stop.wait(_PAUSE)

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(self._threads)
        self._futures = [self._pool.submit(self._run) for _ in range(self._threads)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for future in self._futures:
            future.result()


def test_a_killed_replica_costs_no_unary_request(pair: Pair) -> None:
    """Under load: what the killed one was computing is computed by the other, and all get their answer."""
    with Load(pair.stack, threads=12, max_tokens=12) as load:
        load.wait_for(24)
        pair.replicas[0].kill()
        load.wait_for(load.done + 60)
        pair.replicas[0].start()
        pair.wait_until_both_serve()
        load.wait_for(load.done + 12)
    assert set(load.statuses) == {200}


def outcome(response: http.client.HTTPResponse) -> str:
    """How a stream ends: "done", "error" if the client can see it, or "cut" if it looks complete and is not."""
    try:
        rest = response.read()
    except (http.client.IncompleteRead, ConnectionError):
        return "error"
    finally:
        response.close()
    if rest.endswith(b"data: [DONE]\n\n"):
        return "done"
    return "error" if b'"error"' in rest else "cut"


def test_streams_of_a_killed_replica_end_with_an_error(pair: Pair) -> None:
    """Those whose replica is gone hear that theirs broke, over REST and over gRPC; the others go on to their end."""
    streams = [pair.stack.begin(max_tokens=TOKENS) for _ in range(4)]
    with grpc.insecure_channel(pair.stack.envoy_address) as channel:
        request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=TOKENS, ignore_eos=True)
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        calls = [stub.StreamCompletion(request, metadata=list(AUTHORIZED.items())) for _ in range(4)]
        for call in calls:
            next(call)
        pair.replicas[1].kill()
        codes = Counter(typed_outcome(call) for call in calls)
        outcomes = Counter(outcome(stream) for stream in streams)
    pair.replicas[1].start()
    pair.wait_until_both_serve()
    # Each of Envoy's two threads takes turns for itself, so both replicas have streams, but not always as many.
    assert set(outcomes) == {"error", "done"}
    assert codes == {grpc.StatusCode.INTERNAL: 2, grpc.StatusCode.OK: 2}


def typed_outcome(call: grpc.Call) -> grpc.StatusCode:
    try:
        for _ in call:
            pass
    except grpc.RpcError as error:
        return error.code()
    return call.code()


def test_a_rolling_restart_loses_nothing(pair: Pair) -> None:
    """One replica after the other is drained and started again under load: of at least 500 requests none fails."""
    with Load(pair.stack, threads=8, max_tokens=1) as load:
        load.wait_for(50)
        for replica in pair.replicas:
            replica.restart()
            pair.wait_until_both_serve()
            load.wait_for(load.done + 50)
        load.wait_for(500)
    assert set(load.statuses) == {200}
    assert load.done >= 500


def test_a_frozen_replica_is_given_up(pair: Pair) -> None:
    """A replica that stops answering without a word: its streams end and its requests move on."""
    streams = [pair.stack.begin(max_tokens=TOKENS) for _ in range(4)]
    frozen = pair.replicas[0]
    began = time.monotonic()
    frozen.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: pair.stack.complete(prompt="a", max_tokens=1).status, range(8)))
            outcomes = Counter(outcome(stream) for stream in streams)
        print(f"given up after {time.monotonic() - began:.1f} s")
    finally:
        frozen.process.send_signal(signal.SIGCONT)
        pair.wait_until_both_serve()
    assert answers == [200] * 8
    assert set(outcomes) == {"error", "done"}


def test_without_replicas_envoy_says_when_to_retry(pair: Pair) -> None:
    """All gone: 503 with a constant text and retry-after over REST, UNAVAILABLE over gRPC; back once one is."""
    for replica in pair.replicas:
        replica.kill()
    for _ in range(20):
        answer = pair.stack.complete(prompt="a", max_tokens=1)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert answer.json["error"] == {
            "message": "The service is temporarily unavailable. Please retry later.",
            "type": "server_error",
            "param": None,
            "code": None,
        }
    with grpc.insecure_channel(pair.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.ListModels(pb.ListModelsRequest(), metadata=list(AUTHORIZED.items()))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    for replica in pair.replicas:
        replica.start()
    pair.replicas[0].wait_until_serving()
    began = time.monotonic()
    pair.stack.wait_until_ready()
    print(f"back {time.monotonic() - began:.1f} s after the replica")
    pair.wait_until_both_serve()


def test_envoy_may_start_first(tiny_model: Path, tmp_path: Path) -> None:
    """An Envoy that found nothing answers once the service does."""
    http_port, grpc_port, admin_port = free_ports(3)
    late = Replica(tiny_model, grpc_port, tmp_path)
    with envoy(http_port, grpc_port, tmp_path, admin_port=admin_port):
        stack = Stack(http_port, grpc_port)
        eventually(lambda: envoy_counts(admin_port, "cluster.service.health_check.failure"))
        assert stack.request("GET", "/v1/models").status == 503
        health = stack.request("GET", "/health", headers={})
        assert (health.status, health.headers["retry-after"], health.json["error"]["type"]) == (
            503,
            "1",
            "server_error",
        )
        late.start()
        try:
            late.wait_until_serving()
            began = time.monotonic()
            stack.wait_until_ready()
            print(f"answers {time.monotonic() - began:.1f} s after the service")
            assert stack.request("GET", "/health", headers={}).status == 200
        finally:
            late.kill()
