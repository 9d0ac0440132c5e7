"""The exported model and its KV cache, on one device."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort

from service.engine.cache import Copy
from service.engine.ort.calls import Call, Shape, bind_inputs
from service.engine.ort.device import Cpu, Device, granule, kv_slots, power_of_two, row_bytes
from service.engine.ort.results import Results, Rows
from service.engine.ort.self_test import lone_row_differs
from service.engine.ort.signature import check_signature
from service.manifest import MODEL_FILE, Manifest

# How many bound calls are kept: a new binding takes as long as computing several tokens, and decode steps repeat the
# same few shapes.
_BINDINGS = 128


class Model:
    """Runs the graph of a model directory over the slots of a KV cache.

    The KV cache is two buffers per layer, keys and values, each [slots, kv_heads, capacity, head_dim]; a call covers
    consecutive slots and extends them in place. The capacity is `context_length` or a little more: on the CPU a head's
    positions fill whole pages of memory, which the system provides when they are first written, and takes back from
    positions that are given up. With our own kernels a slot is tiles of positions instead, each with all heads, and one
    row of memory.
    Not thread-safe: only one thread at a time may use it.
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
        device: Device | None = None,
    ) -> None:
        """With `batch_invariant`, onnxruntime's own kernels are tried first on the CPU: see `self_test`."""
        self.vocab_size = manifest.vocab_size
        self.slots = slots
        self.context_length = context_length
        self._device = device or Cpu()
        self._kv_layout = manifest.kv
        self._kv_slots = kv_slots(slots, self._device.is_gpu)
        self._session = self._load(directory / MODEL_FILE, manifest, threads)
        self._pads_lone_row = batch_invariant and manifest.quantization.pads_lone_row
        if batch_invariant and manifest.kernels == "stock" and not self._device.is_gpu:
            self._pads_lone_row |= lone_row_differs(directory, self._device, threads)
        self._granule = 1 if self._device.is_gpu else granule(manifest.kv)
        self._capacity = _rounded(context_length, self._granule)
        self._position_bytes = row_bytes(manifest.kv)
        # A slot is one row of positions for each head, or in tiles a single one.
        self._rows = {
            "rows": manifest.kv.kv_heads if manifest.kv.tile == 1 else 1,
            "pitch": self._capacity * self._position_bytes,
        }
        self._slot_bytes = self._rows["rows"] * self._rows["pitch"]
        self._kv = {
            f"{part}.{layer}": self._device.reserve(self._kv_slots * self._slot_bytes)
            for layer in range(manifest.kv.layers)
            for part in ("key", "value")
        }
        # How many positions of each slot may still be read.
        self._lengths = np.zeros(self._kv_slots, np.int32)
        # From which position on each slot has no memory.
        self._ends = [0] * self._kv_slots
        self._calls: OrderedDict[Shape, Call] = OrderedDict()
        self.kept_bindings = self._most_bindings()
        self._graphs = itertools.count()
        self._ragged = "query_seqlens" in {declared.name for declared in self._session.get_inputs()}
        # Captured calls write into this buffer, so they are captured again whenever it grows. It grows only for prompts
        # with log probabilities, and at least doubles each time, so that happens only a few times.
        rows = power_of_two(slots) if self._device.is_gpu else 0
        self._results = Results(self._device, self._session, rows, self.vocab_size)

    def _load(self, graph: Path, manifest: Manifest, threads: int) -> ort.InferenceSession:
        session = self._device.load(graph, threads, own_kernels=manifest.kernels == "own")
        check_signature(graph, session.get_inputs(), session.get_outputs(), manifest)
        return session

    def forward(
        self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits_at: Sequence[tuple[int, int]]
    ) -> Rows:
        """Extends slots `first_slot`.. by the tokens of `rows`, after their first `past` positions.

        A row may be empty: its slot stays as it is. Returns the logits after the tokens at `logits_at`, pairs of row
        and position in the row: an array [len(logits_at), vocabulary], or as many shortlists. They are valid until the
        next call.
        """
        self._check(first_slot, rows, past)
        shape = self._padded_shape(first_slot, rows, past, len(logits_at))
        call = self._call(shape)
        for index, row in enumerate(rows):
            call.input_ids[index, : len(row)] = row
        self._write_lengths(call, shape, rows, past)
        call.logits_idx[: len(logits_at)] = [row * shape.width + position for row, position in logits_at]
        self._device.send(call.inputs)
        self._device.run(self._session, call.binding, call.graph)
        return self._results.read(len(logits_at))

    @property
    def calls(self) -> Mapping[Shape, Call]:
        """The bound calls, by shape."""
        return self._calls

    def probe(self, slot: int) -> None:
        """Runs the model on one token, which overwrites the slot's first position. Raises what `forward` raises."""
        self.forward(slot, [[0]], [0], [(0, 0)])

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies positions of the KV cache between slots, in order, and gives memory back."""
        for copy in copies:
            source, target = copy.source * self._slot_bytes, copy.target * self._slot_bytes
            kept = _rounded(copy.length, self._granule)
            # What else the last tile holds is overwritten before it is read.
            width = _rounded(copy.length, self._kv_layout.tile) * self._position_bytes
            for block in self._kv.values():
                if source != target:
                    self._device.copy_rows(block, source, target, **self._rows, width=width)
                if self._ends[copy.target] > kept:
                    self._device.discard(block, target, **self._rows, kept=kept * self._position_bytes)
                if copy.moves:
                    self._device.discard(block, source, **self._rows, kept=0)
            self._lengths[copy.target] = copy.length
            if copy.moves:
                self._ends[copy.source] = 0
            self._ends[copy.target] = min(kept, max(self._ends[copy.target], copy.length))
        if copies:
            self._device.wait()

    def _check(self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int]) -> None:
        """Raises ValueError for a call that would write outside its slots: the kernels do not check."""
        if first_slot < 0 or first_slot + len(rows) > self.slots:
            raise ValueError(f"slots {first_slot}..{first_slot + len(rows) - 1} are not within 0..{self.slots - 1}")
        for row, length in zip(rows, past, strict=True):
            if length < 0 or length + len(row) > self.context_length:
                raise ValueError(f"{length} + {len(row)} positions do not fit a slot of {self.context_length}")
        if not self._ragged and len(rows) > 1 and max(len(row) for row in rows) > 1:
            raise ValueError(f"{len(rows)} rows, some of several tokens: this graph takes one such row at a time")

    def _padded_shape(self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits: int) -> Shape:
        """The shape of a call, padded so that its bits do not depend on the batch and, on a GPU, that shapes recur."""
        count, width = len(rows), max(len(row) for row in rows)
        if self._pads_lone_row:
            count = 2 if count * width <= 1 else count
            logits = 2 if logits == 1 else logits
        if not self._device.is_gpu:
            return Shape(first_slot, count, width, logits)
        count = min(power_of_two(count), self._kv_slots - first_slot)
        positions = min(self.context_length - length for row, length in zip(rows, past, strict=True) if row)
        width = min(power_of_two(width), positions)
        shape = Shape(first_slot, count, width, power_of_two(logits))
        return Shape(0, count, 1, count) if shape.decodes else shape

    def _write_lengths(self, call: Call, shape: Shape, rows: Sequence[Sequence[int]], past: Sequence[int]) -> None:
        """Fills in each slot's length, and each row's."""
        slots = slice(shape.first_slot, shape.first_slot + shape.rows)
        if call.query_seqlens is not None:
            call.query_seqlens[:] = call.seqlens_k[:] = 0
            call.query_seqlens[: len(rows)] = [len(row) for row in rows]
        else:
            # An idle row writes behind the positions that may be read; a full slot's last position is never read again.
            call.seqlens_k[:] = np.minimum(self._lengths[slots], self.context_length - 1)
        for index, (row, length) in enumerate(zip(rows, past, strict=True)):
            if row:
                counted = len(row) if call.query_seqlens is not None else shape.width
                call.seqlens_k[index] = length + counted - 1
                self._lengths[shape.first_slot + index] = length + len(row)
                self._ends[shape.first_slot + index] = max(self._ends[shape.first_slot + index], length + counted)
            elif call.query_seqlens is not None:
                call.seqlens_k[index] = max(0, length - 1)
        if call.graph is None:
            call.total_sequence_length[0] = max(int(call.seqlens_k.max()) + 1, shape.width)

    def _call(self, shape: Shape) -> Call:
        call = self._calls.get(shape)
        if call is None:
            if shape.logits > self._results.rows:
                self._grow_results(shape.logits)
            call = self._calls[shape] = self._bind(shape)
            self._forget_oldest()
        self._calls.move_to_end(shape)
        return call

    def _grow_results(self, rows: int) -> None:
        """Makes the buffer larger. If there is no memory, everything stays as it was: the new buffer is taken first."""
        grown = Results(self._device, self._session, rows, self.vocab_size)
        self._forget_calls()  # they write into the old buffer
        self._results.release()
        self._results = grown

    def _most_bindings(self) -> int:
        """How many calls that are not captured stay bound.

        On a GPU, all shapes of a prompt chunk in each slot: widths are powers of two; logits are for none, one, or all.
        """
        if not self._device.is_gpu:
            return _BINDINGS
        return max(_BINDINGS, 3 * self.slots * power_of_two(self.context_length).bit_length())

    def _forget_oldest(self) -> None:
        """Forgets the least recently used call, but never a captured one: onnxruntime does not free captured graphs."""
        bound = [shape for shape, call in self._calls.items() if call.graph is None]
        if len(bound) > self.kept_bindings:
            self._device.release(self._calls.pop(bound[0]).inputs)

    def _forget_calls(self) -> None:
        while self._calls:
            self._device.release(self._calls.popitem()[1].inputs)

    def _bind(self, shape: Shape) -> Call:
        binding = self._session.io_binding()
        sizes = {
            "input_ids": ((shape.rows, shape.width), np.int64),
            "logits_idx": ((shape.logits,), np.int64),
            "seqlens_k": ((shape.rows,), np.int32),
        }
        if self._ragged:
            sizes["query_seqlens"] = ((shape.rows,), np.int32)
        total = np.full(1, self._capacity, np.int32)
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, total.shape, total.ctypes.data)
        kv_shape = (shape.rows, self._kv_layout.kv_heads, self._capacity, self._kv_layout.head_dim)
        for name, block in self._kv.items():
            address = block.address + shape.first_slot * self._slot_bytes
            place = (self._device.type, self._device.index, np.dtype(self._kv_layout.dtype), kv_shape, address)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        self._results.bind(binding, shape.logits)
        inputs, views = bind_inputs(self._device, binding, sizes)  # last: from here on the call owns the memory
        return Call(
            binding=binding,
            graph=next(self._graphs) if self._device.is_gpu and shape.decodes else None,
            inputs=inputs,
            input_ids=views["input_ids"],
            logits_idx=views["logits_idx"],
            seqlens_k=views["seqlens_k"],
            query_seqlens=views.get("query_seqlens"),
            total_sequence_length=total,
        )


def _rounded(positions: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `positions`."""
    return -(-positions // multiple) * multiple
