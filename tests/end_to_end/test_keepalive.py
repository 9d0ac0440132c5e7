"""Which keepalive pings callers may send, as docs/envoy.md says it: at Envoy, and at the service's own port."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import envoy_config
from service.host.ports import listener
from tests.end_to_end.test_edge import connected as connection_to
from tests.end_to_end.test_edge import until_closed
from tests.support.http2 import PREFACE, SETTINGS, frame
from tests.support.patience import eventually
from tests.support.stack import ROOT, Stack, envoy, free_ports

BEGINNING = PREFACE + frame(SETTINGS, 0, 0, b"")
PING, GOAWAY, ACK = 6, 7, 1
# What the service takes between two pings, in seconds, and a little more.
SPACED = 5.2


class Connection:
    """An HTTP/2 connection on which nothing is asked; `pings` are sent and their answers awaited."""

    def __init__(self, wire: socket.socket) -> None:
        self._wire = wire
        self._rest = b""
        self._sent = 0
        wire.sendall(BEGINNING)

    def ping(self) -> bytes | None:
        """Sends a ping: None once it is answered, or why the other side says goodbye instead."""
        self._sent += 1
        self._wire.sendall(frame(PING, 0, 0, struct.pack(">Q", self._sent)))
        while True:
            kind, flags, payload = self._read()
            if kind == SETTINGS and not flags & ACK:
                self._wire.sendall(frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and flags & ACK and struct.unpack(">Q", payload)[0] == self._sent:
                return None
            elif kind == GOAWAY:
                return payload[8:]

    def _read(self) -> tuple[int, int, bytes]:
        head = self._take(9)
        return head[3], head[4], self._take(int.from_bytes(head[:3], "big"))

    def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            received = self._wire.recv(65536)
            assert received, "the connection was closed"
            self._rest += received
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken


@contextmanager
def connected(port: int) -> Iterator[Connection]:
    with connection_to(port) as wire:
        yield Connection(wire)


def test_envoy_answers_pings_as_they_come(stack: Stack) -> None:
    """However soon one follows the other, on a connection without a call."""
    with connected(stack.http) as connection:
        assert [connection.ping() for _ in range(200)] == [None] * 200


def test_the_service_wants_five_seconds_between_them(stack: Stack) -> None:
    """Pings every five seconds are answered; a client that pings faster gets GOAWAY and has to connect again."""
    assert "| one every 5 s at most" in (ROOT / "docs" / "envoy.md").read_text()
    with connected(stack.grpc) as connection:
        for _ in range(4):
            assert connection.ping() is None
            time.sleep(SPACED)
    with connected(stack.grpc) as connection:
        assert next(filter(None, (connection.ping() for _ in range(20)))) == b"too_many_pings"


def test_a_caller_that_is_gone_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Envoy pings HTTP/2 callers, here each second, and closes the connection of one that never answers."""
    written = envoy_config.envoy_config
    config = yaml.safe_load(written({"HTTP_PORT": 1, "GRPC_PORT": 2}))
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["http2_protocol_options"]["connection_keepalive"] == {"interval": "30s", "timeout": "10s"}
    pings = "interval: 30s", "timeout: 10s"

    def shorter(*given: Any) -> str:
        return written(*given).replace(pings[0], "interval: 1s").replace(pings[1], "timeout: 1s", 1)

    monkeypatch.setattr(envoy_config, "envoy_config", shorter)
    http_port, grpc_port = free_ports(2)
    with envoy(http_port, grpc_port, tmp_path):
        eventually(lambda: listener(http_port))
        with connection_to(http_port) as wire:
            wire.sendall(BEGINNING)
            assert frame(PING, 0, 0, bytes(8))[:9] in until_closed(wire)
