"""The real thing for tests: service and Envoy as `make run` starts them, and a service inside the test's process."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy import envoy_config, local
from service.server import Server
from service.settings import Settings
from tests.support.patience import PATIENCE, PATIENT_SERVICE, eventually
from tests.support.ports import free_ports

ROOT = Path(__file__).resolve().parent.parent.parent
KEY = "test-key"
MODEL = "gpt-3.5-turbo-instruct"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read to its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of its server-sent events."""
        return [block.removeprefix("data: ") for block in self.body.decode().split("\n\n") if block]


@dataclass(frozen=True)
class Stack:
    """Where a running service can be reached: ports on 127.0.0.1, 0 where there is none; `logs` holds its log files."""

    http: int
    grpc: int
    logs: Path | None = None
    metrics: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.http}/v1"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc}"

    @property
    def envoy_address(self) -> str:
        return f"127.0.0.1:{self.http}"

    def wait_until_ready(self) -> None:
        """Returns once a request gets through Envoy to the service."""
        eventually(self._answers, lambda: f"no answer from port {self.http}")

    def _answers(self) -> bool:
        try:
            # Envoy's own word of the service first: that counts against no limit of requests.
            return all(self.request("GET", path).status == 200 for path in ("/health", "/v1/models"))
        except OSError:
            return False

    def request(
        self, method: str, path: str, body: bytes | str | None = None, headers: Mapping[str, str] = AUTHORIZED
    ) -> Answer:
        """One HTTP request, with exactly these headers besides what HTTP/1.1 needs."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        try:
            data = body.encode() if isinstance(body, str) else body
            connection.request(method, path, data, dict(headers))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def complete(self, **fields: Any) -> Answer:
        """POST /v1/completions with these fields as JSON."""
        headers = {**AUTHORIZED, "content-type": "application/json"}
        return self.request("POST", "/v1/completions", json.dumps({"model": MODEL, **fields}), headers)

    def begin(self, **fields: Any) -> http.client.HTTPResponse:
        """A stream of events of which the first has come; reading gives the others, closing hangs up."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=PATIENCE)
        # With this header closing the response closes the connection.
        headers = {**AUTHORIZED, "content-type": "application/json", "connection": "close"}
        body = {"model": MODEL, "prompt": "Once", "ignore_eos": True, "stream": True, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        response = connection.getresponse()
        assert response.readline().startswith(b"data: {")
        return response

    def sample(self, name: str) -> float:
        """The value of a metric of the service, of all its models together."""
        page = Stack(self.metrics, 0).request("GET", "/metrics", headers={}).body.decode()
        return sum(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.startswith(f"{name}{{"))


@contextmanager
def launched(model_dir: Path, *service_args: str, **variables: str) -> Iterator[Stack]:
    """Service and Envoy as separate processes, by the launcher behind `make run`."""
    http_port, grpc_port, metrics_port = free_ports(3)
    environment = {
        **os.environ,
        **PATIENT_SERVICE,
        "HTTP_PORT": str(http_port),
        "GRPC_PORT": str(grpc_port),
        "MODEL_DIR": str(model_dir),
        "API_KEY": KEY,
        "COMPLETION_METRICS_PORT": str(metrics_port),
        "START_SECONDS": str(PATIENCE),
        **variables,
    }
    command = [sys.executable, "deploy/local.py", "--", *service_args]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = wait_until_ready(process)
        (logs,) = re.findall(r"^logs +(.*)$", output, re.MULTILINE)
        yield Stack(http_port, grpc_port, Path(logs), metrics_port)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)


def wait_until_ready(process: subprocess.Popen[str]) -> str:
    """Reads the launcher's output up to its `ready` line, and gives it back."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready "):
            return "".join(lines)
    raise AssertionError("the launcher ended early:\n" + "".join(lines))


class ServiceThread:
    """A real server on an event loop of its own within this process, so that tests can look into its engine."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))
        self.server: Server

    async def _serve(self) -> None:
        try:
            self.server = Server(self._settings)
            async with self.server:
                self._ready.set()
                await self._stop.wait()
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ready.set()

    def __enter__(self) -> ServiceThread:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        self._loop.close()


@contextmanager
def envoy(
    http_port: int,
    grpc_port: int,
    folder: Path,
    replicas: Sequence[int] = (),
    admin_port: int | None = None,
    affinity: bool = False,
    metrics_port: int | None = None,
    api_keys_file: Path | None = None,
    unknown_parameters: str = "refuse",
    files: Path | None = None,
) -> Iterator[local.Child]:
    """The real Envoy on `http_port` in front of services on `grpc_port` and on the ports of further `replicas`.

    `api_keys_file` and `unknown_parameters` are the settings of the services. `files` is the folder to run Envoy in, if
    not the project's.
    """
    ports = {"HTTP_PORT": http_port, "GRPC_PORT": grpc_port}
    if admin_port is not None:
        ports["ADMIN_PORT"] = admin_port
    if metrics_port is not None:
        ports["ENVOY_METRICS_PORT"] = metrics_port
    options = local.Options.from_environment()
    command = envoy_config.envoy_command(
        local.envoy_binary(),
        ports,
        folder,
        replicas,
        affinity,
        longest_request=options.longest_request,
        certificates=options.tls_dir,
    )
    variables = {
        "COMPLETION_API_KEYS_FILE": str(api_keys_file or ""),
        "COMPLETION_UNKNOWN_PARAMETERS": unknown_parameters,
    }
    child = local.Child("Envoy", command, folder / "envoy.log", variables, files or ROOT)
    try:
        yield child
    finally:
        child.stop()


def envoy_counts(admin_port: int, name: str) -> int:
    """The value of an Envoy counter; 0 while Envoy does not answer."""
    try:
        page = Stack(admin_port, 0).request("GET", f"/stats?filter=^{name}$", headers={}).body
    except ConnectionError:
        return 0
    return int(page.rpartition(b": ")[2] or 0)


def wait_until_healthy(channel: grpc.Channel) -> None:
    """Returns once a service reports SERVING."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(
        health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=PATIENCE
    )
    for answer in watch:
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            watch.cancel()
            return
    raise AssertionError("the service ended without being healthy")


def service_command(fault: str = "", step_seconds: float = 0.0) -> list[str]:
    """The command of the service without its flags; by `faulty_service` if it has a fault or slower engine steps."""
    if not (fault or step_seconds):
        return [sys.executable, "-m", "service"]
    return [sys.executable, "-m", "tests.support.faulty_service", fault or "none", str(step_seconds)]


class Replica:
    """A service process on a port of its own, to be stopped, killed and started again.

    Each of its engine steps takes `step_seconds` longer than it would.
    """

    def __init__(self, model_dir: Path, port: int, folder: Path, *arguments: str, step_seconds: float = 0.0) -> None:
        self.port = port
        self.log = folder / f"service-{port}.log"
        flags = ["--model-dir", str(model_dir), "--port", str(port), *arguments]
        self._command = [*service_command(step_seconds=step_seconds), *flags]
        self.process: subprocess.Popen[bytes]

    def start(self) -> None:
        """Starts the process; `wait_until_serving` waits for its answer."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=os.environ | PATIENT_SERVICE, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_serving(self) -> None:
        """Returns once the service reports SERVING."""
        with grpc.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            wait_until_healthy(channel)

    def kill(self) -> None:
        """Kills the process, without a drain."""
        self.process.kill()
        self.process.wait()

    def restart(self) -> None:
        """SIGTERM, the drain to its end, and a new start."""
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(PATIENCE) == 0
        self.start()
        self.wait_until_serving()


def ports_of(ready_output: str) -> tuple[int, int]:
    """The REST and gRPC ports that the launcher announces."""
    match = re.search(r"ready rest=http://127\.0\.0\.1:(\d+) grpc=127\.0\.0\.1:(\d+)", ready_output)
    assert match, ready_output
    return int(match[1]), int(match[2])
