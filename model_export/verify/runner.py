"""Runs an exported model over one text as the service does: in chunks, with a KV cache that is updated in place."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model_export.sources.panics import reported_as
from model_export.sources.weights import Floats
from service.host.processor import byte_options

_CANNOT_RUN = "onnxruntime cannot run the exported graph"
KV_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner:
    """An exported model and the KV cache of one text of at most `capacity` positions.

    The decode graph `model` runs every call; with a `prefill` graph it runs only the calls of a single token.
    """

    def __init__(self, model: Path, capacity: int, prefill: Path | None = None) -> None:
        self._decode = _session(model)
        self._prefill = self._decode if prefill is None else _session(prefill)
        self._caches = {
            entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, entry.shape[1], capacity, entry.shape[3]), KV_TYPES[entry.type])
            )
            for entry in self._decode.get_inputs()
            if entry.name.startswith("past_")
        }

    def logits(self, tokens: NDArray[np.int64], chunks: list[int]) -> Floats:
        """The logits [tokens, vocab] after each token, run from the start of the text in `chunks` of those sizes."""
        ends = np.cumsum(chunks)
        parts = [self._forward(tokens[end - size : end], int(end)) for end, size in zip(ends, chunks, strict=True)]
        return np.concatenate(parts)

    def tokens_per_second(self, tokens: NDArray[np.int64], chunk: int, decoded: int) -> tuple[float, float]:
        """Tokens per second in prefill, `chunk` at a time, and in decode steps, which the last `decoded` tokens take.

        Only the last token of a call gets logits.
        """
        self._forward(tokens[:1], 1)  # each graph's first call takes longer
        self._forward(tokens[:2], 2)
        prompt = len(tokens) - decoded
        ends = [*range(chunk, prompt, chunk), prompt]
        began = time.perf_counter()
        for start, end in zip([0, *ends], ends, strict=False):
            self._forward(tokens[start:end], end, wanted=1)
        prefilled = time.perf_counter()
        for end in range(prompt + 1, len(tokens) + 1):
            self._forward(tokens[end - 1 : end], end)
        return prompt / (prefilled - began), decoded / (time.perf_counter() - prefilled)

    def _forward(self, tokens: NDArray[np.int64], end: int, wanted: int | None = None) -> Floats:
        """The logits after the last `wanted` of `tokens`, by default after all. `tokens` end at position `end`."""
        session = self._decode if len(tokens) == 1 else self._prefill
        binding = session.io_binding()
        feeds = {
            "input_ids": tokens[None, :],
            "seqlens_k": np.array([end - 1], np.int32),
            "total_sequence_length": np.array([end], np.int32),
            "query_seqlens": np.array([len(tokens)], np.int32),
            "logits_idx": np.arange(len(tokens) - (wanted or len(tokens)), len(tokens), dtype=np.int64),
        }
        if all(entry.name != "query_seqlens" for entry in session.get_inputs()):
            del feeds["query_seqlens"]
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(name.replace("past", "present"), cache)
        binding.bind_output("logits")
        with reported_as(_CANNOT_RUN):
            session.run_with_iobinding(binding)
        return np.asarray(binding.get_outputs()[-1].numpy(), np.float32)


def _session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    for name, value in byte_options().items():
        options.add_session_config_entry(name, value)
    with reported_as(_CANNOT_RUN):
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
