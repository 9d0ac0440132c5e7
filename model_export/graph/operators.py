"""The few operators that a decoder consists of, over plain or quantized matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.tape import Tape

from model_export.graph.initializers import Initializers
from model_export.graph.quantize import (
    PLAIN_FORMS,
    Form,
    Packed,
    PackedRows,
    mixing,
    pack,
    pack_rows,
)
from model_export.sources.weights import BLOCK, Floats, LazyTensor, Matrix, dequantize, lazy

CONTRIB = "com.microsoft"
INT8_ACTIVATIONS = 4

# Stands in for a smaller maximum of a row, so that a row of zeros can be divided by it.
_SMALLEST_MAXIMUM = 1e-30


@dataclass(frozen=True)
class StoredBlocks:
    """A quantized matrix in the data file."""

    packed: Packed
    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None


Table = StoredBlocks | ir.Value


class Operators(Tape):
    """Appends nodes to a graph and their weights to its data file.

    Matrices are stored in the form `form`; those of `table` and `head` in 8 bits where it is a quantized one.
    Everything else has the type `data.floats`. A float16 graph uses only operators that every execution provider has;
    kernels for 8-bit activations and for matrices with one scale per row exist only on the CPU.
    """

    def __init__(self, data: Initializers, form: Form) -> None:
        super().__init__()
        # The type of the activations and of the KV cache.
        self.floats = data.floats
        self._data = data
        self._form = form
        self._portable = data.floats == ir.DataType.FLOAT16

    def apply(self, operator: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Adds a node with one output and returns that."""
        return self.op(operator, inputs, attributes, domain=domain)

    def apply_many(
        self, operator: str, *inputs: ir.Value | None, outputs: int, domain: str = "", **attributes: Any
    ) -> list[ir.Value]:
        """Adds a node with several outputs and returns those."""
        return list(self.op_multi_out(operator, inputs, attributes, num_outputs=outputs, domain=domain))

    def vector(self, name: str, values: Floats) -> ir.Value:
        return self._data.add(name, values)

    def rows(self, name: str, values: LazyTensor) -> ir.Value:
        """The same for an array [rows, columns] that need not be in memory at once."""
        return self._plain(name, values)

    def sizes(self, name: str, *sizes: int) -> ir.Value:
        """A shape, a list of axes or of sizes, as an input of an operator."""
        return self._data.constant(name, np.array(sizes, np.int64))

    def rms_norm(self, value: ir.Value, scale: ir.Value, epsilon: float) -> ir.Value:
        return self.apply("SimplifiedLayerNormalization", value, scale, axis=-1, epsilon=epsilon, stash_type=1)

    def add_and_rms_norm(
        self, value: ir.Value, residual: ir.Value, scale: ir.Value, epsilon: float
    ) -> tuple[ir.Value, ir.Value]:
        """The RMS norm of `value + residual`, and the sum itself."""
        normed, _, _, total = self.apply_many(
            "SkipSimplifiedLayerNormalization", value, residual, scale, outputs=4, domain=CONTRIB, epsilon=epsilon
        )
        return normed, total

    def linear(self, value: ir.Value, name: str, matrix: Matrix | LazyTensor, bias: Floats | None = None) -> ir.Value:
        """The product of `value` [..., columns] with the transpose of `matrix` [rows, columns], plus `bias` [rows]."""
        offset = None if bias is None else self.vector(f"{name}.bias", bias)
        if self._form in {"int4", "int8"}:
            stored = self._store(name, pack(matrix, self._form))
            if not self._portable:
                return self._matmul_nbits(value, stored, offset)
            product = self._matmul_nbits(value, stored)
        else:
            product = self.apply("MatMul", value, self._data.add(name, self._transposed(name, lazy(matrix))))
        return product if offset is None else self.apply("Add", product, offset)

    def table(self, name: str, matrix: Matrix | LazyTensor) -> Table:
        """Stores a matrix [rows, columns] for look-ups of rows: in 8 bits, unless the form is a plain one."""
        if self._form in PLAIN_FORMS:
            return self._plain(name, lazy(matrix))
        return self._store(name, pack(matrix, "int8"))

    def look_up(self, table: Table, rows: ir.Value) -> ir.Value:
        """The rows of the table at the indices `rows`."""
        if isinstance(table, ir.Value):
            return self.apply("Gather", table, rows, axis=0)
        count, blocks, columns = *table.packed.codes.shape[:2], table.packed.columns
        found = self.apply(
            "GatherBlockQuantized",
            self._data.view(f"{table.codes.name}.rows", table.codes, (count, blocks * BLOCK)),
            rows,
            table.scales,
            table.zero_points,
            domain=CONTRIB,
            bits=table.packed.bits,
            block_size=BLOCK,
            gather_axis=0,
            quantize_axis=1,
        )
        return found if columns % BLOCK == 0 else self._first_columns(found, f"{table.codes.name}.found", columns)

    def head(
        self,
        value: ir.Value,
        name: str,
        matrix: Matrix | LazyTensor,
        table: Table | None = None,
    ) -> ir.Value:
        """The product of `value` [rows, columns] with the transpose of `matrix`; `table` is `matrix` if already stored.

        The product is float32 in every form. Quantized on the CPU, each row of `value` is mixed (see `mixing`) and
        scaled to 8 bits by its own largest number: integer sums are exact, so no row's result depends on the others.
        """
        if self._form in PLAIN_FORMS:
            weights = table if isinstance(table, ir.Value) else self._plain(name, lazy(matrix))
            return self._as_float32(self.apply("Gemm", value, weights, transB=1))
        if self._portable:
            blocks = table if isinstance(table, StoredBlocks) else self._store(name, pack(matrix, "int8"))
            return self._as_float32(self._matmul_nbits(value, blocks))
        mix = mixing(matrix.shape[1])
        mixed = self.apply("MatMul", value, self._data.add(f"{name}.mixing", mix))
        return self._multiply_bytes(mixed, name, pack_rows(matrix, mix))

    def _plain(self, name: str, matrix: LazyTensor) -> ir.Value:
        """The matrix in the data file, not quantized."""
        return self._data.add_rows(name, matrix.shape, (dequantize(matrix.read(rows)) for rows in matrix.parts()))

    def _transposed(self, name: str, matrix: LazyTensor) -> NDArray[Any]:
        """The transpose of the matrix, in the type in which it is stored."""
        (transposed,) = matrix.joined(lambda part: [self._data.converted(name, dequantize(part)).T], axis=1)
        return transposed

    def _multiply_bytes(self, value: ir.Value, name: str, packed: PackedRows) -> ir.Value:
        """The product of `value` [..., columns] with the transpose of `packed`.

        Each row of `value` is scaled to 8 bits by its own largest number.
        """
        largest = self.apply("ReduceMax", self.apply("Abs", value), self.sizes(f"{name}.last_axis", -1), keepdims=1)
        largest = self.apply(
            "Max", largest, self._data.constant(f"{name}.least", np.array(_SMALLEST_MAXIMUM, np.float32))
        )
        step = self._data.constant(f"{name}.step", np.array(1 / 127, np.float32))
        zero = self._data.constant(f"{name}.zero", np.array(128, np.uint8))
        codes = self._data.add(f"{name}.row_codes", packed.codes)
        scales = self._data.add(f"{name}.row_scales", packed.scales)
        zeros = self._data.add(f"{name}.row_zero_points", packed.zero_points)
        quantized = self.apply("QuantizeLinear", self.apply("Div", value, largest), step, zero)
        product = self.apply("MatMulIntegerToFloat", quantized, codes, step, scales, zero, zeros, domain=CONTRIB)
        return self.apply("Mul", product, largest)

    def _as_float32(self, value: ir.Value) -> ir.Value:
        return self.apply("Cast", value, to=ir.DataType.FLOAT.value) if self._portable else value

    def _store(self, name: str, packed: Packed) -> StoredBlocks:
        return StoredBlocks(
            packed,
            self._data.add(f"{name}.codes", packed.codes),
            self._data.add(f"{name}.scales", packed.scales),
            None if packed.zero_points is None else self._data.add(f"{name}.zero_points", packed.zero_points),
        )

    def _filled_up(self, value: ir.Value, name: str, columns: int) -> ir.Value:
        """`value` [..., columns] up to a multiple of the block size: the columns follow again, for weights of 0."""
        if columns % BLOCK == 0:
            return value
        padded = columns + -columns % BLOCK
        repeated = self.apply("Concat", *[value] * -(-padded // columns), axis=-1)
        return self._first_columns(repeated, name, padded)

    def _first_columns(self, value: ir.Value, name: str, columns: int) -> ir.Value:
        bounds = (self.sizes(f"{name}.{bound}", at) for bound, at in (("first", 0), ("last", columns), ("axis", -1)))
        return self.apply("Slice", value, *bounds)

    def _matmul_nbits(self, value: ir.Value, matrix: StoredBlocks, bias: ir.Value | None = None) -> ir.Value:
        columns = matrix.packed.columns
        if self._portable:  # not every provider fills up the last block itself
            value = self._filled_up(value, f"{matrix.codes.name}.filled", columns)
            columns += -columns % BLOCK
        return self.apply(
            "MatMulNBits",
            value,
            matrix.codes,
            matrix.scales,
            matrix.zero_points,
            None,
            bias,
            domain=CONTRIB,
            K=columns,
            N=len(matrix.packed.codes),
            bits=matrix.packed.bits,
            block_size=BLOCK,
            accuracy_level=0 if self._portable else INT8_ACTIVATIONS,
        )
