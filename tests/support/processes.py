"""A service process of its own for tests that harm it, with a tiny model that answers at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from model_export.export import Options, export
from tests.model_export import tiny
from tests.support.patience import PATIENCE, PATIENT_SERVICE, eventually
from tests.support.stack import AUTHORIZED, ROOT, free_ports, service_command, wait_until_healthy

TINY = "tiny"
METADATA = tuple(AUTHORIZED.items())


def export_tiny(folder: Path, *aliases: str) -> Path:
    """A tiny random model of 4096 positions, exported into `folder`."""
    source = tiny.hugging_face(folder / "source", max_position_embeddings=4096)
    options = Options(id=TINY, aliases=aliases, quantization="float32", max_kl=1.0)
    export(source, folder / "model", options, lambda *_: lambda: None)
    return folder / "model"


@dataclass(frozen=True)
class Service:
    """A running service: its gRPC port, process, output (standard output, then errors) and a channel to it."""

    port: int
    process: subprocess.Popen[bytes]
    folder: Path
    channel: grpc.Channel

    @property
    def stub(self) -> completion_pb2_grpc.CompletionServiceStub:
        return completion_pb2_grpc.CompletionServiceStub(self.channel)

    @property
    def output(self) -> str:
        """The text of its log so far."""
        return (self.folder / "out").read_text()

    @property
    def log(self) -> list[dict[str, Any]]:
        """The events of its log; call it when no line is half written."""
        return [json.loads(line) for line in self.output.splitlines()]

    @property
    def errors(self) -> str:
        return (self.folder / "err").read_text()

    def logged(self, message: str) -> dict[str, Any]:
        """The one line of the log with this message."""
        (found,) = [line for line in self.log if line["message"] == message]
        return found

    def wait_until_ready(self) -> None:
        ready = grpc.channel_ready_future(self.channel)
        eventually(lambda: ready.done() or self.process.poll() is not None)
        assert self.process.poll() is None, self.errors
        wait_until_healthy(self.channel)

    def stream(self, timeout: float | None = None, **fields: Any) -> Any:
        return self.stub.StreamCompletion(self._request(fields), metadata=METADATA, timeout=timeout)

    def complete(self, timeout: float = PATIENCE, **fields: Any) -> pb.CreateCompletionResponse:
        return self.stub.CreateCompletion(self._request(fields), metadata=METADATA, timeout=timeout)

    def outcome(self, **fields: Any) -> grpc.StatusCode:
        """The status of a unary request."""
        code: grpc.StatusCode = self.stub.CreateCompletion.future(self._request(fields), metadata=METADATA).code()
        return code

    def watch(self) -> Any:
        """The service's health, as it changes."""
        return health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest())

    @staticmethod
    def _request(fields: dict[str, Any]) -> pb.CreateCompletionRequest:
        values = {"model": TINY, "text": "the", "ignore_eos": True, "temperature": 0, **fields}
        return pb.CreateCompletionRequest(**values)

    def arm(self) -> None:
        """Makes the fault happen in the next step; returns once that is certain."""
        self.process.send_signal(signal.SIGUSR1)
        eventually(lambda: "armed" in self.errors)

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.exit_code() == 0, self.errors


@contextmanager
def service(
    model_dir: Path | None,
    folder: Path,
    *arguments: str,
    fault: str = "",
    step_seconds: float = 0.0,
    around: Sequence[str] = (),
    **popen: Any,
) -> Iterator[Service]:
    """A running service, with `fault` and `step_seconds` by `faulty_service`; killed at the end if it still runs.

    Without `model_dir` the arguments name its models. `around` is a command, such as strace, that runs the service.
    """
    (port,) = free_ports(1)
    flags = ["--port", str(port), "--drain-delay-seconds", "0", "--threads", "1"]
    if model_dir is not None:
        flags += ["--model-dir", str(model_dir)]
    command = [*around, *service_command(fault, step_seconds), *flags, *arguments]
    with (folder / "out").open("wb") as out, (folder / "err").open("wb") as err:
        environment = os.environ | PATIENT_SERVICE
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **{"stdout": out, "stderr": err, **popen})
    with process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                made = Service(port, process, folder, channel)
                made.wait_until_ready()
                yield made
        finally:
            process.kill()
