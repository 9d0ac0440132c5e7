"""onnxruntime-genai in process, on weights exported for stock kernels, in the graph that it expects.

Its continuous batching needs the operator PagedAttention, for which onnxruntime has no CPU kernel. So requests run in
static batches: waiting requests of one shape start together, and none joins before all are done.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from bench.client import Job, PeerError, Piece
from bench.peers import Served, Setup
from bench.processes import optional_package
from model_export.export import Options, export
from model_export.progress import progress
from service import manifest

# A batch waits this long for the requests that one client sends at once.
GATHER_SECONDS = 0.02
_Waiting = tuple[Job, "asyncio.Queue[Piece | Exception]"]


@contextmanager
def static_batches(setup: Setup) -> Iterator[Served]:
    """A batcher that is fed with token ids; it gives no text, which spares it the decoding."""
    genai = optional_package("onnxruntime_genai", "onnxruntime-genai")
    config = genai.Config(str(_converted(setup)))
    options = {"intra_op_num_threads": setup.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    yield Served(_Batcher(genai, genai.Model(config), setup.slots).stream)


class _Batcher:
    """Runs waiting requests of one shape in a thread, one batch after the other, while any request waits."""

    def __init__(self, genai: ModuleType, model: Any, slots: int) -> None:
        self._genai = genai
        self._model = model
        self._slots = slots
        # Each request with the event loop's queue of its pieces; an error ends the queue.
        self._waiting: list[_Waiting] = []
        self._batches: asyncio.Task[None] | None = None

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        arrived: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        self._waiting.append((job, arrived))
        if self._batches is None or self._batches.done():
            self._batches = asyncio.create_task(self._run())
        for _ in range(job.new_tokens):
            piece = await arrived.get()
            if isinstance(piece, Exception):
                raise PeerError(f"onnxruntime-genai failed: {piece}") from piece
            yield piece

    async def _run(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHER_SECONDS)
            first, _ = self._waiting[0]
            batch = [(job, arrived) for job, arrived in self._waiting if _shape(job) == _shape(first)][: self._slots]
            self._waiting = [waiting for waiting in self._waiting if waiting not in batch]
            try:
                await asyncio.to_thread(self._generate, batch, asyncio.get_running_loop())
            except Exception as error:  # its error types have no common base, and every client must see any of them
                _deliver(batch, error)

    def _generate(self, batch: list[_Waiting], loop: asyncio.AbstractEventLoop) -> None:
        prompt, new = _shape(batch[0][0])
        parameters = self._genai.GeneratorParams(self._model)
        length = prompt + new
        # An answer cannot end before min_length.
        parameters.set_search_options(batch_size=len(batch), min_length=length, max_length=length, do_sample=False)
        generator = self._genai.Generator(self._model, parameters)
        generator.append_tokens(np.array([job.prompts[0] for job, _ in batch], np.int32))
        for count in range(1, new + 1):
            generator.generate_next_token()
            loop.call_soon_threadsafe(_deliver, batch, Piece("", count))


def _deliver(batch: list[_Waiting], piece: Piece | Exception) -> None:
    for _, arrived in batch:
        arrived.put_nowait(piece)


def _shape(job: Job) -> tuple[int, int]:
    """The tokens of its prompt and of its answer."""
    return len(job.prompts[0]), job.new_tokens


def _converted(setup: Setup) -> Path:
    """A model directory for onnxruntime-genai, made once for each export."""
    model_dir = _over_stock_kernels(setup)
    described = manifest.load(model_dir)
    folder = setup.cache / f"genai-{described.files[manifest.MODEL_FILE].sha256[0][:16]}"
    if not folder.exists():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        model = onnx.load(model_dir / manifest.MODEL_FILE, load_external_data=False)
        model.graph.CopyFrom(_adapted(model.graph))
        onnx.save(model, partial / manifest.MODEL_FILE)
        shutil.copyfile(model_dir / manifest.WEIGHTS_FILE, partial / manifest.WEIGHTS_FILE)
        (partial / "genai_config.json").write_text(json.dumps(_config(described, model.graph), indent=2))
        partial.rename(folder)
    return folder


def _over_stock_kernels(setup: Setup) -> Path:
    """The model directory; where it needs our own kernels, which genai cannot load, another export of its weights."""
    described = manifest.read(setup.model_dir)
    if described.kernels == "stock":
        return setup.model_dir
    folder = setup.cache / f"stock-{described.files[manifest.MODEL_FILE].sha256[0][:16]}"
    if not folder.exists():
        export(setup.weights, folder, Options(kernels="stock"), progress)
    return folder


# Computes inputs of our graph from an attention mask. Wanted is the last of each row's S positions.
HEAD = """
head (int64[B, S] input_ids, int64[B, total_length] attention_mask)
  => (int32[B] query_seqlens, int32[B] seqlens_k, int32[1] total_sequence_length, int64[R] logits_idx) {
    head_one = Constant<value_ints = [1]>()
    head_rows = Shape<start = 0, end = 1>(input_ids)
    head_width = Shape<start = 1>(input_ids)
    head_width_int32 = Cast<to = 6>(head_width)
    query_seqlens = Expand(head_width_int32, head_rows)
    head_lengths = ReduceSum<keepdims = 0>(attention_mask, head_one)
    head_ends = Sub(head_lengths, head_one)
    seqlens_k = Cast<to = 6>(head_ends)
    head_total = Shape<start = 1>(attention_mask)
    total_sequence_length = Cast<to = 6>(head_total)
    head_last = Sub(head_width, head_one)
    head_positions = Mul(head_rows, head_width)
    head_first = Squeeze(head_last)
    head_limit = Squeeze(head_positions)
    head_step = Squeeze(head_width)
    logits_idx = Range(head_first, head_limit, head_step)
}"""
# Gives each row's logits a position of their own, as onnxruntime-genai expects.
TAIL = """
tail (float[R, V] logits) => (float[B, 1, V] last_logits) {
    tail_one = Constant<value_ints = [1]>()
    last_logits = Unsqueeze(logits, tail_one)
}"""


def _adapted(graph: onnx.GraphProto) -> onnx.GraphProto:
    """Our graph between HEAD and TAIL."""
    head, tail = onnx.parser.parse_graph(HEAD), onnx.parser.parse_graph(TAIL)
    known = {value.name for value in (*head.input, *head.output)}
    return onnx.helper.make_graph(
        [*head.node, *graph.node, *tail.node],
        graph.name,
        [*head.input, *(value for value in graph.input if value.name not in known)],
        [*tail.output, *(value for value in graph.output if value.name != "logits")],
        graph.initializer,
    )


def _config(described: manifest.Manifest, graph: onnx.GraphProto) -> dict[str, Any]:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    heads = next(attribute.i for attribute in attributes if attribute.name == "num_heads")
    return {
        "model": {
            "type": "llama",
            "bos_token_id": described.special_tokens.bos or 0,
            "eos_token_id": list(described.special_tokens.end),
            "pad_token_id": 0,
            "context_length": described.context_length,
            "vocab_size": described.vocab_size,
            "decoder": {
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
                    "logits": "last_logits",
                    "present_key_names": "present_key.%d",
                    "present_value_names": "present_value.%d",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "past_present_share_buffer": True,
            "max_length": described.context_length,
        },
    }
