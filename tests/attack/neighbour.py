"""A well-behaved caller beside an attack: what it notices, and what the attack leaves behind."""

from __future__ import annotations

import http.client
import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from service.host import ports
from tests.support.stack import AUTHORIZED, MODEL, Stack

# In seconds: the neighbour's timeout for a request, which a machine ten times slower still keeps.
PATIENCE_SECONDS = 60
HEADERS = {**AUTHORIZED, "content-type": "application/json"}


@dataclass
class Neighbour:
    """Callers with a key of their own: how long each request took, by kind, and what failed."""

    stack: Stack
    seconds: dict[str, list[float]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Calls go on inside the block: on a connection that is kept, on new ones, as streams, and for health."""
        over = threading.Event()
        connection = self._connect()
        kinds = {
            "kept": lambda: self._kept(connection),
            "new": self._new,
            "stream": self._stream,
            "health": self._health,
        }
        threads = [threading.Thread(target=self._repeat, args=(name, call, over)) for name, call in kinds.items()]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            over.set()
            for thread in threads:
                thread.join()
            connection.close()

    def _repeat(self, kind: str, call: Callable[[], None], over: threading.Event) -> None:
        while not over.wait(0.1):
            began = time.monotonic()
            try:
                call()
            except (OSError, http.client.HTTPException, AssertionError) as error:
                self.failures.append(f"{kind} after {time.monotonic() - began:.1f} s: {error!r}")
            self.seconds.setdefault(kind, []).append(time.monotonic() - began)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.stack.http, timeout=PATIENCE_SECONDS)

    def _ask(self, connection: http.client.HTTPConnection, **fields: object) -> bytes:
        body = {"model": MODEL, "prompt": "Hello", "temperature": 0, **fields}
        connection.request("POST", "/v1/completions", json.dumps(body), HEADERS)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, (answer.status, text[:200])
        return text

    def _kept(self, connection: http.client.HTTPConnection) -> None:
        try:
            self._ask(connection, max_tokens=2)
        except (OSError, http.client.HTTPException, AssertionError):
            connection.close()  # the next request makes a new one
            raise

    def _new(self) -> None:
        connection = self._connect()
        try:
            self._ask(connection, max_tokens=2)
        finally:
            connection.close()

    def _stream(self) -> None:
        connection = self._connect()
        try:
            assert self._ask(connection, max_tokens=40, stream=True, ignore_eos=True).endswith(b"data: [DONE]\n\n")
        finally:
            connection.close()

    def _health(self) -> None:
        connection = self._connect()
        try:
            connection.request("GET", "/health")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200, answer.status
        finally:
            connection.close()

    def report(self, name: str) -> str:
        """Requests, failures and waiting times, as one line of a table."""
        calls = sum(map(len, self.seconds.values()))
        times = ", ".join(
            f"{kind} {statistics.median(each):.2f} / {max(each):.2f}" for kind, each in sorted(self.seconds.items())
        )
        return f"| {name} | {calls} | {len(self.failures)} | {times} |"


@dataclass(frozen=True)
class Held:
    """Resources of the service and Envoy: MiB of memory, threads and files of each, and sequences."""

    memory: tuple[int, int]
    threads: tuple[int, int]
    files: tuple[int, int]
    sequences: float

    def as_before(self, before: Held) -> bool:
        """Whether no more has stayed than 64 MiB, threads of pools, and connections kept for later."""
        return (
            all(now <= then + 64 for now, then in zip(self.memory, before.memory, strict=True))
            and all(now <= then + 4 for now, then in zip(self.threads, before.threads, strict=True))
            and all(now <= then + 8 for now, then in zip(self.files, before.files, strict=True))
            and self.sequences == before.sequences
        )


def held(stack: Stack) -> Held:
    """The resources held now."""
    pids = [ports.listener(stack.grpc), ports.listener(stack.http)]
    assert all(pids), f"a process is gone: {pids}"
    service, envoy = [Path(f"/proc/{pid}") for pid in pids]
    return Held(
        (_status(service, "VmRSS") // 1024, _status(envoy, "VmRSS") // 1024),
        (_status(service, "Threads"), _status(envoy, "Threads")),
        (len(list((service / "fd").iterdir())), len(list((envoy / "fd").iterdir()))),
        _sequences(stack),
    )


def _status(process: Path, name: str) -> int:
    (line,) = [line for line in (process / "status").read_text().splitlines() if line.startswith(f"{name}:")]
    return int(line.split()[1])


def _sequences(stack: Stack) -> float:
    """Sequences that run or wait, as the metrics have it."""
    connection = http.client.HTTPConnection("127.0.0.1", stack.metrics, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(("llm_running{", "llm_waiting{")))
