"""Envoy for operators: its log, its statistics, and how it treats failing and slow replicas."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from completion.v1 import completion_pb2_grpc

from deploy import envoy_config
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, Answer, Stack, envoy, free_ports
from tests.support.stub import Stub, message, serving

METRICS = "/stats/prometheus"
LINE_BYTES = 8192


@dataclass(frozen=True)
class Watched:
    """Two stubs behind an Envoy with its numbers, and its log."""

    stack: Stack
    stubs: tuple[Stub, Stub]
    metrics: int
    log: Path

    def number(self, name: str, **labels: str) -> float:
        """A metric's value, of the one series that has these labels."""
        pattern = "".join(rf'(?=[^}}]*\b{label}="{re.escape(value)}")' for label, value in labels.items())
        (value,) = re.findall(rf"^{name}{{{pattern}[^}}]*}} (\S+)$", scrape(self.metrics).body.decode(), re.MULTILINE)
        return float(value)

    def line(self, **fields: Any) -> dict[str, Any]:
        """The log's last line with these fields; Envoy writes it within some seconds."""
        found: list[dict[str, Any]] = []
        eventually(
            lambda: bool(found.extend(each for each in lines(self.log) if fields.items() <= each.items()) or found)
        )
        return found[-1]


def scrape(port: int, path: str = METRICS, method: str = "GET") -> Answer:
    return Stack(port, 0).request(method, path, headers={})


def lines(log: Path) -> list[dict[str, Any]]:
    """The whole lines of an access log."""
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


@contextmanager
def watching(folder: Path) -> Iterator[Watched]:
    http_port, metrics_port = free_ports(2)
    stubs = Stub(), Stub()
    with ExitStack() as cleanup:
        first, second = (cleanup.enter_context(serving(stub)) for stub in stubs)
        cleanup.enter_context(envoy(http_port, first, folder, [second], metrics_port=metrics_port))
        stack = Stack(http_port, first)
        made = Watched(stack, stubs, metrics_port, folder / "envoy.log")
        stack.wait_until_ready()
        eventually(lambda: healthy(made) == 2)
        yield made


def healthy(watched: Watched) -> float:
    return watched.number("envoy_cluster_membership_healthy", envoy_cluster_name="service")


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    with watching(tmp_path) as made:
        yield made


def test_the_log_says_what_happened(watched: Watched) -> None:
    """A line has gRPC's status, the replica that answered, and why none could be reached."""
    with grpc.insecure_channel(watched.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        watched.stubs[0].code = watched.stubs[1].code = grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.RpcError):
            stub.CreateCompletion(message(), metadata=[("x-client-request-id", "late")])
    line = watched.line(client_request_id="late")
    assert (line["status"], line["grpc_status"]) == (200, "DeadlineExceeded")
    assert re.fullmatch(r"127\.0\.0\.1:\d+", line["upstream"])
    assert line["attempts"] == 1
    assert line["upstream_failure"] is None


def test_lines_are_bounded(watched: Watched) -> None:
    """However long what a caller chooses, a line stays short, also where each character takes six of JSON."""
    headers = {**AUTHORIZED, "user-agent": "\xff" * 9000, "x-client-request-id": "\xff" * 9000}
    for method, path in (
        ("GET", f"/{'p' * 6000}?{'q' * 4000}"),
        ("GET", f"/v1/models/{'m' * 10_000}"),
        ("M" * 200, "/"),
    ):
        watched.stack.request(method, path, headers=headers)
    logged = [watched.line(path=f"/{'p' * 255}"), watched.line(rest_path=None, status=400)]
    assert {len(line["user_agent"]) for line in logged if line["user_agent"]} == {120}
    assert max(len(line) for line in watched.log.read_text().splitlines() if line.startswith("{")) < LINE_BYTES


def test_probes_are_not_logged(watched: Watched) -> None:
    """Those of /health and the kubelet's write no line; who only calls itself a probe, and failures, do."""
    probe = {"user-agent": "kube-probe/1.36"}
    for _ in range(3):
        assert watched.stack.request("GET", "/health", headers={}).status == 200
        assert watched.stack.request("GET", "/docs/openapi.yaml", headers=probe).status == 200
    assert watched.stack.request("GET", "/v1/models", headers=probe).status == 200
    assert watched.stack.request("GET", "/docs/openapi.yaml", headers={"user-agent": "curl"}).status == 200
    watched.line(path="/docs/openapi.yaml", user_agent="curl")
    watched.line(rest_path="/v1/models", user_agent="kube-probe/1.36")
    seen = [(line["path"], line["user_agent"]) for line in lines(watched.log)]
    assert ("/health", None) not in seen
    assert ("/docs/openapi.yaml", "kube-probe/1.36") not in seen


def test_the_listener_has_numbers_and_nothing_else(watched: Watched) -> None:
    """Prometheus' page, and of the admin interface nothing besides: no other page, no query, no other method."""
    page = scrape(watched.metrics)
    assert page.status == 200
    assert b"envoy_cluster_upstream_rq_retry{" in page.body
    for path in (
        "/",
        "/stats",
        "/config_dump",
        "/quitquitquit",
        "/stats/prometheus?usedonly",
        "//stats",
        "/certs",
        "/v1/models",
    ):
        assert scrape(watched.metrics, path).status == 404, path
    for method in ("POST", "PUT", "HEAD"):
        assert scrape(watched.metrics, method=method).status in {404, 405}, method
    assert scrape(watched.metrics, f"{METRICS}/../../quitquitquit").status == 404
    assert watched.stack.request("GET", METRICS).status == 404


def test_without_their_port_there_are_no_numbers() -> None:
    """The launcher opens neither the listener nor the admin interface unless it is asked to."""
    config = yaml.safe_load(envoy_config.envoy_config({"HTTP_PORT": 1, "GRPC_PORT": 2}))
    assert "admin" not in config
    assert [listener["name"] for listener in config["static_resources"]["listeners"]] == ["public"]
    assert "admin" not in [cluster["name"] for cluster in config["static_resources"]["clusters"]]


def test_short_deadlines_eject_nobody(watched: Watched) -> None:
    """Callers whose deadlines pass, by the service's word or by their own, leave all replicas where they are."""
    with grpc.insecure_channel(watched.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        for each in watched.stubs:
            each.code = grpc.StatusCode.DEADLINE_EXCEEDED
        calls = [stub.CreateCompletion.future(message(), timeout=PATIENCE) for _ in range(60)]
        assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        for each in watched.stubs:
            each.code, each.seconds = None, 1.0
        calls = [stub.CreateCompletion.future(message(), timeout=0.2) for _ in range(60)]
        assert {call.code() for call in calls} == {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert {watched.stack.complete(prompt="a").status for _ in range(4)} == {200}
    assert all(len(each.calls) > 20 for each in watched.stubs)
    for name in ("ejections_enforced_total", "ejections_active"):
        assert watched.number(f"envoy_cluster_outlier_detection_{name}", envoy_cluster_name="service") == 0, name
    assert healthy(watched) == 2


def test_who_cannot_be_reached_is_ejected(watched: Watched) -> None:
    """A replica without a connection is skipped at once for a while; no request is lost."""
    gone, _ = watched.stubs
    gone.stop()
    with grpc.insecure_channel(watched.stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        calls = [stub.CreateCompletion.future(message(), timeout=PATIENCE) for _ in range(60)]
        assert {call.code() for call in calls} == {grpc.StatusCode.OK}
    name = "envoy_cluster_outlier_detection_ejections_enforced_consecutive_local_origin_failure"
    assert watched.number(name, envoy_cluster_name="service") == 1


@pytest.mark.parametrize("size", [300_000, 2_000_000])
def test_large_messages_are_sent_again(watched: Watched, size: int) -> None:
    """A message up to the body's limit that meets a replica which is not there is answered by another."""
    bad, good = watched.stubs
    bad.code = grpc.StatusCode.UNAVAILABLE
    request = message(text="a" * size)
    options = [("grpc.max_send_message_length", 1 << 24)]
    with grpc.insecure_channel(watched.stack.envoy_address, options=options) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        for _ in range(3):
            assert stub.CreateCompletion(request, timeout=PATIENCE).id
    assert bad.calls
    assert good.calls == [request.ByteSize()] * 3


@pytest.mark.parametrize("body", ["text", "ids"])
def test_large_bodies_are_sent_again(watched: Watched, body: str) -> None:
    """So is a JSON body up to its limit, also where it takes several times as much once it is transcoded."""
    bad, good = watched.stubs
    bad.code = grpc.StatusCode.UNAVAILABLE
    prompt = "a" * 2_000_000 if body == "text" else [1] * 660_000
    for _ in range(3):
        assert watched.stack.complete(prompt=prompt).status == 200
    assert bad.calls
    assert len(good.calls) == 3
    assert good.calls[0] > (2_000_000 if body == "text" else 6_000_000)


def test_an_old_connection_ends_without_cutting_anything_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers of an hour, here a second, are asked to connect anew; what runs finishes, and what comes is served."""
    written = envoy_config.envoy_config
    aged = "max_connection_duration: 3600s"
    assert aged in written({"HTTP_PORT": 1, "GRPC_PORT": 2})
    young = aged.replace("3600", "1")
    monkeypatch.setattr(envoy_config, "envoy_config", lambda *given: written(*given).replace(aged, young))
    with watching(tmp_path) as watched, ThreadPoolExecutor(2) as pool:
        for each in watched.stubs:
            each.seconds = 8  # longer than Envoy's drain takes, 5 s
        connection = http.client.HTTPConnection("127.0.0.1", watched.stack.http, timeout=PATIENCE)
        with grpc.insecure_channel(watched.stack.envoy_address) as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            calls = [pool.submit(lambda: list(stub.StreamCompletion(message()))) for _ in range(2)]
            for _ in range(2):
                connection.request("POST", "/v1/completions", b"{}", {"content-type": "application/json"})
                answer = connection.getresponse()
                assert (answer.status, bool(answer.read())) == (200, True)
            assert all(call.result() for call in calls)
            assert stub.CreateCompletion(message()).id
        connection.close()
        reached = "envoy_http_downstream_cx_max_duration_reached"
        assert watched.number(reached, envoy_http_conn_manager_prefix="public") > 0
