"""`make run`'s launcher: what it prints works, and it leaves nothing behind."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.host.ports import listener
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import KEY, ROOT, free_ports, launched, ports_of, wait_until_ready


def launch(**environment: str) -> subprocess.Popen[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in {"API_KEY", "ADMIN_PORT"}}
    return subprocess.Popen(
        [sys.executable, "deploy/local.py"],
        cwd=ROOT,
        env={**inherited, "START_SECONDS": str(PATIENCE), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_prints_an_answer_and_the_curl_that_repeats_it(model_dir: Path, number: signal.Signals) -> None:
    """The printed curl gets the printed answer; an interrupt ends both processes and frees both ports."""
    http_port, grpc_port = free_ports(2)
    process = launch(HTTP_PORT=str(http_port), GRPC_PORT=str(grpc_port), MODEL_DIR=str(model_dir))
    try:
        output = wait_until_ready(process)
        assert ports_of(output) == (http_port, grpc_port)
        curl = re.search(r"curl (?:.*\\\n)*.*", output)
        assert curl, output
        answer = subprocess.run(["bash", "-c", curl[0] + " -sS"], capture_output=True, text=True, check=True).stdout
        assert '"text_completion"' in answer
        text = re.search(r'"text":\s?("(?:[^"\\]|\\.)*")', answer)
        assert text, answer
        assert text[1] in output
    finally:
        process.send_signal(number)
        rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, rest
    for port in (http_port, grpc_port):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


def test_taken_port_is_a_clear_error() -> None:
    """A port that something else listens on is named with the variable that changes it, before anything starts."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = launch(HTTP_PORT=str(port))
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert str(port) in output
    assert "HTTP_PORT" in output


@pytest.mark.parametrize("limit", ["0", "many", "-1", "1.5"])
def test_wrong_limit_is_a_clear_error(tiny_model: Path, limit: str) -> None:
    """The error names the wrong limit, and the allowed range."""
    http_port, grpc_port = free_ports(2)
    process = launch(
        HTTP_PORT=str(http_port), GRPC_PORT=str(grpc_port), MODEL_DIR=str(tiny_model), REQUESTS_PER_MINUTE=limit
    )
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"REQUESTS_PER_MINUTE={limit} is not a limit: it has to be 1 or more" in output


@pytest.mark.parametrize(
    ("variable", "given", "message"),
    [
        ("REPLICAS", "0", "is not a number of services: it has to be 1..64"),
        ("REPLICAS", "65", "is not a number of services: it has to be 1..64"),
        ("REPLICAS", "two", "is not a number of services: it has to be 1..64"),
        ("AFFINITY", "key", "is not known: it has to be none or session"),
    ],
)
def test_wrong_replicas_are_a_clear_error(tiny_model: Path, variable: str, given: str, message: str) -> None:
    """The error names the wrong value, and the allowed ones."""
    http_port, grpc_port = free_ports(2)
    process = launch(HTTP_PORT=str(http_port), GRPC_PORT=str(grpc_port), MODEL_DIR=str(tiny_model), **{variable: given})
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert f"{variable}={given} {message}" in output


def status(port: int) -> int:
    """The health status of the service on this port; NOT_SERVING while it warms up."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        found: int = check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=PATIENCE).status
        return found


def test_replicas_with_affinity(tiny_model: Path) -> None:
    """Two services start with a share of the cores each, and Envoy has both on its ring."""
    with launched(tiny_model, REPLICAS="2", AFFINITY="session") as stack:
        assert stack.logs is not None
        cluster, health = yaml.safe_load((stack.logs / "envoy.yaml").read_text())["static_resources"]["clusters"]
        assert health["load_assignment"]["endpoints"] == cluster["load_assignment"]["endpoints"]
        (hosts,) = [group["lb_endpoints"] for group in cluster["load_assignment"]["endpoints"]]
        ports = [host["endpoint"]["address"]["socket_address"]["port_value"] for host in hosts]
        assert ports[0] == stack.grpc
        assert len(set(ports)) == 2
        assert cluster["lb_policy"] == "RING_HASH"
        for port in ports:
            eventually(lambda port=port: status(port) == health_pb2.HealthCheckResponse.SERVING)
        assert sorted(log.name for log in stack.logs.glob("service*.log")) == ["service-1.log", "service-2.log"]


def test_one_request_a_minute_is_enough_to_start(tiny_model: Path) -> None:
    """The launcher asks until all is ready without using up what callers have."""
    with launched(tiny_model, REQUESTS_PER_MINUTE="1") as stack:
        other = {"authorization": "Bearer another"}
        assert [stack.request("GET", "/v1/models", headers=other).status for _ in range(2)] == [200, 429]


@pytest.mark.parametrize("by", ["flag", "variable", "file"])
def test_envoy_goes_by_the_services_setting(tiny_model: Path, tmp_path: Path, by: str) -> None:
    """Whichever way the key file is set, Envoy requires keys too."""
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} me\n")
    settings = tmp_path / "settings.toml"
    settings.write_text(f'api_keys_file = "{keys}"\n')
    arguments = {"flag": ["--api-keys-file", str(keys)], "file": ["--config", str(settings)]}.get(by, [])
    variables = {"COMPLETION_API_KEYS_FILE": str(keys)} if by == "variable" else {}
    with launched(tiny_model, *arguments, **variables) as stack:
        assert stack.logs is not None
        assert stack.request("GET", "/v1/models", headers={}).status == 401
        assert stack.request("GET", "/v1/models").status == 200
        log = stack.logs / "envoy.log"
        (line,) = eventually(lambda: [line for line in log.read_text().splitlines() if '"status":401' in line])
        assert '"details":"direct_response"' in line


def test_what_it_has_started_ends_with_it(tiny_model: Path) -> None:
    """Service and Envoy end with the launcher, even if it is killed."""
    http_port, grpc_port = free_ports(2)
    process = launch(HTTP_PORT=str(http_port), GRPC_PORT=str(grpc_port), MODEL_DIR=str(tiny_model))
    wait_until_ready(process)
    assert all(listener(port) for port in (http_port, grpc_port))
    process.kill()
    process.communicate(timeout=PATIENCE)
    eventually(lambda: not any(listener(port) for port in (http_port, grpc_port)))


def test_failing_service_is_reported(tmp_path: Path) -> None:
    """A service that cannot start is named with its exit code and its own words."""
    http_port, grpc_port = free_ports(2)
    process = launch(HTTP_PORT=str(http_port), GRPC_PORT=str(grpc_port), MODEL_DIR=str(tmp_path))
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "manifest.json does not exist" in output
    assert "78" in output


@contextmanager
def held(folder: Path, model: Path, code: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher that gives up after 5 s, whose service runs `code` before everything else."""
    (folder / "sitecustomize.py").write_text(f"import sys\nif 'service' in sys.orig_argv:\n    {code}\n")
    http_port, grpc_port = free_ports(2)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    ports = {"HTTP_PORT": str(http_port), "GRPC_PORT": str(grpc_port)}
    process = launch(**ports, MODEL_DIR=str(model), START_SECONDS="5", PYTHONPATH=path)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


def test_a_long_start_is_waited_for(tiny_model: Path, tmp_path: Path) -> None:
    """A service that computes for longer than START_SECONDS is not given up, and what it does is printed."""
    done = tmp_path / "done"
    with held(tmp_path, tiny_model, f"import os\n    while not os.path.exists({str(done)!r}): pass") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert re.fullmatch(r"waiting for the service since \d+ s: [1-9]\d* s of CPU time used, \d+ MiB read\n", line)
        done.touch()
        wait_until_ready(process)


def test_a_service_that_does_nothing_is_given_up(tiny_model: Path, tmp_path: Path) -> None:
    """After START_SECONDS without progress the launcher ends, with the setting that would let it wait longer."""
    with held(tmp_path, tiny_model, "import threading; threading.Event().wait()") as process:
        output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert "no completion, and no progress of the service for 5 s (START_SECONDS). Last answer: " in output
