"""Reasons not to start: reported before the port opens, with what to change, and with an exit code."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from service import external_data, hashes, manifest
from service.errors import ModelDirectoryError, StartupError
from service.manifest import FileEntry
from service.serving import models
from service.settings import Settings
from tests.model_export import tiny
from tests.support.patience import PATIENCE, eventually
from tests.support.processes import TINY, export_tiny
from tests.support.stack import ROOT

DATA = manifest.WEIGHTS_FILE


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("start"))


@pytest.fixture
def model(exported: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be harmed."""
    return Path(shutil.copytree(exported, tmp_path / "model"))


def start(model_dir: Path, port: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", "--model-dir", str(model_dir), "--port", str(port)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)


def refused(model_dir: Path) -> str:
    """The error with which the service refuses a model directory: with 78, and before it so much as tries the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = start(model_dir, taken.getsockname()[1])
    assert done.returncode == 78, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def truncate(path: Path) -> tuple[str, ...]:
    size = path.stat().st_size
    os.truncate(path, size - 1)
    return (f"{size - 1} bytes, expected {size}",)


def flip(path: Path) -> tuple[str, ...]:
    (expected,), data = hashes.blocks(path), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    (found,) = hashes.blocks(path)
    return (f"SHA-256 {found} in bytes 0 to {len(data) - 1}", f"expected {expected}")


def remove(path: Path) -> tuple[str, ...]:
    path.unlink()
    return ("does not exist",)


def link(path: Path) -> tuple[str, ...]:
    path.with_suffix(".other").hardlink_to(path)
    return ("hard links",)


def lead_outside(path: Path) -> tuple[str, ...]:
    outside = path.parent.parent / "outside"
    path.rename(outside)
    path.symlink_to(outside)
    return ("outside the model directory",)


@pytest.mark.parametrize("name", [manifest.MODEL_FILE, DATA, manifest.TOKENIZER_FILE])
@pytest.mark.parametrize("harm", [truncate, flip, remove, link, lead_outside])
def test_a_harmed_file(model: Path, name: str, harm: Callable[[Path], tuple[str, ...]]) -> None:
    """The error names the file, what it contains, what was expected, and what to do."""
    said = harm(model / name)
    with pytest.raises(StartupError) as caught:
        models.load(Settings(model_dir=model))
    for part in (str(model / name), *said):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", [manifest.MODEL_FILE, manifest.TOKENIZER_FILE])
def test_a_harmed_file_is_never_parsed(model: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs and tokenizer are checked before anything reads them; only the weights are checked beside the load."""
    monkeypatch.setattr(models, "Tokenizer", pytest.fail)
    monkeypatch.setattr(models, "Model", pytest.fail)
    monkeypatch.setattr(external_data, "locations", pytest.fail)
    flip(model / name)
    with pytest.raises(ModelDirectoryError, match=f"{name} has SHA-256"):
        models.load(Settings(model_dir=model))


def list_file(model_dir: Path, name: str) -> None:
    """Makes the manifest name a file as it is."""
    path = model_dir / name
    entry = FileEntry.of(path)
    found = manifest.Manifest.model_validate_json((model_dir / manifest.FILE_NAME).read_bytes())
    found.model_copy(update={"files": {**found.files, name: entry}}).write(model_dir)


def test_a_flipped_bit_in_a_real_process(model: Path) -> None:
    """The service ends with 78; both hashes are on standard error."""
    said = flip(model / DATA)
    message = refused(model)
    assert all(part in message for part in said)
    assert "python -m model_export" in message


@pytest.mark.parametrize("location", [f"../{DATA}", "/etc/passwd", "other.onnx.data"])
def test_a_graph_that_takes_tensors_from_elsewhere(model: Path, location: str) -> None:
    """A graph is refused whose tensors lie in a file that the manifest does not list, wherever that is."""
    onnx_ir = pytest.importorskip("onnx_ir")
    path = model / manifest.MODEL_FILE
    proto = onnx_ir.serde.serialize_model(onnx_ir.load(path))
    tensor = next(each for each in proto.graph.initializer if each.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(proto.SerializeToString())
    (model.parent / DATA).write_bytes((model / DATA).read_bytes())
    list_file(model, manifest.MODEL_FILE)
    assert f"{path} takes tensors from {location!r}" in refused(model)


def test_a_graph_that_is_none(model: Path) -> None:
    """A file that is not a graph is never passed to onnxruntime."""
    (model / manifest.MODEL_FILE).write_bytes(b"weights")
    list_file(model, manifest.MODEL_FILE)
    assert "is not an ONNX graph" in refused(model)


def test_a_port_in_use(exported: Path) -> None:
    """The message names the port and the process that has it; the exit code is 1: another start may help."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start(exported, port)
    assert done.returncode == 1
    assert f"port {port} is in use (pid {os.getpid()})" in done.stderr
    assert "--port" in done.stderr


def begun(folder: Path) -> list[Path]:
    """The directory that a model is written into before it takes its place, and what is in it."""
    return [*folder.glob(".model.*"), *folder.glob(".model.*/*")]


@pytest.mark.parametrize("files", [0, 1, 2, 3, 4])
def test_an_export_that_is_killed(tmp_path: Path, files: int) -> None:
    """An export that is killed leaves a complete model or none, and the next export succeeds."""
    source, target = tiny.hugging_face(tmp_path / "source"), tmp_path / "model"
    command = [sys.executable, "-m", "model_export", str(source), str(target), "--id", TINY, "--max-kl", "1"]
    command += ["--quantization", "float32"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        eventually(lambda: len(begun(tmp_path)) > files or process.poll() is not None)
        process.send_signal(signal.SIGKILL)
    if target.exists():
        manifest.load(target)
        return
    for left in tmp_path.glob(".model.*"):
        # Refused, or whole where it was killed just before it was renamed.
        with suppress(StartupError):
            manifest.load(left)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    manifest.load(target)
