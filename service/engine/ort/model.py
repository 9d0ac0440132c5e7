"""The exported model and its keys and values, on the device where they are."""

from __future__ import annotations

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.cache import Copy
from service.engine.ort.device import Block, Cpu, Device, kv_slots, power_of_two
from service.engine.ort.results import Results, Rows
from service.engine.ort.signature import check_signature
from service.manifest import MODEL_FILE, PROMPT_MODEL_FILE, Manifest

# A fresh binding costs as much as several tokens' arithmetic; decode steps meet the same few shapes over and over.
_BINDINGS = 128
# Numbers of rows at which the graph for prompts may be the faster one for generated tokens too, and by how much at
# least: every weight is read for many of them.
_MANY_ROWS = (8, 16, 32)
_WORTH_CHANGING = 0.95
_TIMED_STEPS = 5
# Where a call's inputs begin in their block: for any type of any device.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class Shape:
    """A call's rows and their width in tokens, from a slot on, and how many positions get logits, all with padding."""

    first_slot: int
    rows: int
    width: int
    logits: int

    @property
    def decodes(self) -> bool:
        """Whether it is a step of generated tokens, whose shapes and addresses recur."""
        return self.first_slot == 0 and self.width == 1


@dataclass(frozen=True, slots=True)
class Call:
    """One call's inputs, at fixed addresses, and the session and binding that take them.

    `graph` numbers what a GPU may capture and replay. Without `query_seqlens` every token of every row counts.
    """

    session: ort.InferenceSession
    binding: Any
    graph: int | None
    inputs: Block
    input_ids: npt.NDArray[np.int64]
    logits_idx: npt.NDArray[np.int64]
    seqlens_k: npt.NDArray[np.int32]
    query_seqlens: npt.NDArray[np.int32] | None
    total_sequence_length: npt.NDArray[np.int32]


class Model:
    """Runs the graphs of a model directory over slots of keys and values.

    Rows of several tokens go through the graph for prompts where there is one. So do many rows where results may depend
    on the batch, from the number on at which that was faster when it was tried at the start. Keys and values are one
    buffer per layer, [slots, kv_heads, context_length, head_dim]; a call covers consecutive slots and extends them in
    place. Not thread-safe: one thread at a time may use it.
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
        self.vocab_size = manifest.vocab_size
        self.slots = slots
        self.context_length = context_length
        self._device = device or Cpu()
        self._kv_layout = manifest.kv
        self._kv_slots = kv_slots(slots, self._device.few_shapes)
        self._min_rows = manifest.quantization.min_rows if batch_invariant else 1
        self._min_logits = manifest.quantization.min_logits if batch_invariant else 1
        self._many_rows = math.inf
        self._decoding = self._prompts = self._load(directory / MODEL_FILE, manifest, threads)
        position = manifest.kv.head_dim * np.dtype(manifest.kv.dtype).itemsize
        self._head_bytes, self._position_bytes = context_length * position, position
        self._slot_bytes = manifest.kv.kv_heads * self._head_bytes
        self._kv = {
            f"{part}.{layer}": self._device.reserve(self._kv_slots * self._slot_bytes)
            for layer in range(manifest.kv.layers)
            for part in ("key", "value")
        }
        # How many positions of each slot may matter to someone.
        self._lengths = np.zeros(self._kv_slots, np.int32)
        self._calls: OrderedDict[Shape, Call] = OrderedDict()
        self.kept_bindings = self._most_bindings()
        self._graphs = itertools.count()
        self._ragged = any(each.name == "query_seqlens" for each in self._decoding.get_inputs())
        # What a GPU has captured is bound to its results: they grow for scored prompts alone, to twice as much at least
        # each time, so that steps are captured again a few times at most.
        rows = power_of_two(slots) if self._device.few_shapes else 0
        self._results = Results(self._device, self._decoding, rows, self.vocab_size)
        if manifest.quantization.prompts is not None:
            self._prompts = self._load(directory / PROMPT_MODEL_FILE, manifest, threads)
            if not batch_invariant:
                self._many_rows = self._faster_from()
                self._forget_calls()  # some are bound to the graph that was only tried

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
        self._forget_calls()
        seconds = []
        for _ in range(_TIMED_STEPS):
            began = time.perf_counter()
            self.forward(0, [[0]] * rows, [0] * rows, [(row, 0) for row in range(rows)])
            seconds.append(time.perf_counter() - began)
        return min(seconds)

    def _load(self, graph: Path, manifest: Manifest, threads: int) -> ort.InferenceSession:
        session = self._device.load(graph, threads)
        check_signature(graph, session.get_inputs(), session.get_outputs(), manifest)
        return session

    def forward(
        self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits_at: Sequence[tuple[int, int]]
    ) -> Rows:
        """Extends slots `first_slot`.. by the tokens of `rows`, after their first `past` positions.

        A row may be empty: its slot stays as it is. Gives the logits after the tokens at `logits_at`, pairs of row and
        position in the row, where they are whole as an array [len(logits_at), vocabulary]; they are valid until the
        next call.
        """
        self._check(first_slot, rows, past)
        shape = self._shape(first_slot, rows, past, len(logits_at))
        call = self._call(shape)
        for index, row in enumerate(rows):
            call.input_ids[index, : len(row)] = row
        self._fill_lengths(call, shape, rows, past)
        call.logits_idx[: len(logits_at)] = [row * shape.width + position for row, position in logits_at]
        self._device.send(call.inputs)
        self._device.run(call.session, call.binding, call.graph)
        return self._results.read(len(logits_at))

    @property
    def calls(self) -> Mapping[Shape, Call]:
        """The calls that are bound, by shape."""
        return self._calls

    def probe(self, slot: int) -> None:
        """Raises what `forward` does where it fails on a single token. The slot's first position is lost."""
        self.forward(slot, [[0]], [0], [(0, 0)])

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copies keys and values between slots, in order."""
        for item in copies:
            source, target = item.source * self._slot_bytes, item.target * self._slot_bytes
            width = item.length * self._position_bytes
            for block in self._kv.values():
                self._device.copy_rows(
                    block, source, target, rows=self._kv_layout.kv_heads, pitch=self._head_bytes, width=width
                )
            self._lengths[item.target] = item.length
        if copies:
            self._device.wait()

    def _check(self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int]) -> None:
        """A wrong length would write beyond a slot: some kernels clamp it in silence."""
        if first_slot < 0 or first_slot + len(rows) > self.slots:
            raise ValueError(f"slots {first_slot}..{first_slot + len(rows) - 1} are not within 0..{self.slots - 1}")
        for row, length in zip(rows, past, strict=True):
            if length < 0 or length + len(row) > self.context_length:
                raise ValueError(f"{length} + {len(row)} positions do not fit a slot of {self.context_length}")
        if not self._ragged and len(rows) > 1 and max(len(row) for row in rows) > 1:
            raise ValueError(f"{len(rows)} rows of several tokens: this graph takes one")

    def _shape(self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits: int) -> Shape:
        count, width = len(rows), max(len(row) for row in rows)
        if count * width < self._min_rows:
            count = self._min_rows
        if logits:
            logits = max(logits, self._min_logits)
        if not self._device.few_shapes:
            return Shape(first_slot, count, width, logits)
        count = min(power_of_two(count), self._kv_slots - first_slot)
        room = min(self.context_length - length for row, length in zip(rows, past, strict=True) if row)
        width = min(power_of_two(width), room)
        shape = Shape(first_slot, count, width, power_of_two(logits))
        return Shape(0, count, 1, count) if shape.decodes else shape

    def _fill_lengths(self, call: Call, shape: Shape, rows: Sequence[Sequence[int]], past: Sequence[int]) -> None:
        """Says how much of each slot there is, and how much of each row counts."""
        slots = slice(shape.first_slot, shape.first_slot + shape.rows)
        if call.query_seqlens is not None:
            call.query_seqlens[:] = call.seqlens_k[:] = 0
            call.query_seqlens[: len(rows)] = [len(row) for row in rows]
        else:
            # What an idle row writes lands behind all that matters; a full slot's last position is never read again.
            call.seqlens_k[:] = np.minimum(self._lengths[slots], self.context_length - 1)
        for index, (row, length) in enumerate(zip(rows, past, strict=True)):
            if row:
                counted = len(row) if call.query_seqlens is not None else shape.width
                call.seqlens_k[index] = length + counted - 1
                self._lengths[shape.first_slot + index] = length + len(row)
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
            self._forget_one_too_many()
        self._calls.move_to_end(shape)
        return call

    def _grow_results(self, rows: int) -> None:
        """Makes room for so many rows. All is as it was where there is none: new room is taken before the old goes."""
        grown = Results(self._device, self._decoding, rows, self.vocab_size)
        self._forget_calls()  # they point into the old buffer
        self._results.release()
        self._results = grown

    def _most_bindings(self) -> int:
        """How many calls stay bound that are not captured.

        Where calls take few shapes, a prompt's in each slot: its width a power of two, its logits none, one, or all.
        """
        if not self._device.few_shapes:
            return _BINDINGS
        return max(_BINDINGS, 3 * self.slots * power_of_two(self.context_length).bit_length())

    def _forget_one_too_many(self) -> None:
        """Forgets the call unused for longest, but no captured one: onnxruntime never frees what it has captured."""
        bound = [shape for shape, call in self._calls.items() if call.graph is None]
        if len(bound) > self.kept_bindings:
            self._device.release(self._calls.pop(bound[0]).inputs)

    def _forget_calls(self) -> None:
        while self._calls:
            self._device.release(self._calls.popitem()[1].inputs)

    def _bind(self, shape: Shape) -> Call:
        session = self._prompts if shape.width > 1 or shape.rows >= self._many_rows else self._decoding
        binding = session.io_binding()
        sizes = {
            "input_ids": ((shape.rows, shape.width), np.int64),
            "logits_idx": ((shape.logits,), np.int64),
            "seqlens_k": ((shape.rows,), np.int32),
        }
        if self._ragged:
            sizes["query_seqlens"] = ((shape.rows,), np.int32)
        total = np.full(1, self.context_length, np.int32)
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, total.shape, total.ctypes.data)
        kv_shape = (shape.rows, self._kv_layout.kv_heads, self.context_length, self._kv_layout.head_dim)
        for name, block in self._kv.items():
            address = block.address + shape.first_slot * self._slot_bytes
            place = (self._device.kind, self._device.index, np.dtype(self._kv_layout.dtype), kv_shape, address)
            binding.bind_input(f"past_{name}", *place)
            binding.bind_output(f"present_{name}", *place)
        self._results.bind(binding, shape.logits)
        inputs, views = self._inputs(binding, sizes)  # last, as it takes memory, which goes back with the call
        return Call(
            session=session,
            binding=binding,
            graph=next(self._graphs) if self._device.few_shapes and shape.decodes else None,
            inputs=inputs,
            input_ids=views["input_ids"],
            logits_idx=views["logits_idx"],
            seqlens_k=views["seqlens_k"],
            query_seqlens=views.get("query_seqlens"),
            total_sequence_length=total,
        )

    def _inputs(self, binding: Any, sizes: dict[str, Any]) -> tuple[Block, dict[str, npt.NDArray[Any]]]:
        """One block for the inputs of these shapes and types, so that one copy sends them all; and the host's views."""
        places, end = {}, 0
        for name, (shape, dtype) in sizes.items():
            places[name] = slice(end, end + math.prod(shape) * np.dtype(dtype).itemsize)
            end = -(-places[name].stop // _ALIGNMENT) * _ALIGNMENT
        block, views = self._device.block(end), {}
        try:
            for name, (shape, dtype) in sizes.items():
                address = block.address + places[name].start
                binding.bind_input(name, self._device.kind, self._device.index, dtype, shape, address)
                views[name] = block.host[places[name]].view(dtype).reshape(shape)
        except BaseException:
            self._device.release(block)
            raise
        return block, views
