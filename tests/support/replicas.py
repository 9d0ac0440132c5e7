"""Two service processes behind one Envoy, for the tests that end, freeze or compare them."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.patience import PATIENCE, eventually
from tests.support.stack import Replica, Stack, envoy, free_ports


@dataclass(frozen=True)
class Pair:
    """Two replicas and the Envoy before them."""

    stack: Stack
    replicas: tuple[Replica, Replica]
    admin: int

    def wait_until_both_serve(self) -> None:
        """Returns once both answer and Envoy sends requests to both; of a quick restart it does not know."""
        for replica in self.replicas:
            replica.wait_until_serving()
        self.wait_for_health([True, True])

    def wait_for_health(self, expected: list[bool]) -> None:
        """Returns once Envoy knows whether each replica is healthy."""
        eventually(lambda: self._health() == expected, self._health)

    def answered(self) -> tuple[int, int]:
        """How many requests Envoy has sent to each replica so far."""
        hosts = {host["address"]["socket_address"]["port_value"]: host for host in self._hosts()}
        first, second = (
            {stat["name"]: int(stat.get("value", 0)) for stat in hosts[replica.port]["stats"]}["rq_total"]
            for replica in self.replicas
        )
        return first, second

    def _health(self) -> list[bool]:
        try:
            found = [host["health_status"] for host in self._hosts()]
        except ConnectionRefusedError:  # Envoy is still starting
            return []
        return [status == {"eds_health_status": "HEALTHY"} for status in found]

    def _hosts(self) -> list[dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.admin, timeout=PATIENCE)
        try:
            connection.request("GET", "/clusters?format=json")
            clusters = json.load(connection.getresponse())["cluster_statuses"]
        finally:
            connection.close()
        hosts: list[dict[str, Any]]
        (hosts,) = [each["host_statuses"] for each in clusters if each["name"] == "service"]
        return hosts


@contextmanager
def serving_pair(model_dir: Path, folder: Path, affinity: bool = False) -> Iterator[Pair]:
    """Both replicas serve; a test that ends one starts it again. With `affinity` each session has one of its own.

    An engine step takes at least 10 ms, so that what is asked of them takes its time, and little of the processor's.
    """
    http_port, admin_port, *ports = free_ports(4)
    first, second = (Replica(model_dir, port, folder, "--threads", "1", step_seconds=0.01) for port in ports)
    with envoy(http_port, first.port, folder, [second.port], admin_port, affinity):
        try:
            for replica in (first, second):
                replica.start()
            made = Pair(Stack(http_port, first.port), (first, second), admin_port)
            made.wait_until_both_serve()
            yield made
        finally:
            for replica in (first, second):
                replica.kill()
