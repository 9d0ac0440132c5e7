"""Runs an exported model over one text, as the service does: in chunks, with keys and values kept in place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.sources.weights import Floats
from service.host.processor import byte_options

KV_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class Runner:
    """An exported model and the keys and values of one text of at most `capacity` positions.

    `model` runs every call, or where there is a `prompts` graph those of one token alone.
    """

    def __init__(self, model: Path, capacity: int, prompts: Path | None = None) -> None:
        self._decoding = self._reading = _session(model)
        if prompts is not None:
            self._reading = _session(prompts)
        self._caches = {
            entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.zeros((1, entry.shape[1], capacity, entry.shape[3]), KV_TYPES[entry.type])
            )
            for entry in self._decoding.get_inputs()
            if entry.name.startswith("past_")
        }

    def logits(self, tokens: NDArray[np.int64], chunks: list[int]) -> Floats:
        """The logits [tokens, vocab] after each token, read from the first position in calls of `chunks` tokens."""
        ends = np.cumsum(chunks)
        parts = [self._forward(tokens[end - size : end], int(end)) for end, size in zip(ends, chunks, strict=True)]
        return np.concatenate(parts)

    def tokens_per_second(self, tokens: NDArray[np.int64], chunk: int, generated: int) -> tuple[float, float]:
        """Tokens a second of reading all but the last `generated` of `tokens`, `chunk` at a time, then those singly.

        Only the last token of a call gets logits.
        """
        self._forward(tokens[:1], 1)  # each graph's first call takes longer
        self._forward(tokens[:2], 2)
        read = len(tokens) - generated
        ends = [*range(chunk, read, chunk), read]
        began = time.perf_counter()
        for start, end in zip([0, *ends], ends, strict=False):
            self._forward(tokens[start:end], end, wanted=1)
        turned = time.perf_counter()
        for end in range(read + 1, len(tokens) + 1):
            self._forward(tokens[end - 1 : end], end)
        return read / (turned - began), generated / (time.perf_counter() - turned)

    def _forward(self, tokens: NDArray[np.int64], end: int, wanted: int | None = None) -> Floats:
        """The logits after the last `wanted` of `tokens`, by default all, of which the last is the text's `end`-th."""
        session = self._decoding if len(tokens) == 1 else self._reading
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
        with _told():
            session.run_with_iobinding(binding)
        logits: Floats = binding.get_outputs()[-1].numpy()
        return logits


def _session(graph: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    for name, value in byte_options().items():
        options.add_session_config_entry(name, value)
    options.log_severity_level = 4  # what goes wrong is raised as well
    with _told():
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


@contextmanager
def _told() -> Iterator[None]:
    """Raises ExportError for what onnxruntime raises, whose errors have no class in common."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise ExportError(f"onnxruntime cannot run the exported graph: {reason}") from error
