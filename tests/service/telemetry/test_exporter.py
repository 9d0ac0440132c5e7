"""The port of the metrics has few threads, and silent clients do not block others."""

from __future__ import annotations

import socket
import threading
import urllib.request
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Gauge

from service.telemetry import exporter
from service.telemetry.exporter import Exporter
from tests.support.patience import PATIENCE, eventually
from tests.support.stack import free_ports


@pytest.fixture
def served():
    """The port of an exporter."""
    registry = CollectorRegistry()
    Gauge("answer", "Of everything.", registry=registry).set(42)
    (port,) = free_ports(1)
    made = Exporter(registry, "127.0.0.1", port)
    yield port
    made.close()


def scraped(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
        return answer.read().decode()


def test_silent_connections(served):
    """Five hundred silent connections take no more threads than allowed, and do not block a scrape."""
    before = threading.active_count()
    with ExitStack() as held:
        for _ in range(500):
            held.enter_context(socket.create_connection(("127.0.0.1", served), timeout=PATIENCE))
        assert "answer 42.0" in scraped(served)
        eventually(lambda: threading.active_count() <= before + exporter.MOST_CONNECTIONS + 1, threading.active_count)
        assert "answer 42.0" in scraped(served)


def test_a_connection_that_sends_nothing_ends(served, monkeypatch):
    """A connection that sends nothing is closed after the timeout, even without other connections."""
    monkeypatch.setattr(exporter.Handler, "timeout", 0.1)
    with socket.create_connection(("127.0.0.1", served), timeout=PATIENCE) as connection:
        assert connection.recv(1) == b""
