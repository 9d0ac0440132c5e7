"""The processes of a peer: started on loopback, watched while they are measured, and always stopped."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from types import ModuleType

from bench.client import API_KEY, PeerError
from deploy.local import Child

START_SECONDS = 180


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
            tail = "\n".join(child.log.read_text(errors="replace").splitlines()[-30:])
            raise PeerError(f"{error or repr(error)}\n\n{name} ({state}), its last output:\n{tail}") from error
        finally:
            child.stop()


def wait_for_answer(child: Child, port: int, path: str, content: str = "") -> None:
    """Returns once a GET of `path` on loopback is answered with 200 and has `content`.

    Raises PeerError when the process ends before, or gives no such answer within START_SECONDS.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        with suppress(OSError, HTTPException), closing(HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", path, headers={"authorization": f"Bearer {API_KEY}"})
            answer = connection.getresponse()
            if answer.status == 200 and content in answer.read().decode():
                return
        if child.process.poll() is not None:
            raise PeerError(f"{child.name} did not start")
        if time.monotonic() > deadline:
            raise PeerError(f"{child.name} was not ready within {START_SECONDS} s")
        time.sleep(0.1)


def optional_package(module: str, title: str) -> ModuleType:
    """A package that only one peer needs. Raises PeerError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise PeerError(f"{title} is missing: `make bench` installs it, or leave its peers out with --peers") from None


def processor_seconds(pid: int, *, main_thread: bool = False) -> float:
    """The processor time that a process, or its main thread alone, has taken so far."""
    path = f"/proc/{pid}/task/{pid}/stat" if main_thread else f"/proc/{pid}/stat"
    # The name, in parentheses, may hold anything. Behind it, the 12th and 13th fields are user and system time.
    user, system = Path(path).read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory(pid: int, field: str = "VmHWM") -> int:
    """Bytes of a process's resident memory: VmHWM is the peak so far, VmRSS the current value."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise PeerError(f"process {pid} is gone")
