"""The self-test at the start: rows alone, among others and in chunks, over the model's own products."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType
from onnx_ir.tape import Tape

from model_export.export import Options, export
from service import manifest
from service.engine.ort.device import Cpu
from service.engine.ort.model import Model
from service.engine.ort.self_test import lone_row_differs
from service.errors import ModelDirectoryError, StartupError
from tests.model_export import tiny

SHAPE = {"slots": 3, "context_length": 64, "threads": 2}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model over stock kernels in each form."""
    folder = tmp_path_factory.mktemp("forms")
    source = tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q4_0)
    for form in ("int8", "int4", "float32"):
        export(source, folder / form, Options(quantization=form, max_kl=0.05), lambda *_: lambda: None)
    return {form: folder / form for form in ("int8", "int4", "float32")}


def replaced(directory: Path, columns: int, *, name: str = "rows", company: bool = False) -> Path:
    """A copy of a directory with another self-test; with `company` a row's result is that of all rows' mean."""
    copy = directory.parent / f"{directory.name}-{name}-{columns}-{company}"
    shutil.copytree(directory, copy)
    tape, rows = Tape(), ir.val(name, ir.DataType.FLOAT, ["R", columns])
    mean = tape.op("ReduceMean", [rows, ir.val("axis", const_value=ir.tensor([0], name="axis"))], {"keepdims": 1})
    product = tape.op("Add", [rows, mean]) if company else tape.op("Identity", [rows])
    product.name, product.dtype = "product.0", ir.DataType.FLOAT
    axis = [value for node in tape.nodes for value in node.inputs if value is not None and value.name == "axis"]
    graph = ir.Graph([rows], [product], nodes=tape.nodes, initializers=axis[:1], opset_imports={"": 21}, name="test")
    ir.save(ir.Model(graph, ir_version=10), copy / manifest.SELF_TEST_FILE)
    return copy


def test_its_weights_are_the_models(exported: dict[str, Path]) -> None:
    """Every matrix is the beginning of one of the model's own, in the model's file, and the file itself is small."""
    for directory in exported.values():
        model, tested = (ir.load(directory / name).graph for name in (manifest.MODEL_FILE, manifest.SELF_TEST_FILE))
        stored = {name: value.const_value for name, value in tested.initializers.items()}
        matrices = {name: tensor for name, tensor in stored.items() if isinstance(tensor, ir.ExternalTensor)}
        assert len(matrices) >= 6
        for name, tensor in matrices.items():
            whole = model.initializers[name].const_value.numpy()
            np.testing.assert_array_equal(tensor.numpy(), whole[: tensor.shape[0]])
        assert {tensor.location for tensor in matrices.values()} == {manifest.WEIGHTS_FILE}
        assert (directory / manifest.SELF_TEST_FILE).stat().st_size < 1 << 14


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors compute 4-bit blocks in other ways")
def test_what_it_finds(exported: dict[str, Path]) -> None:
    """Only 4-bit blocks have a kernel of their own for a lone row."""
    found = {form: lone_row_differs(directory, Cpu(), 2) for form, directory in exported.items()}
    assert found == {"int8": False, "int4": True, "float32": False}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors compute 4-bit blocks in other ways")
def test_what_it_finds_is_mended(exported: dict[str, Path]) -> None:
    """A lone row is padded where the self-test says so, although the manifest does not."""
    directory = exported["int4"]
    described = manifest.load(directory)
    unaware = described.quantization.model_copy(update={"pads_lone_row": False})
    results = {}
    for invariant in (True, False):
        model = Model(
            directory, described.model_copy(update={"quantization": unaware}), **SHAPE, batch_invariant=invariant
        )
        for slot in range(3):
            model.forward(slot, [[7, 8, 9]], [0], [(0, 2)])
        alone = model.forward(0, [[5]], [3], [(0, 0)])[0].copy()
        together = model.forward(0, [[5]] * 3, [3] * 3, [(0, 0), (1, 0), (2, 0)])[0].copy()
        results[invariant] = np.array_equal(alone, together)
    assert results == {True: True, False: False}


def test_what_padding_does_not_mend(exported: dict[str, Path]) -> None:
    """A start with `batch_invariant` fails in one sentence that names it; without, the model loads."""
    directory = replaced(exported["int8"], 16, company=True)
    described = manifest.read(exported["int8"])
    with pytest.raises(
        StartupError, match=r"2 rows in another way than 160 on this.* by the setting batch_invariant \("
    ):
        Model(directory, described, **SHAPE, batch_invariant=True)
    Model(directory, described, **SHAPE, batch_invariant=False)


@pytest.mark.parametrize(("columns", "name"), [(16, "others"), (1 << 21, "rows")])
def test_another_graph(columns: int, name: str, exported: dict[str, Path]) -> None:
    """A graph that no export writes is refused before it runs."""
    with pytest.raises(ModelDirectoryError, match=r"self_test\.onnx has other inputs than rows"):
        lone_row_differs(replaced(exported["int8"], columns, name=name), Cpu(), 2)
