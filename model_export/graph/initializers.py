"""Streams a graph's weights into one external data file as they are made."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.graph.quantize import Activations

ALIGNMENT = 4096


class Initializers:
    """The external data file of a model; arrays start at page boundaries, so that they can be mapped into memory.

    `floats` is the type in which the graph computes, and in which numbers that are not whole are stored.
    """

    def __init__(self, path: Path, activations: Activations = "float32") -> None:
        self.floats = ir.DataType.FLOAT16 if activations == "float16" else ir.DataType.FLOAT
        self._path = path
        self._file = path.open("wb")
        self._values: list[ir.Value] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    @property
    def used(self) -> list[ir.Value]:
        """The values that some node takes."""
        return [value for value in self._values if value.uses()]

    def add(self, name: str, array: NDArray[Any]) -> ir.Value:
        """Appends `array` to the file and gives the graph's value of that name.

        Raises ExportError where it holds numbers that `floats` does not.
        """
        if array.dtype == np.float32 and self.floats == ir.DataType.FLOAT16:
            array = _halved(name, array)
        self._file.seek(-self._file.tell() % ALIGNMENT, 1)
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(array).data)
        tensor = ir.ExternalTensor(
            self._path.name,
            offset,
            array.nbytes,
            ir.DataType.from_numpy(array.dtype),
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._path.parent,
        )
        return self._declare(tensor)

    def view(self, name: str, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The array of `value` once more in another shape, over the same bytes of the file."""
        whole = value.const_value
        if not isinstance(whole, ir.ExternalTensor):
            raise TypeError(f"{value.name} is not in the data file")
        return self._declare(
            ir.ExternalTensor(
                self._path.name,
                whole.offset,
                whole.length,
                whole.dtype,
                shape=ir.Shape(shape),
                name=name,
                base_dir=self._path.parent,
            )
        )

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small value kept in the graph itself, where shape inference needs it, as it is."""
        return self._declare(ir.tensor(array, name=name))

    def _declare(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.val(tensor.name, const_value=tensor)
        self._values.append(value)
        return value


def _halved(name: str, array: NDArray[Any]) -> NDArray[np.float16]:
    largest, limit = np.abs(array).max(initial=0), np.finfo(np.float16).max
    if not largest <= limit:
        raise ExportError(
            f"{name} holds {largest:g}, and float16 ends at {limit:g}; export it with float32 activations"
        )
    return array.astype(np.float16)
