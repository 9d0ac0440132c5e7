"""The inputs and outputs of every graph; `native.graph` or `mobius.graph` builds the nodes in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from model_export.graph.initializers import Initializers
from model_export.graph.operators import CONTRIB, Operators

OPSET = 21
IR_VERSION = 10


class Interface:
    """`model_export.native.graph` describes the inputs and outputs.

    Only float32 graphs have the input `query_seqlens`: onnxruntime's attention operator on GPUs has none.
    """

    def __init__(self, operators: Operators) -> None:
        self._operators = operators
        self.input_ids = ir.val("input_ids", ir.DataType.INT64, ["B", "S"])
        self.seqlens_k = ir.val("seqlens_k", ir.DataType.INT32, ["B"])
        self._total_sequence_length = ir.val("total_sequence_length", ir.DataType.INT32, [1])
        self.logits_idx = ir.val("logits_idx", ir.DataType.INT64, ["R"])
        self._inputs = [self.input_ids, self.seqlens_k, self._total_sequence_length, self.logits_idx]
        self.query_seqlens: ir.Value | None = None
        if operators.floats == ir.DataType.FLOAT:
            self.query_seqlens = ir.val("query_seqlens", ir.DataType.INT32, ["B"])
            self._inputs.append(self.query_seqlens)
        self._present: list[ir.Value] = []

    @property
    def layers(self) -> int:
        """How many layers have been built so far."""
        return len(self._present) // 2

    def attend(
        self,
        queries_keys_values: Sequence[ir.Value | None],
        rotations: Sequence[ir.Value | None],
        kv_heads: int,
        head_dim: int,
        **attributes: Any,
    ) -> ir.Value:
        """The output [B, S, heads * head_dim] of the next layer's attention, which reads and extends its KV cache."""
        past = self.past(self._operators.floats, kv_heads, head_dim)
        attended, key, value = self._operators.apply_many(
            "GroupQueryAttention",
            *queries_keys_values,
            *past,
            self.seqlens_k,
            self._total_sequence_length,
            *rotations,
            *([None] * 7 + [self.query_seqlens] if self.query_seqlens is not None else []),
            outputs=3,
            domain=CONTRIB,
            kv_num_heads=kv_heads,
            **attributes,
        )
        self.extend(past, [key, value])
        return attended

    def past(self, dtype: ir.DataType, kv_heads: int, head_dim: int) -> list[ir.Value]:
        """Keys and values of the next layer before the call."""
        shape: list[int | str] = ["B", kv_heads, "max_len", head_dim]
        past = [ir.val(f"past_{part}.{self.layers}", dtype, shape) for part in ("key", "value")]
        self._inputs += past
        return past

    def extend(self, past: Sequence[ir.Value], present: Sequence[ir.Value]) -> None:
        """Makes `present` the keys and values of the layer that has `past`, after the call."""
        for before, after in zip(past, present, strict=True):
            assert before.name is not None
            assert before.dtype is not None
            after.name, after.dtype, after.shape = before.name.replace("past", "present"), before.dtype, before.shape
            self._present.append(after)

    def wanted_positions(self, value: ir.Value) -> ir.Value:
        """The rows [R, columns] of `value` [B, S, columns] that get logits."""
        flat = self._operators.apply("Flatten", value, axis=2)
        return self._operators.apply("Gather", flat, self.logits_idx, axis=0)

    def model(self, logits: ir.Value, vocab_size: int, data: Initializers, name: str) -> ir.Model:
        """The complete model with the output `logits` [R, vocab_size]."""
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["R", vocab_size])
        nodes = self._operators.nodes
        graph = ir.Graph(
            self._inputs,
            [logits, *self._present],
            nodes=nodes,
            initializers=data.used,
            opset_imports={"": OPSET} | {node.domain: 1 for node in nodes if node.domain},
            name=name,
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="model_export")
