"""Calls an exported model for several rows at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from model_export.verify.runner import KV_TYPES
from service import manifest
from service.host import kernels
from service.host.processor import byte_options


class Session:
    """An exported model with a KV cache of five rows of 128 positions, updated in place.

    `options` are onnxruntime's, by default those that this processor needs.
    """

    def __init__(
        self,
        directory: Path,
        rows: int = 5,
        capacity: int = 128,
        options: Mapping[str, str] | None = None,
    ) -> None:
        session_options = onnxruntime.SessionOptions()
        session_options.intra_op_num_threads = 2
        for name, value in (byte_options() if options is None else options).items():
            session_options.add_session_config_entry(name, value)
        if manifest.read(directory).kernels == "own":
            kernels.register(session_options, session_options.intra_op_num_threads)
        self.session = onnxruntime.InferenceSession(directory / manifest.MODEL_FILE, session_options)
        self.ragged = any(entry.name == "query_seqlens" for entry in self.session.get_inputs())
        self.caches = {
            entry.name: np.zeros((rows, entry.shape[1], capacity, entry.shape[3]), KV_TYPES[entry.type])
            for entry in self.session.get_inputs()
            if entry.name.startswith("past_")
        }

    def forward(
        self, rows: Sequence[np.ndarray], past: Sequence[int], wanted: Sequence[int] | None = None
    ) -> np.ndarray:
        """The logits at the `wanted` flat positions, at every valid one by default.

        A graph without `query_seqlens` runs prompts one by one.
        """
        if not self.ragged and len(rows) > 1 and max(len(row) for row in rows) > 1:
            assert wanted is None
            return np.concatenate([self._run(at, [row], [past[at]], None) for at, row in enumerate(rows)])
        return self._run(0, rows, past, wanted)

    def _run(
        self, first: int, rows: Sequence[np.ndarray], past: Sequence[int], wanted: Sequence[int] | None
    ) -> np.ndarray:
        lengths, width = np.array([len(row) for row in rows]), max(len(row) for row in rows)
        valid = [row * width + column for row, length in enumerate(lengths) for column in range(length)]
        totals = np.array(past) + lengths
        feeds = {
            "input_ids": np.stack([np.pad(row, (0, width - len(row))) for row in rows]).astype(np.int64),
            "seqlens_k": (totals - 1).astype(np.int32),
            "total_sequence_length": np.array([max(totals.max(), width)], np.int32),
            "query_seqlens": lengths.astype(np.int32),
            "logits_idx": np.array(valid if wanted is None else wanted, np.int64),
        }
        if not self.ragged:
            del feeds["query_seqlens"]
        binding = self.session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name, cache in self.caches.items():
            view = cache[first : first + len(rows)]
            place = ("cpu", 0, view.dtype, view.shape, view.ctypes.data)
            binding.bind_input(name, *place)
            binding.bind_output(name.replace("past", "present"), *place)
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[-1].numpy()
