"""Envoy protects the service from slow, numerous and hostile connections, and from storms of retries."""

from __future__ import annotations

import asyncio
import select
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health, health_pb2_grpc

from deploy import envoy_config, local
from tests.support.http2 import PREFACE, frame, literal
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, MODEL, Stack, envoy, envoy_counts, free_ports

HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {AUTHORIZED['authorization']}\r\n"


def resident(pid: int) -> int:
    """MiB of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def until_closed(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    received = b""
    while True:
        try:
            chunk = connection.recv(65536)
        except ConnectionError:
            return received
        if not chunk:
            return received
        received += chunk


def test_slow_body_times_out(stack: Stack) -> None:
    """A body that does not arrive within ten seconds is 408 with the envelope, however steadily it trickles."""
    began = time.monotonic()
    with connected(stack.http) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100000\r\n\r\n".encode())
        over = threading.Event()

        def trickle() -> None:
            with suppress(ConnectionError):
                while not over.wait(1):
                    connection.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        received = b""
        while b"}}" not in received and (chunk := connection.recv(4096)):
            received += chunk
        over.set()
        thread.join()
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"error"' in received
    assert time.monotonic() - began > 9


@contextmanager
def envoy_with(folder: Path, grpc_port: int, connections: int) -> Iterator[tuple[Stack, int]]:
    """An Envoy with another bound on connections, patient with a server that shares its event loop with its callers."""
    (http_port,) = free_ports(1)
    config = yaml.safe_load(envoy_config.envoy_config({"HTTP_PORT": http_port, "GRPC_PORT": grpc_port}))
    for cluster in config["static_resources"]["clusters"]:
        for check in cluster.get("health_checks", ()):
            check["timeout"] = f"{PATIENCE}s"
    monitors = {item["name"]: item["typed_config"] for item in config["overload_manager"]["resource_monitors"]}
    limit = monitors["envoy.resource_monitors.global_downstream_max_connections"]
    assert limit["max_active_downstream_connections"] == 32_768
    limit["max_active_downstream_connections"] = connections
    path = folder / "envoy.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [local.envoy_binary(), "-c", str(path), "--disable-hot-restart", "-l", "warn"]
    child = local.Child("Envoy", command, folder / "envoy.log")
    try:
        yield Stack(http_port, grpc_port), child.process.pid
    finally:
        child.stop()


def test_connections_are_bounded(stack: Stack, tmp_path: Path) -> None:
    """Two thousand open connections use little memory and keep no caller out; connections above the limit are closed.

    Each of Envoy's threads takes its connections in its own time, so that it may be any of them.
    """
    with envoy_with(tmp_path, stack.grpc, connections=2000) as (bounded, pid), ExitStack() as held:
        bounded.wait_until_ready()
        before = resident(pid)
        several = {each.fileno(): each for each in (held.enter_context(connected(bounded.http)) for _ in range(1990))}
        assert bounded.complete(prompt="a", max_tokens=1).status == 200
        assert resident(pid) - before < 100
        several |= {each.fileno(): each for each in (held.enter_context(connected(bounded.http)) for _ in range(30))}
        told = select.poll()
        for number in several:
            told.register(number, select.POLLIN)
        closed = eventually(lambda: len(found := told.poll(0)) >= 20 and found)
        assert {until_closed(several[number]) for number, _ in closed} == {b""}
        held.close()
        bounded.wait_until_ready()


def test_rapid_reset_closes_the_connection(stack: Stack) -> None:
    """Streams opened and reset at once, by the thousand: Envoy closes the connection and serves others."""
    headers = {":method": "POST", ":scheme": "http", ":path": "/v1/completions", ":authority": "a"}
    block = b"".join(literal(name, value) for name, value in headers.items())
    with connected(stack.http) as connection:
        connection.sendall(PREFACE + frame(4, 0, 0, b""))
        sent = 0
        with suppress(ConnectionError):
            while sent < 1_000_000:  # far more than can be on its way before anybody reads it
                stream = 2 * sent + 1
                connection.sendall(frame(1, 4, stream, block) + frame(3, 0, stream, struct.pack(">I", 8)))
                sent += 1
        print(f"closed after {sent} streams")
    assert sent < 1_000_000
    assert stack.complete(prompt="a", max_tokens=1).status == 200


class Refusing:
    """A real gRPC server that holds all calls until each request of its callers is held or answered: then it refuses.

    So all attempts of a kind are under way at once, however long they take to arrive.
    """

    def __init__(self, code: grpc.StatusCode) -> None:
        self.attempts = 0
        self._code = code
        self._unanswered = 0
        self._held: list[asyncio.Future[None]] = []

    async def _refuse(self, request: bytes, context: grpc.aio.ServicerContext) -> None:
        self.attempts += 1
        self._held.append(asyncio.get_running_loop().create_future())
        held = self._held[-1]
        self._go_on()
        await held
        await context.abort(self._code, "not now")

    def _go_on(self) -> None:
        if len(self._held) >= self._unanswered:
            for each in self._held:
                each.set_result(None)
            self._held.clear()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[int]:
        """Its port."""
        # The service's own setting: with the default, gRPC refuses some of this many calls at once.
        pending = ("grpc.server.max_pending_requests", "grpc.server.max_pending_requests_hard_limit")
        server = grpc.aio.server(options=[(name, 8192) for name in pending])
        methods = {"CreateCompletion": grpc.unary_unary_rpc_method_handler(self._refuse)}
        handler = grpc.method_handlers_generic_handler("completion.v1.CompletionService", methods)
        server.add_generic_rpc_handlers([handler])
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield port
        finally:
            await server.stop(0)

    async def statuses(self, port: int, count: int) -> list[bytes]:
        """The statuses of `count` concurrent requests to an Envoy on this port."""

        async def ask() -> bytes:
            body = b'{"model": "%s", "prompt": "a"}' % MODEL.encode()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
            answer = await reader.read()
            writer.close()
            self._unanswered -= 1
            self._go_on()
            return answer.split(b" ")[1]

        self._unanswered = count
        return await asyncio.gather(*(ask() for _ in range(count)))


@pytest.mark.parametrize(
    ("code", "status", "most"),
    [(grpc.StatusCode.RESOURCE_EXHAUSTED, b"429", 1.0), (grpc.StatusCode.UNAVAILABLE, b"503", 1.2)],
)
async def test_retries_do_not_multiply_the_load(
    tmp_path: Path, code: grpc.StatusCode, status: bytes, most: float
) -> None:
    """An overloaded service gets no retries; an unavailable one gets at most a fifth more attempts."""
    count, refusing = 1600, Refusing(code)
    async with refusing.serving() as port:
        with envoy_with(tmp_path, port, 10_000) as (retrying, _):
            await ready(retrying.http, refusing)
            assert await refusing.statuses(retrying.http, count) == [status] * count
        print(f"{refusing.attempts / count:.2f} times the load")
        assert count <= refusing.attempts <= most * count


async def ready(port: int, refusing: Refusing) -> None:
    """Waits until Envoy calls the server, and forgets those calls."""
    while not refusing.attempts:
        with suppress(OSError):
            await refusing.statuses(port, 1)
        await asyncio.sleep(0.05)
    refusing.attempts = 0


class NameServer:
    """A name server on loopback that says of every name that it is 127.0.0.1, for one second, until it is closed."""

    def __init__(self) -> None:
        self.asked = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            query, caller = self._socket.recvfrom(512)
            if not query:
                return
            self.asked += 1
            question = query[12 : query.index(b"\0", 12) + 5]
            known = question[-4:-2] == b"\0\1"  # an A record
            header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, known, 0, 0)
            answer = struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + bytes([127, 0, 0, 1])
            self._socket.sendto(header + question + answer * known, caller)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as own:
            own.sendto(b"", ("127.0.0.1", self.port))
        self._thread.join()
        self._socket.close()


def test_replicas_outlive_their_name_server(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of DNS names keeps the last addresses when no DNS server answers any more."""
    names = NameServer()
    http_port, admin_port = free_ports(2)
    ports = {"HTTP_PORT": http_port, "GRPC_PORT": stack.grpc, "ADMIN_PORT": admin_port}
    config = yaml.safe_load(envoy_config.envoy_config(ports))
    cluster, checks = (
        envoy_config.named(config["static_resources"]["clusters"], name) for name in ("service", "health")
    )
    resolver = {
        "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
        "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": names.port}}],
        "dns_resolver_options": {"no_default_search_domain": True},
    }
    for each in (cluster, checks):
        each |= {
            "type": "STRICT_DNS",
            "dns_lookup_family": "V4_ONLY",
            "dns_refresh_rate": "1s",
            "typed_dns_resolver_config": {"name": "envoy.network.dns_resolver.cares", "typed_config": resolver},
        }
    (host,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    host["endpoint"]["address"]["socket_address"]["address"] = "replicas.test"
    monkeypatch.setattr(envoy_config, "envoy_config", lambda *_: yaml.safe_dump(config))
    try:
        with envoy(http_port, stack.grpc, tmp_path):
            named = Stack(http_port, stack.grpc)
            named.wait_until_ready()
            eventually(lambda: names.asked > 1)
            names.close()
            for failures in range(1, 4):
                eventually(lambda least=failures: envoy_counts(admin_port, "cluster.service.update_failure") >= least)
                assert named.complete(prompt="a", max_tokens=1).status == 200
    finally:
        names.close()
