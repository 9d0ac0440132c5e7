"""The estimates of what an export takes, and what happens where there is too little room."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType

from model_export import room
from model_export.__main__ import main
from model_export.graph.precision import Precision
from model_export.graph.quantize import Activations, Form
from model_export.graph.source import Dimensions
from model_export.opening import read_source
from service.host import memory
from tests.model_export import tiny
from tests.model_export.test_export import run

MIB = 1 << 20


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models are larger."""
    for name, size in {"HIDDEN": 512, "INTERMEDIATE": 1024, "HEAD_DIM": 128}.items():
        monkeypatch.setattr(tiny, name, size)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("form", "activations"),
    [
        ("int4", "float32"),
        ("int4", "float16"),
        ("int8", "float32"),
        ("float16", "float16"),
        ("float32", "float32"),
    ],
)
def test_estimated_size(form: Form, activations: Activations, tmp_path: Path) -> None:
    """A graph has about the estimated size, and not much more."""
    path = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q4_1)
    exported = run(path, tmp_path / "model", quantization=form, activations=activations, max_kl=9.0)
    size = (exported / "model.onnx.data").stat().st_size
    assert 0.85 * size < room.graph_bytes(read_source(path).dimensions, Precision(form, activations)) < 1.15 * size


def test_too_little_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence says what is needed and what is free, and nothing is written."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10 * MIB))
    assert main([str(source), str(tmp_path / "new" / "model")]) == 2
    error = capsys.readouterr().err
    assert error == f"model_export: {tmp_path}: the export takes about 16 MiB of disk, and 10 MiB are free\n"
    assert list(tmp_path.iterdir()) == [source]


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """So with memory."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    monkeypatch.setattr(memory, "free", lambda: 100 * MIB)
    assert main([str(source), str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"model_export: the export takes about 1\d\d MiB of memory, and 100 MiB are free\n", error)
    assert list(tmp_path.iterdir()) == [source]


LLAMA = {"family": "llama", "kv_heads": 8, "vocab_size": 128_256, "context_length": 131_072}
SHAPES = {
    "llama-3.1-8b": Dimensions(
        **LLAMA,
        layers=32,
        head_dim=128,
        layer_weights=6_979_584_000,
        hidden_size=4096,
        rotary_pairs=64,
        table_weights=128_256 * 4096,
        largest_matrix=2 * 14_336 * 4096,
    ),
    "llama-3.2-1b": Dimensions(
        **LLAMA,
        layers=16,
        head_dim=64,
        layer_weights=973_144_064,
        hidden_size=2048,
        rotary_pairs=32,
        table_weights=128_256 * 2048,
        largest_matrix=2 * 8192 * 2048,
        tied_embedding=True,
    ),
}


def test_estimated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is not below the 2,264 MiB that a whole export took of its own on two cores, and not far above."""
    monkeypatch.setattr(room, "threads", lambda: 2)
    estimate = room.memory_needed(SHAPES["llama-3.2-1b"], Precision("int8", "float32")) / MIB
    assert 2264 < estimate < 1.3 * 2264


def test_memory_for_an_8b(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model of eight billion weights in 8 bits fits into 12 GiB of memory, not into 8; in own kernels' into 2."""
    dimensions, stock = SHAPES["llama-3.1-8b"], Precision("int8", "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    monkeypatch.setattr(memory, "free", lambda: 12 << 30)
    room.check_room(dimensions, stock, tmp_path / "model")
    monkeypatch.setattr(memory, "free", lambda: 8192 * MIB)
    with pytest.raises(room.ExportError, match="of memory, and 8192 MiB are free"):
        room.check_room(dimensions, stock, tmp_path / "model")
    monkeypatch.setattr(memory, "free", lambda: 2048 * MIB)
    room.check_room(dimensions, Precision("int4", "float32", "own", "float16"), tmp_path / "model")
