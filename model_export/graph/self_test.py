"""The graph of the service's self-test: some of a model's own products, cut to few columns.

It takes its matrices from the model's file of weights, of each the beginning, so it needs no weights of its own.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.tape import Tape

from model_export.graph.interface import IR_VERSION

# Products of the first layers and of the last; in Llama's architecture a layer has four.
_FIRST, _LAST = 4, 2
# What of a matrix is multiplied: so many rows of it as it lies in the file.
_ROWS = 128
_OPERATORS = ("MatMulNBits", "MatMul", "Gemm")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def self_test(model: ir.Model) -> ir.Model:
    """A graph with the input `rows` float32 [R, columns], the outputs `product.0`.. [R, any], and no state.

    Each product has the operator, the attributes and the first weights of one of `model`, and takes as many of the
    input's columns as it needs.
    """
    products = [node for node in model.graph if node.op_type in _OPERATORS and _stored(node) is not None]
    tape = Tape()
    rows = ir.val("rows", ir.DataType.FLOAT)
    found = [_cut(tape, rows, node, index) for index, node in enumerate(_some(products))]
    rows.shape = ir.Shape(["R", max((columns for _, columns in found), default=1)])
    outputs = [output for output, _ in found]
    initializers = {value.name: value for node in tape.nodes for value in node.inputs if value and value.const_value}
    graph = ir.Graph(
        [rows],
        outputs,
        nodes=tape.nodes,
        initializers=list(initializers.values()),
        opset_imports=model.opset_imports,
        name="self_test",
    )
    return ir.Model(graph, ir_version=IR_VERSION, producer_name="model_export")


def _some(products: list[ir.Node]) -> list[ir.Node]:
    return products if len(products) <= _FIRST + _LAST else products[:_FIRST] + products[-_LAST:]


def _stored(node: ir.Node) -> ir.ExternalTensor | None:
    """The matrix of a product, where it is one of weights."""
    value = node.inputs[1]
    tensor = None if value is None else value.const_value
    return tensor if isinstance(tensor, ir.ExternalTensor) else None


def _cut(tape: Tape, rows: ir.Value, node: ir.Node, index: int) -> tuple[ir.Value, int]:
    """The product over the first rows of a node's matrix, and how many columns of `rows` it takes."""
    matrix = _stored(node)
    assert matrix is not None
    sizes = matrix.shape.numpy()
    count = min(_ROWS, sizes[0])
    attributes = dict(node.attributes)
    if node.op_type == "MatMulNBits":
        columns = attributes["K"].as_int()
        attributes["N"] = ir.AttrInt64("N", count)
        weights = [_beginning(value, count) for value in node.inputs[1:4]]  # codes, scales, zero points
    else:
        columns = count if node.op_type == "MatMul" else sizes[1]
        weights = [_beginning(node.inputs[1], count)]
    bounds = {"first": 0, "last": columns, "axis": 1}
    value = tape.op("Slice", [rows, *(_size(f"{index}.{name}", at) for name, at in bounds.items())])
    floats = next(weight.dtype for weight in reversed(weights) if weight is not None and weight.dtype in _FLOATS)
    if floats != ir.DataType.FLOAT:
        value = tape.op("Cast", [value], {"to": floats.value})
    product = tape.op(node.op_type, [value, *weights], attributes, domain=node.domain)
    product.name, product.dtype = f"product.{index}", floats
    return product, columns


def _size(name: str, value: int) -> ir.Value:
    return ir.val(name, const_value=ir.tensor([value], ir.DataType.INT64, name=name))


def _beginning(value: ir.Value | None, count: int) -> ir.Value | None:
    """The first `count` rows of a stored matrix, which lie together."""
    if value is None:
        return None
    stored = value.const_value
    assert isinstance(stored, ir.ExternalTensor)
    rows, *others = stored.shape.numpy()
    assert stored.length is not None
    cut = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length // rows * count,
        stored.dtype,
        shape=ir.Shape([count, *others]),
        name=stored.name,
        base_dir=stored.base_dir,
    )
    return ir.val(stored.name, dtype=stored.dtype, const_value=cut)
