"""Runs an exported model over one text as the service does: in chunks, with a KV cache that is updated in place."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model_export.sources.panics import reported_as
from model_export.sources.weights import Floats
from service.host import kernels
from service.host.processor import byte_options
from service.manifest import KV_TILE

_CANNOT_RUN = "onnxruntime cannot run the exported graph"
KV_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner:
    """The graph of an exported model and the KV cache of one text of at most `capacity` positions.

    A graph over our own operators needs `own_kernels`.
    """

    def __init__(self, graph: Path, capacity: int, *, own_kernels: bool = False) -> None:
        self._session = _session(graph, own_kernels=own_kernels)
        whole_tiles = -(-capacity // KV_TILE) * KV_TILE
        self._caches = {
            entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, entry.shape[1], whole_tiles, entry.shape[3]), KV_TYPES[entry.type])
            )
            for entry in self._session.get_inputs()
            if entry.name.startswith("past_")
        }

    def logits(
        self, tokens: NDArray[np.int64], chunks: Sequence[int], positions: NDArray[np.int64] | None = None
    ) -> Floats:
        """The logits [positions, vocab] after the tokens at `positions`, ascending, by default after all of them.

        The text is run from its start in `chunks` of those sizes.
        """
        wanted = np.arange(len(tokens)) if positions is None else positions
        vocab_size = next(entry.shape[1] for entry in self._session.get_outputs() if entry.name == "logits")
        rows, start = np.empty((len(wanted), vocab_size), np.float32), 0
        for size in chunks:
            end = start + size
            inside = (start <= wanted) & (wanted < end)
            rows[inside] = self._forward(tokens[start:end], end, wanted[inside] - start)
            start = end
        return rows

    def prefill_rate(self, tokens: NDArray[np.int64], chunk: int) -> float:
        """Tokens per second of prefill, `chunk` tokens at a time, of which the last one gets logits."""
        began = time.perf_counter()
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            self._forward(part, start + len(part), np.array([len(part) - 1]))
        return len(tokens) / (time.perf_counter() - began)

    def decode(self, tokens: NDArray[np.int64], count: int) -> tuple[Floats, float]:
        """The logits [count, vocab] after the last `count` tokens, one by one after the cached ones, and their rate.

        The rate is in tokens per second.
        """
        ends = range(len(tokens) - count + 1, len(tokens) + 1)
        only = np.array([0])
        self._forward(tokens[ends[0] - 1 : ends[0]], ends[0], only)  # a graph's first call takes longer
        began = time.perf_counter()
        parts = [self._forward(tokens[end - 1 : end], end, only) for end in ends]
        return np.concatenate(parts), count / (time.perf_counter() - began)

    def _forward(self, tokens: NDArray[np.int64], end: int, wanted: NDArray[np.int64]) -> Floats:
        """The logits [wanted, vocab] after those of `tokens` that `wanted` names. `tokens` end at position `end`."""
        binding = self._session.io_binding()
        feeds = {
            "input_ids": tokens[None, :],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array([end], np.int32),
            "query_seqlens": np.array([len(tokens)], np.int32),
            "logits_idx": wanted,
        }
        if all(entry.name != "query_seqlens" for entry in self._session.get_inputs()):
            del feeds["query_seqlens"]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past", "present"), cache)
        binding.bind_output("logits")
        with reported_as(_CANNOT_RUN):
            self._session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy(), np.float32)


def _session(graph: Path, *, own_kernels: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Memory goes back after each call: an arena would keep several arrays of logits.
    options.enable_cpu_mem_arena = False
    for name, value in byte_options().items():
        options.add_session_config_entry(name, value)
    if own_kernels:
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        kernels.register(options, options.intra_op_num_threads)
    with reported_as(_CANNOT_RUN):
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
