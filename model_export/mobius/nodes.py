"""What there is in the graph of a decoder that mobius-onnx has built, and what its nodes say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError

# Inputs of GroupQueryAttention by their places.
PAST, CACHES = 3, 7
# What works on each position alone, and on any number of them.
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
    """How many keys a position has in a layer, and the size of one."""
    past = attention.inputs[PAST]
    if past is None or past.shape is None or past.shape.rank() != 4:
        raise ExportError("attention keeps no keys")
    heads, size = past.shape[1], past.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise ExportError(f"attention keeps keys of an unknown shape {past.shape}")
    return heads, size


def logits_of(graph: ir.Graph) -> ir.Value:
    """The output that is the logits."""
    found = [value for value in graph.outputs if value.name == "logits"]
    if not found:
        raise ExportError("the graph has no logits")
    return found[0]


def head_of(graph: ir.Graph) -> ir.Node:
    """The product that makes logits, after which there is only what works on each of them alone."""
    value: ir.Value | None = logits_of(graph)
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].producer() is None:
            return node
        computed = [each for each in node.inputs if each is not None and each.const_value is None]
        if len(computed) != 1 or node.op_type not in COPIED:
            break
        value = computed[0]
    raise ExportError("the graph does not end in a product with a matrix of the vocabulary")


def needed(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that logits depend on, in their order, without those that only make lengths out of a mask."""
    wanted: list[ir.Value | None] = [logits_of(graph)]
    found: set[ir.Node] = set()
    while wanted:
        value = wanted.pop()
        node = None if value is None else value.producer()
        if node is None or node in found:
            continue
        found.add(node)
        attention = node.op_type == "GroupQueryAttention"
        wanted += [*node.inputs[:PAST], *node.inputs[CACHES:]] if attention else node.inputs
    return [node for node in graph if node in found]


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
    """The value of a node that has no inputs."""
    for name, kind in (("value_int", np.int64), ("value_ints", np.int64), ("value_float", np.float32)):
        if name in node.attributes:
            return np.array(node.attributes[name].value, kind)
    if "value" not in node.attributes:
        raise ExportError("the graph has a constant of an unknown kind")
    return node.attributes["value"].as_tensor().numpy()
