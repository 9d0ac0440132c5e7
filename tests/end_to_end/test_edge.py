"""What Envoy keeps away from the service: slow, many, and hostile connections, and storms of retries."""

from __future__ import annotations

import asyncio
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

from deploy import local
from tests.http2 import PREFACE, frame, literal
from tests.stack import AUTHORIZED, MODEL, Stack, envoy, free_ports

HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: {AUTHORIZED['authorization']}\r\n"


def resident(pid: int) -> int:
    """MiB of memory that a process has."""
    status = Path(f"/proc/{pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) // 1024


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
    with socket.create_connection(("127.0.0.1", stack.http), timeout=20) as connection:
        connection.sendall(f"{HEAD}Content-Length: 100\r\n\r\n".encode())
        over = threading.Event()

        def trickle() -> None:
            while not over.wait(1):
                connection.sendall(b" ")

        thread = threading.Thread(target=trickle)
        thread.start()
        received = b""
        while b"}}" not in received:
            received += connection.recv(4096)
        over.set()
        thread.join()
    assert received.startswith(b"HTTP/1.1 408")
    assert b'"error"' in received
    assert 9 < time.monotonic() - began < 13


@contextmanager
def envoy_with(folder: Path, grpc_port: int, connections: int) -> Iterator[tuple[Stack, int]]:
    """An Envoy with another bound on connections, and its process id."""
    (http_port,) = free_ports(1)
    config = yaml.safe_load(local.envoy_config({"HTTP_PORT": http_port, "GRPC_PORT": grpc_port}))
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
    """Two thousand open connections cost Envoy little and keep nobody out; beyond the bound more are closed."""
    with envoy_with(tmp_path, stack.grpc, connections=2000) as (bounded, pid), ExitStack() as held:
        bounded.wait_until_ready()
        before = resident(pid)
        for _ in range(1990):
            held.enter_context(socket.create_connection(("127.0.0.1", bounded.http), timeout=10))
        assert bounded.complete(prompt="a", max_tokens=1).status == 200
        assert resident(pid) - before < 100
        more = [
            held.enter_context(socket.create_connection(("127.0.0.1", bounded.http), timeout=10)) for _ in range(30)
        ]
        assert [until_closed(each) for each in more[-10:]] == [b""] * 10
        held.close()
        bounded.wait_until_ready(10)


def test_rapid_reset_closes_the_connection(stack: Stack) -> None:
    """Streams opened and reset at once, by the thousand: Envoy closes the connection and serves others."""
    headers = {":method": "POST", ":scheme": "http", ":path": "/v1/completions", ":authority": "a"}
    block = b"".join(literal(name, value) for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", stack.http), timeout=20) as connection:
        connection.sendall(PREFACE + frame(4, 0, 0, b""))
        sent = 0
        try:
            for stream in range(1, 20_001, 2):
                pair = frame(1, 4, stream, block) + frame(3, 0, stream, struct.pack(">I", 8))
                connection.sendall(pair)
                sent += 1
        except ConnectionError:
            pass
        closed = sent < 10_000 or until_closed(connection) is not None
    assert closed
    assert sent < 10_000
    assert stack.complete(prompt="a", max_tokens=1).status == 200


@asynccontextmanager
async def refusing(code: grpc.StatusCode) -> AsyncIterator[tuple[int, list[float]]]:
    """A real gRPC server that holds every call for half a second and then refuses it; when it was asked."""
    attempts: list[float] = []

    async def refuse(request: bytes, context: grpc.aio.ServicerContext) -> None:
        attempts.append(time.monotonic())
        await asyncio.sleep(0.5)
        await context.abort(code, "not now")

    # As the service has it: else gRPC itself refuses some of so many at once.
    pending = ("grpc.server.max_pending_requests", "grpc.server.max_pending_requests_hard_limit")
    server = grpc.aio.server(options=[(name, 8192) for name in pending])
    methods = {"CreateCompletion": grpc.unary_unary_rpc_method_handler(refuse)}
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("completion.v1.CompletionService", methods)])
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port, attempts
    finally:
        await server.stop(0)


async def statuses(port: int, count: int) -> list[bytes]:
    """The statuses of so many requests at once."""

    async def ask() -> bytes:
        body = b'{"model": "%s", "prompt": "a"}' % MODEL.encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{HEAD}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
        answer = await reader.read()
        writer.close()
        return answer.split(b" ")[1]

    return await asyncio.gather(*(ask() for _ in range(count)))


@pytest.mark.parametrize(
    ("code", "status", "most"),
    [(grpc.StatusCode.RESOURCE_EXHAUSTED, b"429", 1.0), (grpc.StatusCode.UNAVAILABLE, b"503", 1.2)],
)
async def test_retries_do_not_multiply_the_load(
    tmp_path: Path, code: grpc.StatusCode, status: bytes, most: float
) -> None:
    """What is overloaded is not asked again; what is unavailable gets at most a fifth more attempts."""
    count = 1600
    async with refusing(code) as (port, attempts):
        with envoy_with(tmp_path, port, 10_000) as (retrying, _):
            await ready(retrying.http, attempts)
            assert await statuses(retrying.http, count) == [status] * count
        print(f"{len(attempts) / count:.2f} times the load")
        assert count <= len(attempts) <= most * count


async def ready(port: int, attempts: list[float]) -> None:
    """Waits until Envoy calls the server, and forgets those calls."""
    for _ in range(100):
        with suppress(OSError):
            await statuses(port, 1)
        if attempts:
            break
        await asyncio.sleep(0.1)
    attempts.clear()


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
    """Where the cluster is one of names, what they were last is what holds once nobody can be asked any more."""
    names = NameServer()
    config = yaml.safe_load(local.envoy_config({"HTTP_PORT": 1, "GRPC_PORT": stack.grpc}))
    (http_port,) = free_ports(1)
    local.listen_on(config["static_resources"]["listeners"][0], http_port)
    cluster, health = config["static_resources"]["clusters"]
    resolver = {
        "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
        "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": names.port}}],
        "dns_resolver_options": {"no_default_search_domain": True},
    }
    for each in (cluster, health):
        each |= {
            "type": "STRICT_DNS",
            "dns_lookup_family": "V4_ONLY",
            "dns_refresh_rate": "1s",
            "typed_dns_resolver_config": {"name": "envoy.network.dns_resolver.cares", "typed_config": resolver},
        }
    (host,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    host["endpoint"]["address"]["socket_address"]["address"] = "replicas.test"
    monkeypatch.setattr(local, "envoy_config", lambda *_: yaml.safe_dump(config))
    try:
        with envoy(http_port, stack.grpc, tmp_path):
            named = Stack(http_port, stack.grpc)
            named.wait_until_ready()
            time.sleep(2)
            assert names.asked > 1
            names.close()
            for _ in range(8):
                time.sleep(0.5)
                assert named.complete(prompt="a", max_tokens=1).status == 200
    finally:
        if names._thread.is_alive():
            names.close()
