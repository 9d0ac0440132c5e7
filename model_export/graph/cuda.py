"""Graphs for NVIDIA GPUs: what they give besides logits, and whether onnxruntime has CUDA kernels for all of it.

`cuda_kernels.json` is what onnxruntime-gpu itself lists, for the version that it names: every operator's kernels as
[first opset, last opset, types by constraint], and its schemas as [first opset, inputs, outputs], each given by a
constraint or a type, with `*` before one that repeats. `make test-gpu` compares it with what is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

KERNELS = Path(__file__).with_name("cuda_kernels.json")


# As many as the sampler looks at before it sorts a whole row.
TOP_LOGITS = 64


def add_shortlist(model: ir.Model) -> None:
    """Adds what sampling mostly needs of the `logits` [R, vocab], so that they can stay on the GPU.

    `top_logits` float32 [R, k], falling, `top_ids` int64 [R, k], and `log_sum_exp` float32 [R, 1] of all.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    vocabulary = logits.shape[1]
    assert isinstance(vocabulary, int)
    count = min(TOP_LOGITS, vocabulary)
    tape = Tape()
    top, ids = tape.op_multi_out("TopK", [logits, _constant(graph, "shortlist.size", count)], num_outputs=2)
    peak = tape.op("Gather", [top, _constant(graph, "shortlist.first", 0)], {"axis": 1})
    weights = tape.op("Exp", [tape.op("Sub", [logits, peak])])
    total = tape.op("ReduceSum", [weights, _constant(graph, "shortlist.axis", 1)], {"keepdims": 1})
    normalizer = tape.op("Add", [tape.op("Log", [total]), peak])
    graph.extend(tape.nodes)
    outputs = {"top_logits": (top, count), "top_ids": (ids, count), "log_sum_exp": (normalizer, 1)}
    for name, (value, columns) in outputs.items():
        value.name, value.shape = name, ir.Shape(["R", columns])
        value.dtype = ir.DataType.INT64 if value is ids else ir.DataType.FLOAT
        graph.outputs.append(value)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(np.array([number], np.int64), name=name))
    graph.register_initializer(value)
    return value


def unsupported(model: ir.Model) -> list[str]:
    """What CUDA has no kernel for, each operator and choice of types said once; nothing when it can run the graph."""
    operators = json.loads(KERNELS.read_text(encoding="utf-8"))["operators"]
    types = {value: _type(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    problems: dict[str, None] = {}
    for node in model.graph.all_nodes():
        name = f"{node.domain}:{node.op_type}".removeprefix(":")
        operator = operators.get(f"{node.domain}:{node.op_type}")
        opset = model.opset_imports.get(node.domain, 1)
        problem = f"{name} has no kernel" if operator is None else _check(node, name, operator, opset, types)
        if problem:
            problems[problem] = None
    return list(problems)


def _check(node: ir.Node, name: str, operator: Any, opset: int, types: dict[ir.Value, str | None]) -> str | None:
    """What is wrong with a node; notes the types of its outputs."""
    schemas = [schema for schema in operator["schemas"] if schema[0] <= opset]
    if not schemas:
        return f"{name} is not in opset {opset}"
    _, inputs, outputs = schemas[-1]
    if len(node.inputs) > len(inputs) and not inputs[-1].startswith("*"):
        return f"{name} takes {len(inputs)} inputs at most, not {len(node.inputs)}"
    bound: dict[str, str] = {}
    for value, kind in zip(node.inputs, _repeated(inputs, len(node.inputs)), strict=False):
        known = None if value is None else types.get(value)
        if known is not None:
            bound.setdefault(kind, known)
    if node.op_type == "Cast":
        bound[outputs[0]] = ir.DataType(node.attributes["to"].as_int()).name.lower()
    for value, kind in zip(node.outputs, _repeated(outputs, len(node.outputs)), strict=False):
        types[value] = bound.get(kind, kind if kind not in _constraints(operator) else _type(value))
    kernels = [entry for since, until, entry in operator["kernels"] if since <= opset <= (until or opset)]
    if any(
        all(bound.get(each, allowed) in (allowed, *allowed.split()) for each, allowed in entry.items())
        for entry in kernels
    ):
        return None
    return f"{name} has no kernel for {', '.join(f'{each}={kind}' for each, kind in bound.items() if each != kind)}"


def _constraints(operator: Any) -> set[str]:
    return {each for _, _, entry in operator["kernels"] for each in entry}


def _repeated(kinds: list[str], count: int) -> list[str]:
    """The parameters' kinds, the last one for all that follow where it repeats."""
    plain = [kind.removeprefix("*") for kind in kinds]
    return plain + [plain[-1]] * (count - len(plain)) if plain and kinds[-1].startswith("*") else plain


def _type(value: ir.Value) -> str | None:
    return None if value.dtype is None else value.dtype.name.lower()
