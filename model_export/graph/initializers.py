"""Streams a graph's weights into one external data file as they are made."""

from __future__ import annotations

from collections.abc import Iterable
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.graph.quantize import Activations

ALIGNMENT = 4096


class Initializers:
    """The external data file of a model; arrays start at page boundaries, so that they can be mapped into memory.

    `floats` is the floating-point type in which the graph computes and its float arrays are stored.
    """

    def __init__(self, file: BufferedWriter, activations: Activations = "float32") -> None:
        self.floats = ir.DataType.FLOAT16 if activations == "float16" else ir.DataType.FLOAT
        self._file = file
        self._values: list[ir.Value] = []

    @property
    def used(self) -> list[ir.Value]:
        """The values that are an input of some node."""
        return [value for value in self._values if value.uses()]

    def add(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Appends `array` to the file and returns its value in the graph.

        Raises ExportError where `array` holds numbers outside the range of `floats`.
        """
        return self.add_rows(name, array.shape, [array])

    def add_rows(self, name: str, shape: tuple[int, ...], parts: Iterable[NDArray[Any]]) -> ir.Value:
        """The same for an array of `shape` in `parts`, at least one, which are its rows in their order."""
        self._file.seek(-self._file.tell() % ALIGNMENT, 1)
        offset = self._file.tell()
        for part in parts:
            array = self.converted(name, part)
            self._file.write(np.ascontiguousarray(array).data)
        return self._external(name, offset, self._file.tell() - offset, ir.DataType.from_numpy(array.dtype), shape)

    def converted(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """`array` in the type in which it is stored. Raises ExportError as `add` does."""
        if array.dtype == np.float32 and self.floats == ir.DataType.FLOAT16:
            return _halved(name, array)
        return array

    def view(self, name: str, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """A second value over the bytes of `value` in the file, in another shape."""
        stored = value.const_value
        assert isinstance(stored, ir.ExternalTensor)
        return self._external(name, stored.offset, stored.length, stored.dtype, shape)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small value in the graph itself, where shape inference needs it. Its type stays as it is."""
        return self._declare(ir.tensor(array, name=name))

    def _external(
        self, name: str, offset: int | None, length: int | None, dtype: ir.DataType, shape: tuple[int, ...]
    ) -> ir.Value:
        path = Path(self._file.name)
        return self._declare(
            ir.ExternalTensor(path.name, offset, length, dtype, shape=ir.Shape(shape), name=name, base_dir=path.parent)
        )

    def _declare(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(tensor.name, const_value=tensor)
        self._values.append(value)
        return value


def _halved(name: str, array: NDArray[Any]) -> NDArray[np.float16]:
    largest, limit = np.abs(array).max(initial=0), np.finfo(np.float16).max
    if not largest <= limit:
        raise ExportError(
            f"{name} holds {largest:g}, the largest float16 is {limit:g}; export it with --activations float32"
        )
    return array.astype(np.float16)
