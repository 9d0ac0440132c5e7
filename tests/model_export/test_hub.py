"""A model's name on a hub as the source, with the real client and a hub on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from model_export.sources.hugging_face.hub import HubName, hub_name
from service import manifest
from tests.model_export import tiny
from tests.support.patience import PATIENCE
from tests.support.stack import ROOT

COMMIT = hashlib.sha1(b"the only one", usedforsecurity=False).hexdigest()
NAME = "Somebody/Tiny-1M"


class Hub(ThreadingHTTPServer):
    """The paths of a hub's API that the client uses, for one model in `folder`. `asked` records the requests."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.asked: list[str] = []

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
        if path.startswith("/api/"):
            siblings = [{"rfilename": str(file.relative_to(self.server.folder))} for file in self._files()]
            info = {"id": NAME, "modelId": NAME, "sha": COMMIT, "siblings": siblings, "tags": []}
            return self._send(200, json.dumps(info).encode(), {}, body)
        file = self.server.folder / path.split(f"/resolve/{COMMIT}/")[1]
        headers = {"ETag": f'"{self._entry(file)["oid"]}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        return self._send(200, file.read_bytes(), headers, body)

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


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A hub with one tiny model, which has some files that must not be downloaded."""
    folder = tiny.hugging_face(tmp_path / "on the hub", "qwen2")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling_tiny.py").write_text("raise SystemExit('code of a model was run')")
    (folder / "consolidated.safetensors").write_bytes(b"another form")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"one more")
    with Hub(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def run(endpoint: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line with another hub and cache, in a new process: the client reads its environment only once."""
    variables = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    variables |= {"HF_HUB_ETAG_TIMEOUT": str(PATIENCE)}
    return subprocess.run(
        [sys.executable, "-m", "model_export", *arguments],
        cwd=ROOT,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_a_name_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    """For a model's name only the necessary files are downloaded; the export has its name and its owner's."""
    ran = run(hub.url, tmp_path / "home", NAME, str(tmp_path / "model"), "--max-kl", "0.05")
    assert ran.returncode == 0, ran.stderr
    described = manifest.load(tmp_path / "model")
    assert (described.id, described.owned_by) == ("Tiny-1M", "Somebody")
    files = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    weights = {"model-0.safetensors", "model-1.safetensors", "model.safetensors.index.json"}
    assert files == {"config.json", "tokenizer.json", *weights}
    assert not any("onnx/" in path for path in hub.asked)


def test_a_copy_serves_where_the_hub_cannot_be_reached(hub: Hub, tmp_path: Path) -> None:
    """A model in the cache, here with its revision, can be exported without a network."""
    home = tmp_path / "home"
    first = run(hub.url, home, f"{NAME}@v1", str(tmp_path / "one"), "--max-kl", "0.05")
    assert first.returncode == 0, first.stderr
    again = run("http://127.0.0.1:9", home, f"{NAME}@v1", str(tmp_path / "two"), "--max-kl", "0.05")
    assert again.returncode == 0, again.stderr
    assert manifest.load(tmp_path / "two").id == "Tiny-1M"


def test_weights_of_unsupported_families_stay_there(hub: Hub, tmp_path: Path) -> None:
    """A family that is not supported is refused after only its configuration was downloaded."""
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    ran = run(hub.url, tmp_path / "home", NAME, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"model_export: {NAME}: architecture 'mamba' is not supported: its recurrent layers")
    assert ran.stderr.count("\n") == 1
    assert [path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path] == ["config.json"]
    assert not (tmp_path / "out").exists()


def test_no_configuration(hub: Hub, tmp_path: Path) -> None:
    """A model without a configuration, for example with only GGUF files, is refused for that reason."""
    (hub.folder / "config.json").unlink()
    ran = run(hub.url, tmp_path / "home", NAME, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert f"{NAME} has no config.json on the hub" in ran.stderr
    assert not any("/resolve/" in path for path in hub.asked)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Somebody/Nothing", "there is none of that name, or it is private"),
        ("Somebody/Gated", "its owner asks for consent first"),
        (f"{NAME}@v2", "it has no revision v2"),
    ],
)
def test_what_the_hub_does_not_give(hub: Hub, tmp_path: Path, name: str, reason: str) -> None:
    """One sentence says why there is no such source, and nothing is left behind."""
    ran = run(hub.url, tmp_path / "home", name, str(tmp_path / "out" / "model"))
    assert ran.returncode == 2
    assert ran.stderr.startswith(f"model_export: {name} is no file or directory, nor a model of {hub.url}: {reason}")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_network(tmp_path: Path) -> None:
    """If the hub cannot be reached, the message says so."""
    ran = run("http://127.0.0.1:9", tmp_path / "home", NAME, str(tmp_path / "model"))
    assert ran.returncode == 2
    assert "the hub cannot be reached, and the cache has no complete copy" in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("a/b", HubName("a", "b", None)),
        ("HuggingFaceTB/SmolLM2-135M@refs/pr/1", HubName("HuggingFaceTB", "SmolLM2-135M", "refs/pr/1")),
        ("model.gguf", None),
        ("/a/b", None),
        ("./a/b", None),
        ("../a", None),
        ("a/b/c", None),
        ("a/b@", None),
        ("a/..", None),
        ("a b/c", None),
    ],
)
def test_names(source: str, name: HubName | None) -> None:
    """A name is an owner, a slash and a name; paths are not names."""
    assert hub_name(source) == name
