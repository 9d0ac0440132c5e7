"""Graphs for CUDA: no operator, type or number of inputs that onnxruntime's CUDA provider has no kernel for."""

from __future__ import annotations

import json
import re

import onnx_ir as ir
import pytest

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.graph import cuda
from service import manifest
from tests.model_export import tiny


def run(tmp_path, family="llama", tied=True, **options):
    """Exports a tiny model."""
    source = tiny.hugging_face(tmp_path / "source", family=family, tie_word_embeddings=tied)
    export(source, tmp_path / "model", Options(**{"max_kl": 10.0, **options}), lambda *_: lambda: None)
    return tmp_path / "model"


def kinds(directory):
    """The operators of a graph, and its inputs and outputs by name."""
    graph = ir.load(directory / "model.onnx").graph
    named = {value.name: value for value in (*graph.inputs, *graph.outputs)}
    return {node.op_type for node in graph}, named


FORMS = ["auto", "float16", "int4", "int8"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen2", False), ("qwen3", True)])
def test_every_form_has_kernels(tmp_path, form, family, tied):
    """Each form for CUDA has only operators with CUDA kernels, and its KV cache is float16."""
    directory = run(tmp_path, family, tied, device="cuda", quantization=form)
    described = manifest.load(directory)
    assert described.devices == ("cpu", "cuda")
    assert described.kv.dtype == "float16"
    assert cuda.unsupported(ir.load(directory / "model.onnx")) == []
    _, named = kinds(directory)
    assert "query_seqlens" not in named
    assert {"logits", "top_logits", "top_ids", "log_sum_exp"} <= set(named)


def test_auto_takes_plain_float16(tmp_path):
    """A source that is not in 4 bits becomes float16, with its head as one product."""
    directory = run(tmp_path, device="cuda")
    assert manifest.load(directory).quantization.weights == "float16"
    assert not {"MatMulNBits", "MatMulIntegerToFloat"} & kinds(directory)[0]


def test_a_graph_for_the_processor_is_not_for_cuda(tmp_path):
    """The default export is not for CUDA, and `unsupported` names the operators without a kernel."""
    directory = run(tmp_path)
    assert manifest.load(directory).devices == ("cpu",)
    lacking = "; ".join(cuda.unsupported(ir.load(directory / "model.onnx")))
    assert "GroupQueryAttention takes 16 inputs at most, not 17" in lacking
    assert "MatMulIntegerToFloat has no kernel" in lacking
    assert "top_ids" not in kinds(directory)[1]


def test_what_cuda_cannot_run_is_refused(tmp_path):
    """CUDA has no attention kernel for float32 activations: the export fails and writes nothing."""
    with pytest.raises(ExportError, match=r"CUDA cannot run the graph: .*GroupQueryAttention"):
        run(tmp_path, device="cuda", quantization="float32")
    assert not (tmp_path / "model").exists()


def attention(dtype):
    """A graph of one attention node."""
    query = ir.val("query", dtype, [1, 1, 64])
    lengths, total = (ir.val(name, ir.DataType.INT32, [1]) for name in ("lengths", "total"))
    out = ir.val("out", dtype)
    node = ir.Node(
        "com.microsoft", "GroupQueryAttention", [query, None, None, None, None, lengths, total], outputs=[out]
    )
    graph = ir.Graph([query, lengths, total], [out], nodes=[node], opset_imports={"": 21, "com.microsoft": 1})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("dtype", "fine"), [("FLOAT16", True), ("BFLOAT16", True), ("FLOAT", False)])
def test_types_count(dtype, fine):
    """An operator with a kernel for one type may have none for another."""
    lacking = cuda.unsupported(attention(ir.DataType[dtype]))
    assert lacking == ([] if fine else ["com.microsoft:GroupQueryAttention has no kernel for T=float, M=int32"])


@pytest.mark.parametrize(("operator", "problems"), [("Gather", []), ("NoSuch", ["NoSuch has no kernel"])])
def test_operators_count(operator, problems):
    """An operator without any kernel is named."""
    inputs = [ir.val("data", ir.DataType.FLOAT, [2]), ir.val("at", ir.DataType.INT64, [1])]
    out = ir.val("out")
    nodes = [ir.Node("", operator, inputs, outputs=[out])]
    graph = ir.Graph(inputs, [out], nodes=nodes, opset_imports={"": 21})
    assert cuda.unsupported(ir.Model(graph, ir_version=10)) == problems


def test_the_list_is_of_the_package_that_the_extra_installs():
    """The kernels are those of the pinned onnxruntime-gpu."""
    version = json.loads(cuda.KERNELS.read_text())["onnxruntime"]
    project = (cuda.KERNELS.parents[2] / "pyproject.toml").read_text()
    (pinned,) = re.findall(r'"onnxruntime-gpu\[cuda,cudnn\]==([^"]+)"', project)
    assert pinned == version
