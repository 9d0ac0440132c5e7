"""The results of a call: all logits, or the shortlists that are enough for most sampling."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime as ort

from service.engine.ort.device import Device
from service.engine.sampler import Floats, Shortlist

Rows = Floats | list[Shortlist]

# The further outputs of a graph for GPUs: each row's top logits, descending, their ids, and the row's log-sum-exp.
_SHORTLIST_OUTPUTS = {"top_logits": np.float32, "top_ids": np.int64, "log_sum_exp": np.float32}


class Results:
    """The buffer for the logits [rows, vocabulary] of a call and, on a GPU, for its shortlists."""

    def __init__(self, device: Device, session: ort.InferenceSession, rows: int, vocabulary: int) -> None:
        self.rows = rows
        self._device = device
        shapes = {output.name: output.shape for output in session.get_outputs()}
        self._outputs: dict[str, tuple[int, int, Any]] = {"logits": (0, vocabulary, np.float32)}
        self._logits_end = end = rows * vocabulary * 4
        if device.is_gpu and _SHORTLIST_OUTPUTS.keys() <= shapes.keys():
            for name, dtype in sorted(_SHORTLIST_OUTPUTS.items(), key=lambda item: -np.dtype(item[1]).itemsize):
                self._outputs[name] = (end, shapes[name][1], dtype)
                end += rows * shapes[name][1] * np.dtype(dtype).itemsize
        self._end = end
        self._block = device.block(max(end, 1))

    def release(self) -> None:
        """Frees the buffer; no call may write into it from then on."""
        self._device.release(self._block)

    def bind(self, binding: Any, rows: int) -> None:
        """Binds the outputs of a call to the first `rows` rows."""
        for name, (start, columns, dtype) in self._outputs.items():
            address = self._block.address + start
            binding.bind_output(name, self._device.type, self._device.index, dtype, (rows, columns), address)

    def read(self, rows: int) -> Rows:
        """The first `rows` rows; a GPU's are shortlists, each of which fetches its whole row only on demand."""
        if "top_ids" not in self._outputs:
            return self._logits(0, rows)
        self._device.fetch(self._block, self._logits_end, self._end)
        ids, logits, normalizers = (self._view(name, rows) for name in ("top_ids", "top_logits", "log_sum_exp"))
        return [
            Shortlist.of(ids[row], logits[row], float(normalizers[row, 0]), functools.partial(self._row, row))
            for row in range(rows)
        ]

    def _row(self, row: int) -> Floats:
        logits: Floats = self._logits(row, 1)[0]
        return logits

    def _logits(self, row: int, count: int) -> Floats:
        size = self._outputs["logits"][1] * 4
        self._device.fetch(self._block, row * size, (row + count) * size)
        logits: Floats = self._view("logits", row + count)[row:]
        return logits

    def _view(self, name: str, rows: int) -> Any:
        start, columns, dtype = self._outputs[name]
        end = start + rows * columns * np.dtype(dtype).itemsize
        return self._block.host[start:end].view(dtype).reshape(rows, columns)
