"""Translates the graph of a decoder built by mobius-onnx into the service's form; see `model_export.native.graph`.

Each node in turn is replaced by nodes of `graph.operators`: matrices are quantized, attention takes the lengths of rows
instead of a mask, and logits are computed only for the wanted positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.graph.initializers import Initializers
from model_export.graph.interface import Interface
from model_export.graph.operators import CONTRIB, Operators, Table
from model_export.mobius.nodes import (
    CACHES,
    COPIED,
    FOLDED,
    PAST,
    constant_of,
    head_of,
    key_shape,
    logits_of,
    needed,
    swish,
)
from model_export.sources.weights import Floats

# The attributes of attention that are copied; the window comes from the configuration.
_ATTENTION_ATTRIBUTES = ("num_heads", "scale", "softcap", "do_rotary", "rotary_interleaved")


@dataclass(frozen=True)
class AttentionOverride:
    """Properties of a layer's attention that mobius-onnx's graph does not always have right.

    A token attends to the last `window` positions up to and including its own, to all if None. `scale` is the factor of
    the scores, `rotations` are cosine and sine [context_length, rotated / 2] of each position; None keeps the graph's.
    """

    window: int | None
    scale: float | None
    rotations: tuple[Floats, Floats] | None


class Translation:
    """One pass over the graph of a decoder; `attentions` has one entry per layer.

    Raises ExportError for a graph with anything that the service's form does not have.
    """

    def __init__(
        self,
        source: ir.Graph,
        operators: Operators,
        data: Initializers,
        attentions: Sequence[AttentionOverride],
        context_length: int,
    ) -> None:
        self._source = source
        self._operators = operators
        self._data = data
        self._attentions = attentions
        self._context_length = context_length
        self._interface = Interface(operators)
        self._values: dict[ir.Value, ir.Value] = {}
        self._constants: dict[ir.Value, NDArray[Any]] = {}
        self._tables: list[tuple[Table, NDArray[Any]]] = []
        self._head = head_of(source)
        self._in_logits = False  # behind the head, where all values are float32
        self._skipped: set[ir.Node] = set()

    def translate(self, on_layer: Callable[[], object]) -> ir.Model:
        """The complete model. Calls `on_layer` after each layer."""
        for node in needed(self._source):
            if node not in self._skipped:
                self._emit(node)
            if node.op_type == "GroupQueryAttention":
                on_layer()
        logits = self._values[logits_of(self._source)]
        return self._interface.model(logits, self._vocab_size(), self._data, self._source.name or "decoder")

    def _vocab_size(self) -> int:
        matrix = self._constant(self._head.inputs[1])
        assert matrix is not None  # checked by `head_of`
        return int(matrix.shape[1])

    def _emit(self, node: ir.Node) -> None:
        if self._fold(node):
            return
        match node.op_type:
            case "GroupQueryAttention":
                self._attend(node)
            case "MatMul":
                self._product(node)
            case "Gather":
                self._look_up(node)
            case "RMSNormalization":
                value, scale = self._value(node.inputs[0]), self._value(node.inputs[1])
                epsilon = node.attributes["epsilon"].as_float()
                self._values[node.outputs[0]] = self._operators.rms_norm(value, scale, epsilon)
            case "Mul" if (gate := swish(node)) is not None:
                activated = self._operators.apply("QuickGelu", self._value(gate), domain=CONTRIB, alpha=1.0)
                self._values[node.outputs[0]] = activated
            case "Sigmoid" if all(swish(use.node) is not None for use in node.outputs[0].uses()):
                pass
            case copied if copied in COPIED:
                self._copy(node)
            case unknown:
                raise ExportError(f"the graph has an operator {unknown}, which cannot be exported")

    def _copy(self, node: ir.Node) -> None:
        inputs = [None if value is None else self._value(value) for value in node.inputs]
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        outputs = self._operators.apply_many(
            node.op_type, *inputs, outputs=len(node.outputs), domain=node.domain, **attributes
        )
        self._values.update(zip(node.outputs, outputs, strict=True))

    def _fold(self, node: ir.Node) -> bool:
        """Computes a node whose inputs are all constants; whether it has done so."""
        if node.op_type == "Constant":
            self._constants[node.outputs[0]] = constant_of(node)
            return True
        inputs = [None if value is None else self._constant(value) for value in node.inputs]
        if node.op_type == "Transpose" and inputs[0] is not None:
            self._constants[node.outputs[0]] = inputs[0].transpose(node.attributes["perm"].as_ints())
            return True
        if node.op_type not in FOLDED or any(value is None for value in inputs):
            return False
        self._constants[node.outputs[0]] = FOLDED[node.op_type](*inputs)
        return True

    def _constant(self, value: ir.Value | None) -> NDArray[Any] | None:
        if value is None:
            return None
        if value in self._constants:
            return self._constants[value]
        return None if value.const_value is None else value.const_value.numpy()

    def _value(self, value: ir.Value | None) -> ir.Value:
        """The value in the new graph; a constant is stored at its first use."""
        if value is None:
            raise ExportError("the graph has an operator without an input that it needs")
        if value not in self._values:
            self._values[value] = self._input(value)
        return self._values[value]

    def _input(self, value: ir.Value) -> ir.Value:
        constant = self._constant(value)
        if constant is None:
            if value.name == "input_ids":
                return self._interface.input_ids
            if value.name == "position_ids":
                return self._positions()
            raise ExportError(f"the graph has an input {value.name}, which the service does not provide")
        name = f"constant.{len(self._values)}.{value.name}"
        if constant.dtype == np.float32 and not self._in_logits:
            return self._operators.vector(name, constant)
        return self._data.constant(name, constant)

    def _positions(self) -> ir.Value:
        """Each token's position [B, S] in its row; those of padding are clipped to the context."""
        operators = self._operators

        def int64(value: ir.Value) -> ir.Value:
            return operators.apply("Cast", value, to=ir.DataType.INT64.value)

        zero, one, last = (
            self._data.constant(f"positions.{number}", np.array(number, np.int64))
            for number in (0, 1, self._context_length - 1)
        )
        width = operators.apply("Gather", operators.apply("Shape", self._interface.input_ids), one)
        # Without the input `query_seqlens` all tokens of a row are valid.
        lengths = width if self._interface.query_seqlens is None else int64(self._interface.query_seqlens)
        first = operators.apply("Sub", int64(self._interface.seqlens_k), lengths)
        first = operators.apply("Unsqueeze", first, operators.sizes("positions.columns", 1))
        # Counted from one, as `seqlens_k` is one less than the number of positions.
        counted = operators.apply("Range", one, operators.apply("Add", width, one), one)
        return operators.apply("Clip", operators.apply("Add", first, counted), zero, last)

    def _look_up(self, node: ir.Node) -> None:
        table, rows = node.inputs[0], self._value(node.inputs[1])
        matrix = self._constant(table)
        if matrix is None or matrix.ndim != 2 or node.attributes.get_int("axis", 0) != 0:
            raise ExportError("the graph gathers from something other than a constant table")
        if node.inputs[1] is not None and node.inputs[1].name == "input_ids":
            stored = self._operators.table(f"embedding.{len(self._tables)}", matrix)
            self._tables.append((stored, matrix))
            self._values[node.outputs[0]] = self._operators.look_up(stored, rows)
        else:
            learned = self._operators.vector(f"positions.{len(self._values)}", matrix)
            self._values[node.outputs[0]] = self._operators.apply("Gather", learned, rows, axis=0)

    def _product(self, node: ir.Node) -> None:
        """One product of a value with all matrices that it is multiplied with, stacked."""
        value = node.inputs[0]
        if node is self._head:
            name, matrix = self._matrix(node)
            self._values[node.outputs[0]] = self._multiply_wanted(self._value(value), name, matrix)
            self._in_logits = True
            return
        assert value is not None
        products = [use.node for use in value.uses() if use.node.op_type == "MatMul" and use.node is not self._head]
        names, matrices = zip(*map(self._matrix, products), strict=True)
        biases, outputs = zip(*map(self._bias_after, products), strict=True)
        bias = None
        if any(vector is not None for vector in biases):
            rows = map(len, matrices)
            bias = np.concatenate(
                [np.zeros(n, np.float32) if vector is None else vector for n, vector in zip(rows, biases, strict=True)]
            )
        product = self._operators.linear(self._value(value), "+".join(names), np.concatenate(matrices), bias)
        self._skipped.update(products)
        if len(products) == 1:
            self._values[outputs[0]] = product
            return
        widths = self._operators.sizes(f"{names[0]}.widths", *map(len, matrices))
        parts = self._operators.apply_many("Split", product, widths, outputs=len(products), axis=-1)
        self._values.update(zip(outputs, parts, strict=True))

    def _matrix(self, product: ir.Node) -> tuple[str, Floats]:
        """The name and the values [rows, columns] of a product's constant matrix."""
        weights = product.inputs[1]
        matrix = self._constant(weights)
        if matrix is None or matrix.ndim != 2 or weights is None:
            raise ExportError("the graph multiplies two computed values")
        return str(weights.name).removesuffix("_t"), np.ascontiguousarray(matrix.T)

    def _bias_after(self, product: ir.Node) -> tuple[Floats | None, ir.Value]:
        """The bias added to a product and the sum, if nothing else uses the product; else None and the product."""
        uses = list(product.outputs[0].uses())
        if len(uses) == 1 and uses[0].node.op_type == "Add":
            add = uses[0].node
            bias = self._constant(add.inputs[1 - uses[0].idx])
            if bias is not None and bias.ndim == 1:
                self._skipped.add(add)
                return bias, add.outputs[0]
        return None, product.outputs[0]

    def _multiply_wanted(self, value: ir.Value, name: str, matrix: Floats) -> ir.Value:
        """The head over only the wanted positions [R, columns]."""
        wanted = self._interface.wanted_positions(value)
        tied = (table for table, rows in self._tables if np.array_equal(rows, matrix))
        return self._operators.head(wanted, name, matrix, next(tied, None))

    def _attend(self, node: ir.Node) -> None:
        attention = self._attentions[self._interface.layers]
        attributes = {name: node.attributes[name].value for name in _ATTENTION_ATTRIBUTES if name in node.attributes}
        if attention.window is not None:
            attributes["local_window_size"] = attention.window
        if attention.scale is not None:
            attributes["scale"] = attention.scale
        queries = [None if value is None else self._value(value) for value in node.inputs[:PAST]]
        caches = [None if value is None else self._cache(value) for value in node.inputs[CACHES:]]
        if attention.rotations is not None:
            names = (f"rotations.{self._interface.layers}.{part}" for part in ("cosine", "sine"))
            caches = list(map(self._operators.vector, names, attention.rotations))
        caches += [None] * (2 - len(caches))
        if len(caches) > 2:
            raise ExportError("the graph's attention has more inputs than queries, keys, values and rotations")
        attended = self._interface.attend(queries, caches, *key_shape(node), **attributes)
        self._values[node.outputs[0]] = attended

    def _cache(self, value: ir.Value) -> ir.Value:
        """A table of rotations, one row per position, cut to the context length."""
        constant = self._constant(value)
        if constant is None or constant.ndim != 2:
            raise ExportError(f"attention has an input {value.name}, which the service does not provide")
        if len(constant) < self._context_length:
            raise ExportError(f"the graph has {len(constant)} rotations for a context of {self._context_length}")
        if value not in self._values:
            rotations = np.ascontiguousarray(constant[: self._context_length])
            self._values[value] = self._operators.vector(f"rotations.{len(self._values)}", rotations)
        return self._values[value]
