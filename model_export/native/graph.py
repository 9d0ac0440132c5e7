"""Builds the ONNX graph of a checkpoint.

One graph runs any call, prefill and decode steps alike. Its inputs, for a call of B rows of S positions with a KV cache
of `max_len` positions per row, are:

- `input_ids` int64 [B, S]: the tokens, padded on the right;
- `query_seqlens` int32 [B]: how many of a row's S tokens are valid, 0 for an idle row; only in float32, see below;
- `seqlens_k` int32 [B]: past plus valid tokens, minus one;
- `total_sequence_length` int32 [1]: an upper bound of `seqlens_k` + 1;
- `logits_idx` int64 [R]: the positions in the flattened [B * S] whose logits are wanted;
- `past_key.i`, `past_value.i` float32 or float16 [B, kv_heads, max_len, head_dim] for each layer i.

Outputs: `logits` float32 [R, vocab] and `present_key.i`, `present_value.i`, bound to the same memory as the past.
A graph for GPUs has further outputs, see `cuda.add_shortlist`.
Padding is written to the KV cache too: past + S must not exceed max_len. An idle row needs a past of at least one
position.

A float16 graph also runs on GPUs, whose attention operator has no `query_seqlens`: all S tokens of a row are valid, and
in a call with several rows that have a past, each row has one token. Padding lies behind a row's end, where the next
call overwrites it.

On a CPU a token's results are bit-equal for any split of a prompt into chunks, unless a chunk has one token of a row,
or one more than a multiple of 128: onnxruntime's attention computes the last token of such a chunk in another way.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from model_export.graph.interface import Interface
from model_export.graph.operators import CONTRIB, Operators, Table
from model_export.sources.checkpoint import Checkpoint
from model_export.sources.rotary import Rotary
from model_export.sources.weights import Floats, LazyTensor, stack_rows


class Decoder:
    """Builds the nodes between the inputs and outputs of `interface`."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        self.operators = operators
        self.interface = Interface(operators)
        positions, local = self.architecture.context_length, self.architecture.local_rotary
        self.rotary_caches = rotary_caches(operators, self.architecture.rotary, positions)
        self.local_rotary_caches = None if local is None else rotary_caches(operators, local, positions, "local_")

    def logits(self, on_layer: Callable[[], object], on_table: Callable[[], object]) -> ir.Value:
        """The logits [R, vocab]. The output of attention or MLP is added to the residual by the norm that follows.

        Calls `on_layer` after each layer, `on_table` after the embedding and after the output matrix.
        """
        table = self.operators.table("token_embd.weight", self.checkpoint.tensor("token_embd.weight"))
        on_table()
        residual = self._embedded(table)
        scale = self._vector("blk.0.attn_norm.weight")
        hidden = self.operators.rms_norm(residual, scale, self.architecture.norm_epsilon)
        for layer in range(self.architecture.layers):
            attended = self._attention(layer, hidden)
            is_last = layer == self.architecture.layers - 1
            attended = self._linear(attended, f"blk.{layer}.attn_output")
            attended = self._post_norm(attended, f"blk.{layer}.post_attention_norm.weight")
            hidden, residual = self._add_and_norm(attended, residual, f"blk.{layer}.ffn_norm.weight")
            added = self._mlp(layer, hidden)
            added = self._post_norm(added, f"blk.{layer}.post_ffw_norm.weight")
            next_norm = "output_norm.weight" if is_last else f"blk.{layer + 1}.attn_norm.weight"
            hidden, residual = self._add_and_norm(added, residual, next_norm)
            on_layer()
        wanted = self.interface.wanted_positions(hidden)
        tied = self.architecture.tied_embedding
        matrix = self.checkpoint.tensor("token_embd.weight" if tied else "output.weight")
        logits = self.operators.head(wanted, "output.weight", matrix, table if tied else None)
        on_table()
        return logits

    def _embedded(self, table: Table) -> ir.Value:
        """The embeddings [B, S, hidden] of the tokens."""
        embedded = self.operators.look_up(table, self.interface.input_ids)
        scale = self.architecture.embedding_scale
        if scale == 1:
            return embedded
        return self.operators.apply(
            "Mul", embedded, self.operators.vector("embedding_scale", np.array([scale], np.float32))
        )

    def _post_norm(self, value: ir.Value, name: str) -> ir.Value:
        """The `value` that is about to be added to the residual; normed in families that do so."""
        if not self.architecture.family.post_norms:
            return value
        return self.operators.rms_norm(value, self._vector(name), self.architecture.norm_epsilon)

    def _attention(self, layer: int, hidden: ir.Value) -> ir.Value:
        """The output [B, S, heads * head_dim] of a layer's attention."""
        architecture, attention = self.architecture, self.architecture.attention[layer]
        caches = self.local_rotary_caches if attention.local else self.rotary_caches
        return self.interface.attend(
            self._queries_keys_values(f"blk.{layer}.", hidden),
            caches if caches and attention.rotary else [None, None],
            architecture.kv_heads,
            architecture.head_dim,
            num_heads=architecture.heads,
            scale=architecture.score_divisor**-0.5,
            do_rotary=int(attention.rotary),
            local_window_size=-1 if attention.window is None else attention.window,
        )

    def _queries_keys_values(self, prefix: str, hidden: ir.Value) -> list[ir.Value | None]:
        """Queries, keys and values, the inputs of the attention operator: one packed value, unless they are normed."""
        architecture = self.architecture
        packed = self._linear(hidden, *(prefix + f"attn_{part}" for part in "qkv"))
        if not architecture.family.qk_norm:
            return [packed, None, None]
        widths = [heads * architecture.head_dim for heads in (architecture.heads, *[architecture.kv_heads] * 2)]
        sizes = self.operators.sizes(prefix + "attn_qkv.widths", *widths)
        query, key, value = self.operators.apply_many("Split", packed, sizes, outputs=3, axis=-1)
        return [self._head_norm(query, prefix + "attn_q_norm"), self._head_norm(key, prefix + "attn_k_norm"), value]

    def _head_norm(self, value: ir.Value, name: str) -> ir.Value:
        head_dim = self.architecture.head_dim
        heads = self.operators.apply("Reshape", value, self.operators.sizes(f"{name}.heads", 0, 0, -1, head_dim))
        normed = self.operators.rms_norm(heads, self._vector(f"{name}.weight"), self.architecture.norm_epsilon)
        return self.operators.apply("Reshape", normed, self.operators.sizes(f"{name}.merged", 0, 0, -1))

    def _mlp(self, layer: int, hidden: ir.Value) -> ir.Value:
        prefix = f"blk.{layer}."
        both = self._linear(hidden, prefix + "ffn_gate", prefix + "ffn_up")
        gate, up = self.operators.apply_many("Split", both, outputs=2, axis=-1, num_outputs=2)
        if self.architecture.family.gelu:
            activated = self.operators.apply("FastGelu", gate, domain=CONTRIB)
        else:
            activated = self.operators.apply("QuickGelu", gate, domain=CONTRIB, alpha=1.0)
        product = self.operators.apply("Mul", activated, up)
        return self._linear(product, prefix + "ffn_down")

    def _linear(self, value: ir.Value, *names: str) -> ir.Value:
        """The linear maps `names` of the same `value`, stacked into one product."""
        matrix = stack_rows([self.checkpoint.tensor(f"{name}.weight") for name in names])
        biases = [self.checkpoint.floats(f"{name}.bias") for name in names if f"{name}.bias" in self.checkpoint.tensors]
        bias = np.concatenate(biases) if biases else None
        return self.operators.linear(value, "+".join(names), matrix, bias)

    def _add_and_norm(self, value: ir.Value, residual: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        return self.operators.add_and_rms_norm(value, residual, self._vector(name), self.architecture.norm_epsilon)

    def _vector(self, name: str) -> ir.Value:
        return self.operators.vector(name, self.checkpoint.floats(name))


def rotary_caches(operators: Operators, rotary: Rotary, positions: int, prefix: str = "") -> list[ir.Value]:
    """Cosine and sine [positions, pairs] of each position's rotation, times the rotation's scale."""
    functions = {"cos": np.cos, "sin": np.sin}
    return [
        operators.rows(f"{prefix}{name}_cache", _rotations(rotary, positions, function))
        for name, function in functions.items()
    ]


def _rotations(rotary: Rotary, positions: int, function: np.ufunc) -> LazyTensor:
    def read(rows: slice) -> Floats:
        angles = np.outer(np.arange(rows.start, rows.stop), rotary.frequencies)
        return np.asarray(rotary.scale * function(angles), np.float32)

    return LazyTensor((positions, len(rotary.frequencies)), read)
