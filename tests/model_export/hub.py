"""A hub on this machine, and the environment with which the real client asks it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.patience import PATIENCE
from tests.support.stack import ROOT

COMMIT = hashlib.sha1(b"the only one", usedforsecurity=False).hexdigest()
NAME = "Somebody/Tiny-1M"


class Hub(ThreadingHTTPServer):
    """The paths of a hub's API that are used, for one model in `folder`. `asked` records the requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []
        # The name of a file and the first byte of each part of it that was asked for.
        self.ranges: list[tuple[str, int]] = []
        # What is sent in place of a file's own content.
        self.sent: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if body:
            self.server.asked.append(path)
        if path.startswith("/api/models/Somebody/Gated"):
            return self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "consent"}, body)
        if not path.startswith((f"/api/models/{NAME}", f"/{NAME}/")):
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
        if "/revision/" in path and path.rpartition("/")[2] not in ("main", COMMIT, "v1"):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)
        if "/tree/" in path:
            return self._send(200, json.dumps([self._entry(file) for file in self._files()]).encode(), {}, body)
        if not path.startswith("/api/"):
            return self._send_file(self.server.folder / path.split(f"/resolve/{COMMIT}/")[1], body)
        siblings = [self._sibling(file) for file in self._files()]
        info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self._send(200, json.dumps(info).encode(), {}, body)

    def _send_file(self, file: Path, body: bool) -> None:
        sibling = self._sibling(file)
        etag = sibling["lfs"]["sha256"] if "lfs" in sibling else sibling["blobId"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        data = self.server.sent.get(file.name, file.read_bytes())
        status = 200
        if body and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            self.server.ranges.append((file.name, int(wanted[1])))
            end = min(len(data), int(wanted[2]) + 1 if wanted[2] else len(data))
            headers["Content-Range"] = f"bytes {wanted[1]}-{end - 1}/{len(data)}"
            status, data = 206, data[int(wanted[1]) : end]
        self._send(status, data, headers, body)

    def _sibling(self, file: Path) -> dict[str, Any]:
        """A file's entry in the description of the model; LFS holds large ones under the hash of their content."""
        entry = self._entry(file)
        made: dict[str, Any] = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
        if file.suffix in (".safetensors", ".gguf"):
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            made["lfs"] = {"sha256": digest, "size": entry["size"], "pointerSize": 134}
        return made

    def _files(self) -> list[Path]:
        return sorted(file for file in self.server.folder.rglob("*") if file.is_file())

    def _entry(self, file: Path) -> dict[str, object]:
        data = file.read_bytes()
        digest = hashlib.sha1(data, usedforsecurity=False).hexdigest()
        return {"type": "file", "path": str(file.relative_to(self.server.folder)), "size": len(data), "oid": digest}

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


Ran = subprocess.CompletedProcess[str]
Command = Callable[..., Ran]


def variables(endpoint: str, home: Path) -> dict[str, str]:
    """The environment with which the client asks another hub, and keeps its cache in `home`."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": str(PATIENCE),
    }


def in_a_new_process(endpoint: str, home: Path, *arguments: str) -> Ran:
    """The command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "model_export", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables(endpoint, home)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


@contextmanager
def client_imported_anew() -> Iterator[None]:
    """The client reads its environment when it is imported: within, that is when it is used first."""

    def taken_out() -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]
        return {name: sys.modules.pop(name) for name in names}

    others = taken_out()
    try:
        yield
    finally:
        taken_out()["huggingface_hub"].close_session()
        sys.modules.update(others)
