"""Finds and reads nodes in the graph of a decoder that mobius-onnx has built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError

# Indices of inputs of GroupQueryAttention.
PAST, CACHES = 3, 7
# Operators that handle each position independently, and any number of positions.
COPIED = frozenset(
    (
        *("Add", "Cast", "Concat", "Div", "Exp", "Gelu", "Greater", "LayerNormalization", "Max", "Min", "Mul", "Neg"),
        *("Relu", "Reshape", "Sigmoid", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "Slice"),
        *("Softplus", "Split", "Sqrt", "Sub", "Tanh", "Where"),
    )
)
FOLDED: dict[str, Callable[..., NDArray[Any]]] = {
    "Add": np.add,
    "Mul": np.multiply,
    "Sub": np.subtract,
    "Div": np.divide,
    "Sqrt": np.sqrt,
    "Exp": np.exp,
    "Neg": np.negative,
}


def key_shape(attention: ir.Node) -> tuple[int, int]:
    """The number of KV heads of a layer, and the head size."""
    past = attention.inputs[PAST]
    if past is None or past.shape is None or past.shape.rank() != 4:
        raise ExportError("the graph's attention has no KV cache")
    heads, size = past.shape[1], past.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise ExportError(
            f"the graph's attention has a KV cache of the shape {past.shape}, expected known heads and sizes"
        )
    return heads, size


def logits_of(graph: ir.Graph) -> ir.Value:
    """The output that is the logits."""
    logits = next((value for value in graph.outputs if value.name == "logits"), None)
    if logits is None:
        raise ExportError("the graph has no logits")
    return logits


def head_of(graph: ir.Graph) -> ir.Node:
    """The product that computes logits; only operators that handle each logit independently follow it."""
    value: ir.Value | None = logits_of(graph)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].producer() is None:
            return node
        computed = [operand for operand in node.inputs if operand is not None and operand.const_value is None]
        if len(computed) != 1 or node.op_type not in COPIED:
            break
        value = computed[0]
    raise ExportError("the graph does not end in a product with a matrix of the vocabulary")


def needed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that logits depend on, in order, except those that only compute lengths from a mask."""
    wanted: list[ir.Value | None] = [logits_of(graph)]
    reached: set[ir.Node] = set()
    while wanted:
        value = wanted.pop()
        node = None if value is None else value.producer()
        if node is None or node in reached:
            continue
        reached.add(node)
        attention = node.op_type == "GroupQueryAttention"
        wanted += [*node.inputs[:PAST], *node.inputs[CACHES:]] if attention else node.inputs
    return [node for node in graph if node in reached]


def swish(node: ir.Node) -> ir.Value | None:
    """The value that `node` multiplies with its own sigmoid."""
    if node.op_type != "Mul":
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        sigmoid = None if other is None else other.producer()
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is value:
            return value
    return None


def constant_of(node: ir.Node) -> NDArray[Any]:
    """The value of a Constant node."""
    for name, dtype in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
        if name in node.attributes:
            return np.array(node.attributes[name].value, dtype)
    if "value" not in node.attributes:
        raise ExportError("the graph has a constant of an unsupported type")
    return node.attributes["value"].as_tensor().numpy()
