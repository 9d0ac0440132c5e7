"""Model directories with right hashes and wrong contents are refused in one sentence before anything runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from model_export.export import Options, export
from service import manifest as manifests
from service.errors import ModelDirectoryError, StartupError
from service.serving import models
from service.settings import Settings
from tests.model_export import tiny
from tests.support.patience import PATIENCE

Change = Callable[[Path], object]
Nodes = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    folder = tmp_path_factory.mktemp("exported")
    source = tiny.hugging_face(folder / "Tiny")
    export(source, folder / "model", Options(max_kl=1.0), lambda label, total: lambda: None)
    return folder / "model"


def list_files(directory: Path) -> None:
    """Writes the files' real sizes and hashes into the manifest, as the author of the directory would."""
    path = directory / "manifest.json"
    described = json.loads(path.read_text())
    for name in described["files"]:
        described["files"][name] = manifests.FileEntry.of(directory / name).model_dump(mode="json")
    path.write_text(json.dumps(described))


def described(**changes: Any) -> Change:
    """The manifest with other values; `kv__layers` names the entry `layers` of `kv`."""

    def change(directory: Path) -> None:
        path = directory / "manifest.json"
        content = json.loads(path.read_text())
        for name, value in changes.items():
            part, _, entry = name.rpartition("__")
            (content[part] if part else content)[entry] = value
        path.write_text(json.dumps(content))

    return change


def graph(change: Nodes, name: str = "model.onnx") -> Change:
    """A graph whose protobuf `change` has edited."""

    def edit(directory: Path) -> None:
        model = onnx.load(directory / name, load_external_data=False)
        change(model)
        (directory / name).write_bytes(model.SerializeToString())

    return edit


def first_external(model: onnx.ModelProto) -> onnx.TensorProto:
    """The first tensor that is stored in the data file."""
    return next(tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL)


def external(**entries: str) -> Change:
    """A graph whose first external tensor has other `external_data` entries."""

    def change(model: onnx.ModelProto) -> None:
        for entry in first_external(model).external_data:
            entry.value = entries.get(entry.key, entry.value)

    return graph(change)


def operator(op_type: str, domain: str = "") -> Change:
    """A graph with one more node, of an operator that does not exist."""

    def change(model: onnx.ModelProto) -> None:
        model.graph.node.append(onnx.helper.make_node(op_type, ["input_ids"], ["evil"], domain=domain))
        if domain and domain not in {opset.domain for opset in model.opset_import}:
            model.opset_import.append(onnx.helper.make_opsetid(domain, 1))

    return graph(change)


def cycle(model: onnx.ModelProto) -> None:
    """Two nodes, each of which needs the output of the other."""
    model.graph.node.append(onnx.helper.make_node("Identity", ["one"], ["other"]))
    model.graph.node.append(onnx.helper.make_node("Identity", ["other"], ["one"]))


def resized(name: str, axis: int, size: int, values: str = "input") -> Nodes:
    """A graph that declares another size for one axis of an input or output."""

    def change(model: onnx.ModelProto) -> None:
        value = next(entry for entry in getattr(model.graph, values) if entry.name == name)
        value.type.tensor_type.shape.dim[axis].dim_value = size

    return change


def renamed(old: str, new: str) -> Nodes:
    """A graph with an input renamed."""

    def change(model: onnx.ModelProto) -> None:
        next(entry for entry in model.graph.input if entry.name == old).name = new
        for node in model.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]

    return change


def one_more_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(onnx.helper.make_tensor_value_info("surprise", onnx.TensorProto.FLOAT, [1]))


def file(name: str, content: bytes) -> Change:
    """A file with other contents."""
    return lambda directory: (directory / name).write_bytes(content)


def nested(levels: int) -> bytes:
    """A graph inside a node's attribute inside a graph, `levels` deep."""
    inner = b""
    for _ in range(levels):
        for field in (6, 5, 1):  # Attribute.g, Node.attribute, Graph.node
            inner = bytes([field << 3 | 2]) + onnx_varint(len(inner)) + inner
    return bytes([7 << 3 | 2]) + onnx_varint(len(inner)) + inner


def onnx_varint(number: int) -> bytes:
    """A number as protobuf writes it."""
    low = number & 127
    return bytes([low]) if number < 128 else bytes([low | 128]) + onnx_varint(number >> 7)


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Change:
    """A tokenizer whose JSON `change` has edited."""

    def edit(directory: Path) -> None:
        path = directory / "tokenizer.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


UNLISTED = "which manifest.json does not list; refusing to load it"
NO_MEMORY = "the memory does not hold the model and one sequence of "
NOT_LOADED = "model.onnx cannot be loaded by onnxruntime "

CASES: dict[str, tuple[Change, str]] = {
    "unknown operator": (operator("NoSuchOperator"), NOT_LOADED),
    "operator of another's domain": (operator("Run", "evil.operators"), NOT_LOADED),
    "operator of a compiled context": (operator("EPContext", "com.microsoft"), NOT_LOADED),
    "path upwards": (external(location="../../secret"), f"takes tensors from '../../secret', {UNLISTED}"),
    "absolute path": (external(location="/etc/passwd"), f"takes tensors from '/etc/passwd', {UNLISTED}"),
    "address in memory": (external(location="*/_ORT_MEM_ADDR_/*", offset="4096"), UNLISTED),
    "offset beyond the file": (external(offset=str(1 << 40)), NOT_LOADED),
    "offset below zero": (external(offset="-4096"), NOT_LOADED),
    "offset that is no number": (external(offset="0x"), NOT_LOADED),
    "offset beyond all numbers": (external(offset=str(1 << 64)), NOT_LOADED),
    "length beyond the file": (external(length=str(1 << 40)), NOT_LOADED),
    "length that does not fit the shape": (external(length="4"), NOT_LOADED),
    "shape beyond the file": (graph(lambda m: first_external(m).dims.__setitem__(0, 1 << 40)), NOT_LOADED),
    "shape that overflows": (graph(lambda m: first_external(m).dims.extend([1 << 31, 1 << 31])), NOT_LOADED),
    "shape below zero": (graph(lambda m: first_external(m).dims.__setitem__(0, -1)), NOT_LOADED),
    "nodes in a circle": (graph(cycle), NOT_LOADED),
    "empty graph": (file("model.onnx", b""), NOT_LOADED),
    "no graph": (file("model.onnx", b"hello world" * 99), "model.onnx is not an ONNX graph: "),
    "graph cut off": (
        lambda directory: (directory / "model.onnx").write_bytes((directory / "model.onnx").read_bytes()[:5000]),
        "model.onnx is not an ONNX graph: ",
    ),
    "nested graphs": (file("model.onnx", nested(3000)), "model.onnx is not an ONNX graph: messages are nested deeper"),
    "one more input": (graph(one_more_input), "has an input 'surprise', which the manifest does not describe"),
    "input of another name": (
        graph(renamed("seqlens_k", "lens")),
        "has no input seqlens_k, which the manifest implies",
    ),
    "more layers": (described(kv__layers=3), "model.onnx has no input past_key.2, which the manifest implies"),
    "fewer layers": (described(kv__layers=1), "has an input 'past_key.1', which the manifest does not describe"),
    "more layers than memory has maps": (described(kv__layers=10**6), NO_MEMORY),
    "other heads": (
        described(kv__kv_heads=4),
        "model.onnx: input past_key.0 is tensor(float) of shape [?, 2, ?, 32], but the manifest implies "
        "tensor(float) of shape [?, 4, ?, 32]",
    ),
    "other head size": (described(kv__head_dim=16), "but the manifest implies tensor(float) of shape [?, 2, ?, 16]"),
    "other type": (described(kv__dtype="float16"), "but the manifest implies tensor(float16) of shape [?, 2, ?, 32]"),
    "larger vocabulary": (
        described(vocab_size=tiny.VOCAB + 1),
        "output logits is tensor(float) of shape [?, 260], but the manifest implies tensor(float) of shape [?, 261]",
    ),
    "smaller vocabulary": (described(vocab_size=200), "but the manifest allows only 0..199"),
    "vocabulary beyond memory": (described(vocab_size=1 << 60), NO_MEMORY),
    "head size beyond memory": (described(kv__head_dim=1 << 60), NO_MEMORY),
    "tokenizer is not JSON": (file("tokenizer.json", b"{"), "tokenizer.json is not a tokenizer file: "),
    "tokenizer is nested": (file("tokenizer.json", b'{"a":' * 10**5), "tokenizer.json is not a tokenizer file: "),
    "token beyond the vocabulary": (
        tokenizer(lambda t: t["model"]["vocab"].update(extra=tiny.VOCAB)),
        "tokenizer.json: token 'extra' is 260, but the manifest allows only 0..259",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused_at_start(case: str, exported: Path, tmp_path: Path) -> None:
    """A model that cannot run, or contradicts its manifest, is refused before any request, although its hashes fit."""
    change, message = CASES[case]
    directory = shutil.copytree(exported, tmp_path / "model")
    change(directory)
    list_files(directory)
    with pytest.raises(StartupError) as caught:
        models.load(Settings(model_dir=directory, threads=1))
    assert message in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_unchanged_directory_loads(exported: Path, tmp_path: Path) -> None:
    """The same directory without a change loads."""
    directory = shutil.copytree(exported, tmp_path / "model")
    list_files(directory)
    assert models.load(Settings(model_dir=directory, threads=1))[0].manifest.vocab_size == tiny.VOCAB


@pytest.mark.parametrize("case", ["unknown operator", "other heads", "token beyond the vocabulary"])
def test_command(case: str, exported: Path, tmp_path: Path) -> None:
    """The service exits with 78, which tells supervisors not to restart it, and writes one line."""
    directory = shutil.copytree(exported, tmp_path / "model")
    CASES[case][0](directory)
    list_files(directory)
    arguments = [sys.executable, "-m", "service", "--model-dir", str(directory)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert run.returncode == 78
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert CASES[case][1] in errors[0]
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("name", ["a\0b", "loop"])
def test_names_of_no_file(name: str, exported: Path, tmp_path: Path) -> None:
    """A name that no file can have, or a link to itself, is refused like a path out of the directory."""
    directory = shutil.copytree(exported, tmp_path / "model")
    (directory / "loop").symlink_to("loop")
    content = json.loads((directory / "manifest.json").read_text())
    content["files"] = {name: {"bytes": 1, "sha256": ["0" * 64]}, **content["files"]}
    (directory / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ModelDirectoryError):
        manifests.load(directory)
