"""The processes of a peer: started on loopback, watched while they are measured, and always stopped."""

from __future__ import annotations

import http.client
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.client import API_KEY, PeerError
from deploy.local import Child

START_SECONDS = 180
TAIL_LINES = 30


@contextmanager
def running(name: str, command: list[str]) -> Iterator[Child]:
    """Runs a process during the block. An error in the block is raised as PeerError with the process's last output."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        child = Child(name, command, Path(folder) / "log")
        try:
            yield child
        except Exception as error:
            code = child.process.poll()
            state = "still running" if code is None else f"ended with exit code {code}"
            tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
            raise PeerError(f"{error or repr(error)}\n\n{name} ({state}), its last output:\n{tail}") from error
        finally:
            child.stop()


def wait_until(ready: Callable[[], bool], child: Child) -> None:
    """Returns once `ready`. Raises PeerError when the process ends before, or is not ready within START_SECONDS."""
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if child.process.poll() is not None:
            raise PeerError(f"{child.name} did not start")
        if time.monotonic() > deadline:
            raise PeerError(f"{child.name} was not ready within {START_SECONDS} s")
        time.sleep(0.1)


def get(port: int, path: str) -> tuple[int, bytes]:
    """The status and body of a GET on loopback; status 0 when the connection fails."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers={"authorization": f"Bearer {API_KEY}"})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def answers(port: int, path: str) -> bool:
    """Whether GET of `path` is answered with 200."""
    return get(port, path)[0] == 200


def healthy(admin_port: int) -> int:
    """The number of replicas that Envoy sends requests to."""
    return int(get(admin_port, "/stats?filter=^cluster.service.membership_healthy$")[1].rpartition(b": ")[2])


def memory(pid: int, field: str = "VmHWM") -> int:
    """Bytes of a process's resident memory: VmHWM is the peak so far, VmRSS the current value."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise PeerError(f"process {pid} is gone")
