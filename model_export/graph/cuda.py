"""Graphs for NVIDIA GPUs: their further outputs, and whether onnxruntime has a CUDA kernel for every operator.

`cuda_kernels.json` is the list that onnxruntime-gpu itself gives, in the version that the file names. It holds every
operator's kernels as [first opset, last opset, types by constraint], and its schemas as [first opset, inputs, outputs].
An input or output is the name of a type constraint or a type, with `*` before one that repeats. `make test-gpu`
compares the file with the installed onnxruntime-gpu.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

KERNELS = Path(__file__).with_name("cuda_kernels.json")

# The sampler's shortlist has the same length; only beyond it the sampler needs a whole row of logits.
TOP_LOGITS = 64


def add_shortlist(model: ir.Model) -> None:
    """Adds outputs that suffice for most sampling, so that the `logits` [R, vocab] can stay on the GPU.

    These are `top_logits` float32 [R, k] in descending order, their token ids `top_ids` int64 [R, k], and `log_sum_exp`
    float32 [R, 1] of the whole row.
    """
    graph = model.graph
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    vocabulary = logits.shape[1]
    assert isinstance(vocabulary, int)
    count = min(TOP_LOGITS, vocabulary)
    tape = Tape(graph)
    size, first, axis = (
        tape.initializer(ir.tensor(np.array([number], np.int64), name=f"shortlist.{name}"))
        for name, number in (("size", count), ("first", 0), ("axis", 1))
    )
    top, ids = tape.op_multi_out("TopK", [logits, size], num_outputs=2)
    peak = tape.op("Gather", [top, first], {"axis": 1})
    weights = tape.op("Exp", [tape.op("Sub", [logits, peak])])
    total = tape.op("ReduceSum", [weights, axis], {"keepdims": 1})
    normalizer = tape.op("Add", [tape.op("Log", [total]), peak])
    outputs = {"top_logits": (top, count), "top_ids": (ids, count), "log_sum_exp": (normalizer, 1)}
    for name, (value, columns) in outputs.items():
        value.name, value.shape = name, ir.Shape(["R", columns])
        value.dtype = ir.DataType.INT64 if value is ids else ir.DataType.FLOAT
        graph.outputs.append(value)


def unsupported(model: ir.Model) -> list[str]:
    """The operators and types that CUDA has no kernel for, one sentence each; empty when CUDA can run the graph."""
    operators = json.loads(KERNELS.read_text(encoding="utf-8"))["operators"]
    types = {value: _type(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    opsets = model.opset_imports
    problems = [_missing_kernel(node, operators, opsets.get(node.domain, 1), types) for node in model.graph.all_nodes()]
    return list(dict.fromkeys(problem for problem in problems if problem))


def _missing_kernel(
    node: ir.Node, operators: Mapping[str, Any], opset: int, types: dict[ir.Value, str | None]
) -> str | None:
    """Why CUDA cannot run a node, or None. Adds the types of the node's outputs to `types`."""
    name = f"{node.domain}:{node.op_type}".removeprefix(":")
    operator = operators.get(f"{node.domain}:{node.op_type}")
    if operator is None:
        return f"{name} has no kernel"
    schemas = [schema for schema in operator["schemas"] if schema[0] <= opset]
    if not schemas:
        return f"{name} is not in opset {opset}"
    _, inputs, outputs = schemas[-1]
    if len(node.inputs) > len(inputs) and not inputs[-1].startswith("*"):
        return f"{name} takes {len(inputs)} inputs at most, not {len(node.inputs)}"
    bound: dict[str, str] = {}
    for value, constraint in zip(node.inputs, _repeated(inputs, len(node.inputs)), strict=False):
        known = None if value is None else types.get(value)
        if known is not None:
            bound.setdefault(constraint, known)
    if node.op_type == "Cast":
        bound[outputs[0]] = ir.DataType(node.attributes["to"].as_int()).name.lower()
    constraints = {constraint for _, _, allowed_types in operator["kernels"] for constraint in allowed_types}
    for value, constraint in zip(node.outputs, _repeated(outputs, len(node.outputs)), strict=False):
        types[value] = bound.get(constraint, constraint if constraint not in constraints else _type(value))
    kernels = [
        allowed_types for since, until, allowed_types in operator["kernels"] if since <= opset <= (until or opset)
    ]
    if any(
        all(bound.get(constraint, allowed) in (allowed, *allowed.split()) for constraint, allowed in kernel.items())
        for kernel in kernels
    ):
        return None
    types_given = ", ".join(f"{constraint}={given}" for constraint, given in bound.items() if constraint != given)
    return f"{name} has no kernel for {types_given}"


def _repeated(parameters: list[str], count: int) -> list[str]:
    """The constraints of `count` parameters, of which the last one repeats where it begins with `*`."""
    plain = [parameter.removeprefix("*") for parameter in parameters]
    return plain + [plain[-1]] * (count - len(plain)) if plain and parameters[-1].startswith("*") else plain


def _type(value: ir.Value) -> str | None:
    return None if value.dtype is None else value.dtype.name.lower()
