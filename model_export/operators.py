"""The few operators that a decoder is made of, over float32 or packed matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from model_export.initializers import Initializers
from model_export.quantize import Form, Packed, mixing, pack, pack_rows
from model_export.weights import BLOCK, Floats, Matrix, dequantize

CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4


@dataclass(frozen=True)
class StoredBlocks:
    """A packed matrix in the data file."""

    packed: Packed
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


Table = StoredBlocks | ir.Value


class Operators:
    """Appends nodes to a graph and their weights to its data file.

    The matrices of `linear` take the form `form`, those of `table` and `head` the form `tables`.
    """

    def __init__(self, data: Initializers, form: Form, tables: Form) -> None:
        self._data = data
        self._form = form
        self._tables = tables
        self._tape = Tape()

    @property
    def nodes(self) -> list[ir.Node]:
        return list(self._tape.nodes)

    def apply(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The output of a node that has one."""
        return self._tape.op(kind, inputs, attributes, domain=domain)

    def apply_many(
        self, kind: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """The outputs of a node that has several."""
        return list(self._tape.op_multi_out(kind, inputs, attributes, num_outputs=outputs, domain=domain))

    def vector(self, name: str, values: Floats) -> ir.Value:
        return self._data.add(name, values)

    def sizes(self, name: str, *sizes: int) -> ir.Value:
        """A shape or a list of axes, as operators take them."""
        return self._data.constant(name, np.array(sizes, np.int64))

    def rms_norm(self, value: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        return self.apply("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=epsilon, stash_type=1)

    def add_and_rms_norm(
        self, value: ir.Value, residual: ir.Value, scale: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """The norm of `value + residual`, and the sum itself."""
        normed, _, _, total = self.apply_many(
            "SkipSimplifiedLayerNormalization", value, residual, scale, outputs=4, domain=CONTRIB, epsilon=epsilon
        )
        return normed, total

    def linear(self, value: ir.Value, name: str, matrix: Matrix, bias: Floats | None = None) -> ir.Value:
        """The product of `value` [..., columns] with the transpose of `matrix` [rows, columns], plus `bias` [rows]."""
        offset = None if bias is None else self.vector(f"{name}.bias", bias)
        if self._form == "float32":
            product = self.apply("MatMul", value, self._data.add(name, dequantize(matrix).T))
            return product if offset is None else self.apply("Add", product, offset)
        packed = pack(matrix, self._form)
        if packed.block_means:
            means = self.apply("AveragePool", value, kernel_shape=[BLOCK], strides=[BLOCK])
            value = self.apply("Concat", value, *[means] * packed.block_means, axis=-1)
        return self._matmul_nbits(value, self._store(name, packed), offset)

    def table(self, name: str, matrix: Matrix) -> Table:
        """Stores a matrix [rows, columns] to look rows up in."""
        if self._tables == "float32":
            return self._data.add(name, dequantize(matrix))
        return self._store(name, pack(matrix, "int8"))

    def look_up(self, table: Table, rows: ir.Value) -> ir.Value:
        """The rows of the table at the indices `rows`."""
        if isinstance(table, ir.Value):
            return self.apply("Gather", table, rows, axis=0)
        count, columns = len(table.packed.codes), table.packed.columns
        return self.apply(
            "GatherBlockQuantized",
            self._data.view(f"{table.codes.name}.rows", table.codes, (count, columns)),
            rows,
            table.scales,
            table.zero_points,
            domain=CONTRIB,
            bits=table.packed.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )

    def head(self, value: ir.Value, name: str, matrix: Matrix, table: Table | None = None) -> ir.Value:
        """The product of `value` [rows, columns] with the transpose of `matrix`, of which there may be a `table`.

        In integers each row of `value` is mixed and scaled to 8 bits by its own largest number: sums of integers are
        exact, so a row's result does not depend on the others.
        """
        if self._tables == "float32":
            weights = table if isinstance(table, ir.Value) else self._data.add(name, dequantize(matrix))
            return self.apply("Gemm", value, weights, transB=1)
        mix = mixing(matrix.shape[1])
        packed = pack_rows(dequantize(matrix) @ mix)
        mixed = self.apply("MatMul", value, self._data.add(f"{name}.mixing", mix))
        largest = self.apply("ReduceMax", self.apply("Abs", mixed), self.sizes(f"{name}.last_axis", -1), keepdims=1)
        step = self._data.constant(f"{name}.step", np.array(1 / 127, np.float32))
        zero = self._data.constant(f"{name}.zero", np.array(128, np.uint8))
        product = self.apply(
            "MatMulIntegerToFloat",
            self.apply("QuantizeLinear", self.apply("Div", mixed, largest), step, zero),
            self._data.add(f"{name}.row_codes", packed.codes),
            step,
            self._data.add(f"{name}.row_scales", packed.scales),
            zero,
            self._data.add(f"{name}.row_zero_points", packed.zero_points),
            domain=CONTRIB,
        )
        return self.apply("Mul", product, largest)

    def _store(self, name: str, packed: Packed) -> StoredBlocks:
        return StoredBlocks(
            packed,
            self._data.add(f"{name}.codes", packed.codes),
            self._data.add(f"{name}.scales", packed.scales),
            None if packed.zero_points is None else self._data.add(f"{name}.zero_points", packed.zero_points),
        )

    def _matmul_nbits(self, value: ir.Value, matrix: StoredBlocks, bias: ir.Value | None = None) -> ir.Value:
        return self.apply(
            "MatMulNBits",
            value,
            matrix.codes,
            matrix.scales,
            matrix.zero_points,
            None,
            bias,
            domain=CONTRIB,
            K=matrix.packed.columns,
            N=len(matrix.packed.codes),
            bits=matrix.packed.bits,
            block_size=BLOCK,
            accuracy_level=INT8_ACTIVATIONS,
        )
