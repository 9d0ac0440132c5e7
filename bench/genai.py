"""onnxruntime-genai in process, on our exported weights in the graph that it expects.

Its continuous batching needs the operator PagedAttention, for which onnxruntime has no CPU kernel. So requests run in
static batches: waiting requests of one shape start together, and none joins before all are done.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from bench.client import Job, PeerError, Piece
from bench.peers import Served, Setup
from service import manifest

# A batch waits this long for the requests that one client sends at once.
GATHER_SECONDS = 0.02


@contextmanager
def static_batches(setup: Setup) -> Iterator[Served]:
    """A batcher that is fed with token ids; it gives no text, which spares it the decoding."""
    yield Served(_Batcher(_load(_converted(setup), setup.threads), setup.slots).stream)


@dataclass(eq=False)
class _Waiting:
    """A request, and the event loop's queue of its pieces; an error ends the queue."""

    job: Job
    arrived: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)

    @property
    def shape(self) -> tuple[int, int]:
        """The tokens of its prompt and of its answer."""
        return len(self.job.prompts[0]), self.job.new_tokens


class _Batcher:
    """Runs waiting requests of one shape in a thread, one batch after the other, while any request waits."""

    def __init__(self, model: Any, slots: int) -> None:
        self._model = model
        self._slots = slots
        self._waiting: list[_Waiting] = []
        self._batches: asyncio.Task[None] | None = None

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        waiting = _Waiting(job)
        self._waiting.append(waiting)
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run())
        for _ in range(job.new_tokens):
            piece = await waiting.arrived.get()
            if isinstance(piece, Exception):
                raise PeerError(f"onnxruntime-genai failed: {piece}") from piece
            yield piece

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_SECONDS)
            shape = self._waiting[0].shape
            batch = [waiting for waiting in self._waiting if waiting.shape == shape][: self._slots]
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            try:
                await asyncio.to_thread(self._generate, batch, asyncio.get_running_loop())
            except Exception as error:  # its error types have no common base, and every client must see any of them
                _deliver(batch, error)

    def _generate(self, batch: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        import onnxruntime_genai  # noqa: PLC0415 - see _load

        prompt, new = batch[0].shape
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        length = prompt + new
        # An answer cannot end before min_length.
        parameters.set_search_options(batch_size=len(batch), min_length=length, max_length=length, do_sample=False)
        generator = onnxruntime_genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([waiting.job.prompts[0] for waiting in batch], np.int32))
        for count in range(1, new + 1):
            generator.generate_next_token()
            loop.call_soon_threadsafe(_deliver, batch, Piece("", count))


def _deliver(batch: list[_Waiting], piece: Piece | Exception) -> None:
    for waiting in batch:
        waiting.arrived.put_nowait(piece)


def _load(folder: Path, threads: int) -> Any:
    try:
        import onnxruntime_genai  # noqa: PLC0415 - only this peer needs it
    except ImportError:
        raise PeerError(
            "onnxruntime-genai is missing: `make bench` installs it, or leave it out with --peers"
        ) from None
    config = onnxruntime_genai.Config(str(folder))
    options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return onnxruntime_genai.Model(config)


def _converted(setup: Setup) -> Path:
    """A model directory for onnxruntime-genai, made once for each export."""
    described = manifest.load(setup.model_dir)
    folder = setup.cache / f"genai-{described.files[manifest.MODEL_FILE].sha256[:16]}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = ir.load(setup.model_dir / manifest.MODEL_FILE)
        _adapt(model.graph, described.vocab_size)
        ir.save(model, partial / manifest.MODEL_FILE)
        shutil.copyfile(setup.model_dir / manifest.WEIGHTS_FILE, partial / manifest.WEIGHTS_FILE)
        (partial / "genai_config.json").write_text(json.dumps(_config(described, model.graph), indent=2))
        partial.rename(folder)
    return folder


def _adapt(graph: ir.Graph, vocabulary: int) -> None:
    """Takes lengths from an attention mask [B, total], and outputs logits [B, 1, vocabulary] of the last position."""
    inputs = {value.name: value for value in graph.inputs}
    mask = ir.val("attention_mask", ir.DataType.INT64, ["B", "total_length"])
    one, last = _constant(graph, "one", np.array([1])), _constant(graph, "last", np.array(-1))
    head = Tape()
    valid = head.op("Sub", [head.op("ReduceSum", [mask, one], {"keepdims": 0}), one])
    lengths = {
        "seqlens_k": head.op("Cast", [valid], {"to": ir.DataType.INT32.value}),
        "total_sequence_length": head.op(
            "Cast", [head.op("Shape", [mask], {"start": 1})], {"to": ir.DataType.INT32.value}
        ),
    }
    graph.insert_before(graph[0], list(head.nodes))
    for name, value in lengths.items():
        ir.convenience.replace_all_uses_with(inputs[name], value)
    for use in list(inputs["query_seqlens"].uses()):
        use.node.replace_input_with(use.idx, None)
    _take_last_position(graph, inputs["logits_idx"], last)
    _unsqueeze_logits(graph, one, vocabulary)
    for name in (*lengths, "query_seqlens", "logits_idx"):
        graph.inputs.remove(inputs[name])
    graph.inputs.insert(1, mask)


def _take_last_position(graph: ir.Graph, wanted: ir.Value, last: ir.Value) -> None:
    """Replaces the Gather of wanted positions from the flattened rows by one of the last position."""
    (use,) = wanted.uses()
    gather, flatten = use.node, use.node.inputs[0].producer()
    tape = Tape()
    hidden = tape.op("Gather", [flatten.inputs[0], last], {"axis": 1})
    graph.insert_before(gather, list(tape.nodes))
    ir.convenience.replace_all_uses_with(gather.outputs[0], hidden)
    graph.remove([gather, flatten])


def _unsqueeze_logits(graph: ir.Graph, axis: ir.Value, vocabulary: int) -> None:
    flat = graph.outputs[0]
    flat.name, flat.shape = "last_logits", None
    tape = Tape()
    logits = tape.op("Unsqueeze", [flat, axis])
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["B", 1, vocabulary])
    graph.extend(list(tape.nodes))
    graph.outputs[0] = logits


def _constant(graph: ir.Graph, name: str, array: np.ndarray[Any, np.dtype[np.int64]]) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(array, name=name))
    graph.register_initializer(value)
    return value


def _config(described: manifest.Manifest, graph: ir.Graph) -> dict[str, Any]:
    attention = next(node for node in graph if node.op_type == "GroupQueryAttention")
    heads = attention.attributes["num_heads"].as_int()
    decoder = {
        "filename": manifest.MODEL_FILE,
        "head_size": described.kv.head_dim,
        "hidden_size": heads * described.kv.head_dim,
        "num_attention_heads": heads,
        "num_hidden_layers": described.kv.layers,
        "num_key_value_heads": described.kv.kv_heads,
        "session_options": {"provider_options": []},
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key.%d",
            "past_value_names": "past_value.%d",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present_key.%d",
            "present_value_names": "present_value.%d",
        },
    }
    return {
        "model": {
            "type": "llama",
            "bos_token_id": described.special_tokens.bos or 0,
            "eos_token_id": list(described.special_tokens.end),
            "pad_token_id": 0,
            "context_length": described.context_length,
            "vocab_size": described.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "max_length": described.context_length,
        },
    }
