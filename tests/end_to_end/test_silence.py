"""The processes connect to no other host and write no other files: checked by their system calls."""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.host import ports
from tests.model_export import tiny
from tests.support.patience import PATIENCE
from tests.support.processes import TINY, export_tiny
from tests.support.stack import ROOT, free_ports, wait_until_healthy

STRACE = shutil.which("strace")
pytestmark = [
    pytest.mark.skipif(STRACE is None, reason="strace is not installed"),
    pytest.mark.timeout(600),
]

CALLS = "network,open,openat,openat2,creat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,symlink,symlinkat"
# onnxruntime's first upload comes nine seconds after its import.
SECONDS = 15
_ADDRESS = re.compile(r'inet_addr\("([^"]+)"\)|inet_pton\(AF_INET6, "([^"]+)"')
_MADE = re.compile(r"(?:mkdir|rename|link|symlink|creat)\w*\(|O_(?:WRONLY|RDWR|CREAT)")
_PATH = re.compile(r'"([^"]*)"')


def traced(folder: Path, command: Sequence[str]) -> subprocess.Popen[bytes]:
    """A process whose calls are written down, with nothing in its environment but an empty home."""
    assert STRACE is not None
    (folder / "home").mkdir()
    tracing = [STRACE, "-f", "-qq", "-s", "256", "-o", str(folder / "trace"), "-e", f"trace={CALLS}"]
    environment = {"HOME": str(folder / "home"), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    with (folder / "out").open("wb") as out:
        return subprocess.Popen([*tracing, *command], cwd=ROOT, env=environment, stdout=out, stderr=out)


def check_silent(folder: Path, *allowed: Path) -> None:
    """No address but this machine's own was spoken to, and no file made or opened to write but in `allowed`."""
    lines = (folder / "trace").read_text(errors="replace").splitlines()
    assert len(lines) > 500, "nothing was traced"
    addresses = {match[1] or match[2] for line in lines for match in _ADDRESS.finditer(line)}
    assert all(map(is_own, addresses)), addresses
    made = [line for line in lines if _MADE.search(line) and " = -1 " not in line]
    paths = {match[1] for line in made for match in _PATH.finditer(line)}
    # A semaphore has the name of a file, and is none.
    inside = tuple(str(each) for each in (*allowed, "/dev/null", "/dev/shm/sem.", "/proc/self"))
    assert not [path for path in paths if not path.startswith(inside)], made
    assert not list((folder / "home").iterdir())


def is_own(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_loopback


def test_the_service(tmp_path: Path) -> None:
    """It starts, serves and ends without a word to anybody, and leaves no file."""
    (tmp_path / "tiny").mkdir()
    model = export_tiny(tmp_path / "tiny")
    port, metrics = free_ports(2)
    flags = ["--port", str(port), "--metrics-port", str(metrics), "--drain-delay-seconds", "0"]
    process = traced(tmp_path, [sys.executable, "-m", "service", "--model-dir", str(model), *flags])
    with process:
        try:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                grpc.channel_ready_future(channel).result(PATIENCE)
                wait_until_healthy(channel)
                stub = completion_pb2_grpc.CompletionServiceStub(channel)
                until = time.monotonic() + SECONDS
                while time.monotonic() < until:
                    stub.CreateCompletion(pb.CreateCompletionRequest(model=TINY, text="the", max_tokens=64))
        finally:
            # Not strace, which would not hand it on.
            served = ports.listener(port)
            os.kill(process.pid if served is None else served, signal.SIGTERM)
    assert process.returncode == 0, (tmp_path / "out").read_text()[-2000:]
    check_silent(tmp_path)


def test_the_exporter(tmp_path: Path) -> None:
    """It writes the model directory, and beside it while it works, and nothing else."""
    source = tiny.hugging_face(tmp_path / "source", max_position_embeddings=64)
    target = tmp_path / "exported" / "model"
    target.parent.mkdir()
    command = [sys.executable, "-m", "model_export", str(source), str(target), "--id", "tiny"]
    flags = ["--quantization", "float32", "--max-kl", "1"]
    with traced(tmp_path, [*command, *flags]) as process:
        process.wait(PATIENCE)
    assert process.returncode == 0, (tmp_path / "out").read_text()[-2000:]
    assert (target / "manifest.json").exists()
    check_silent(tmp_path, target.parent)
