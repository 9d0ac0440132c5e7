"""Ports for the servers of tests; tests that run at the same time never get the same ones."""

from __future__ import annotations

import errno
import itertools
import os
import socket
from collections.abc import Iterator
from pathlib import Path

_LOWEST = 10_000


def _ports_of_this_process() -> Iterator[int]:
    """The ports below those that the system gives out by itself, every one that is this process's, over and over.

    Those are shared between the processes of one run of the tests.
    """
    highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    own = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    ports = range(_LOWEST + own, highest, processes)
    # Another run on this machine begins elsewhere.
    begin = os.getpid() * 97 % len(ports)
    return itertools.islice(itertools.cycle(ports), begin, None)


_ports = _ports_of_this_process()


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on; none is given twice until all have been."""
    return list(itertools.islice(filter(_free, _ports), count))


def _free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            return False
    return True
