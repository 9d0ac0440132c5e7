"""The exported model and its keys and values: the only place that knows onnxruntime."""

from __future__ import annotations

import math
import mmap
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.cache import Copy
from service.engine.signature import check_signature
from service.errors import ModelDirectoryError, StartupError
from service.manifest import MODEL_FILE, PROMPT_MODEL_FILE, Manifest
from service.processor import byte_options

# A fresh binding costs as much as several tokens' arithmetic; decode steps meet the same few shapes over and over.
_BINDINGS = 128
# Numbers of rows at which the graph for prompts may be the faster one for generated tokens too, and by how much at
# least: every weight is read for many of them.
_MANY_ROWS = (8, 16, 32)
_WORTH_CHANGING = 0.95
_TIMED_STEPS = 5


_PROVIDER = "CPUExecutionProvider"


def provider() -> str:
    """What computes: onnxruntime's version and its provider. Raises StartupError when it is not there."""
    available = ort.get_available_providers()
    if _PROVIDER not in available:
        raise StartupError(f"onnxruntime {ort.__version__} has no {_PROVIDER}, only {', '.join(available)}")
    return f"onnxruntime {ort.__version__}, {_PROVIDER}"


@dataclass(frozen=True, slots=True)
class _Call:
    """One call's inputs, at fixed addresses, and the session and binding that take them."""

    session: ort.InferenceSession
    binding: Any
    input_ids: npt.NDArray[np.int64]
    seqlens_k: npt.NDArray[np.int32]
    query_seqlens: npt.NDArray[np.int32]
    logits_idx: npt.NDArray[np.int64]


class Model:
    """Runs the graphs of a model directory over slots of keys and values.

    Rows of several tokens go through the graph for prompts where there is one. So do many rows where results may depend
    on the batch, from the number on at which that was faster when it was tried at the start. Keys and values are one
    buffer per layer, [slots, kv_heads, context_length, head_dim]; a call covers consecutive slots and extends them in
    place. Not thread-safe: one thread owns it.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        *,
        slots: int,
        context_length: int,
        threads: int,
        batch_invariant: bool,
    ) -> None:
        self.vocab_size = manifest.vocab_size
        self.slots = slots
        self.context_length = context_length
        self._layers = manifest.kv.layers
        self._min_rows = manifest.quantization.min_rows if batch_invariant else 1
        self._min_logits = manifest.quantization.min_logits if batch_invariant else 1
        self._many_rows = math.inf
        self._decoding = self._prompts = self._load(directory / MODEL_FILE, manifest, threads)
        # One slot more than is ever held: a call too narrow for its results to be independent of it is padded with an
        # empty row.
        shape = (slots + 1, manifest.kv.kv_heads, context_length, manifest.kv.head_dim)
        self._kv = {
            f"{part}.{layer}": _reserve(shape, manifest.kv.dtype)
            for layer in range(self._layers)
            for part in ("key", "value")
        }
        self._total_length = np.zeros(1, np.int32)
        self._logits = np.zeros((0, self.vocab_size), np.float32)
        self._calls: OrderedDict[tuple[int, int, int, int], _Call] = OrderedDict()
        if manifest.quantization.prompts is not None:
            self._prompts = self._load(directory / PROMPT_MODEL_FILE, manifest, threads)
            if not batch_invariant:
                self._many_rows = self._faster_from()
                self._calls.clear()  # some are bound to the graph that was only tried

    def _faster_from(self) -> float:
        """From how many rows on the graph for prompts generates tokens faster on this machine."""
        for rows in (each for each in _MANY_ROWS if each <= self.slots):
            usual, other = (self._step_seconds(rows, many_rows) for many_rows in (math.inf, rows))
            if other < _WORTH_CHANGING * usual:
                return rows
        return math.inf

    def _step_seconds(self, rows: int, many_rows: float) -> float:
        """The least time of some steps of `rows` rows, when so many rows take the graph for prompts."""
        self._many_rows = many_rows
        self._calls.clear()
        seconds = []
        for _ in range(_TIMED_STEPS):
            began = time.perf_counter()
            self.forward(0, [[0]] * rows, [0] * rows, [(row, 0) for row in range(rows)])
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    @staticmethod
    def _load(graph: Path, manifest: Manifest, threads: int) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that still spin after a call would take the cores from the other graph's next call.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        for name, value in byte_options().items():
            options.add_session_config_entry(name, value)
        try:
            session = ort.InferenceSession(graph, options, providers=[_PROVIDER])
        except Exception as error:  # onnxruntime raises its own unrelated types
            raise ModelDirectoryError(f"{graph} cannot be loaded: {' '.join(str(error).split())}") from error
        check_signature(graph, session.get_inputs(), session.get_outputs(), manifest)
        return session

    def forward(
        self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits_at: Sequence[tuple[int, int]]
    ) -> npt.NDArray[np.float32]:
        """Extends slots `first_slot`.. by the tokens of `rows`, after their first `past` positions.

        A row may be empty: its slot stays as it is. Returns the logits [len(logits_at), vocabulary] after the tokens
        at `logits_at`, pairs of row and position in the row; they are valid until the next call.
        """
        width = max(len(row) for row in rows)
        self._check(first_slot, rows, past)
        padded_rows = len(rows) if len(rows) * width >= self._min_rows else self._min_rows
        padded_logits = max(len(logits_at), self._min_logits) if logits_at else 0
        call = self._call(first_slot, padded_rows, width, padded_logits)
        call.query_seqlens[:] = 0
        call.seqlens_k[:] = 0
        for index, (row, length) in enumerate(zip(rows, past, strict=True)):
            call.input_ids[index, : len(row)] = row
            call.query_seqlens[index] = len(row)
            call.seqlens_k[index] = max(0, length + len(row) - 1)
        self._total_length[0] = max(int(call.seqlens_k.max()) + 1, width)
        call.logits_idx[:] = 0
        call.logits_idx[: len(logits_at)] = [row * width + position for row, position in logits_at]
        call.session.run_with_iobinding(call.binding)
        return self._logits[: len(logits_at)]

    def probe(self, slot: int) -> None:
        """Raises what `forward` does where it fails on a single token. The slot's first position is lost."""
        self.forward(slot, [[0]], [0], [(0, 0)])

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies keys and values between slots, in order."""
        for item in copies:
            for buffer in self._kv.values():
                buffer[item.target, :, : item.length] = buffer[item.source, :, : item.length]

    def _check(self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int]) -> None:
        """A wrong length would write beyond a slot: some kernels clamp it in silence."""
        if first_slot < 0 or first_slot + len(rows) > self.slots:
            raise ValueError(f"slots {first_slot}..{first_slot + len(rows) - 1} are not within 0..{self.slots - 1}")
        for row, length in zip(rows, past, strict=True):
            if length < 0 or length + len(row) > self.context_length:
                raise ValueError(f"{length} + {len(row)} positions do not fit a slot of {self.context_length}")

    def _call(self, first_slot: int, rows: int, width: int, logits: int) -> _Call:
        key = (first_slot, rows, width, logits)
        call = self._calls.get(key)
        if call is None:
            if logits > len(self._logits):
                self._logits = np.zeros((logits, self.vocab_size), np.float32)
                self._calls.clear()  # they point into the old buffer
            call = self._calls[key] = self._bind(*key)
            if len(self._calls) > _BINDINGS:
                self._calls.popitem(last=False)
        self._calls.move_to_end(key)
        return call

    def _bind(self, first_slot: int, rows: int, width: int, logits: int) -> _Call:
        session = self._prompts if width > 1 or rows >= self._many_rows else self._decoding
        call = _Call(
            session=session,
            binding=session.io_binding(),
            input_ids=np.zeros((rows, width), np.int64),
            seqlens_k=np.zeros(rows, np.int32),
            query_seqlens=np.zeros(rows, np.int32),
            logits_idx=np.zeros(logits, np.int64),
        )
        for name in ("input_ids", "seqlens_k", "query_seqlens", "logits_idx"):
            _bind_input(call.binding, name, getattr(call, name))
        _bind_input(call.binding, "total_sequence_length", self._total_length)
        for name, buffer in self._kv.items():
            view = buffer[first_slot : first_slot + rows]
            _bind_input(call.binding, f"past_{name}", view)
            _bind_output(call.binding, f"present_{name}", view)
        _bind_output(call.binding, "logits", self._logits[:logits])
        return call


def _reserve(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """Zeros that take memory page by page, when first written: a huge page would take a slot's whole length at once."""
    memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype).reshape(shape)


def _bind_input(binding: Any, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)


def _bind_output(binding: Any, name: str, array: npt.NDArray[Any]) -> None:
    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
