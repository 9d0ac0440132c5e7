"""Our own operators in numpy, by the rules of their tiles, and a session that runs a graph of them.

It stands in for onnxruntime's session where the library of the kernels is not needed or not there. Activations are not
rounded to 8 bits, so its logits are those of the source's weights but for the rounding of keys and values.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from service.engine.ort.device import Cpu

TILE = 16
TYPES = {
    ir.DataType.INT64: "tensor(int64)",
    ir.DataType.INT32: "tensor(int32)",
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
}


def untiled(tiles: np.ndarray) -> np.ndarray:
    """The weights [rows, columns] of tiles [rows / 32, columns / 32, bytes]."""
    rows, columns, size = tiles.shape
    weights = np.empty((rows, 32, columns, 32), np.float32)
    is_byte = size == 1088
    codes = tiles[..., : 1024 if is_byte else 512].reshape(rows, columns, -1, 32, 4)
    numbers = np.ascontiguousarray(tiles[..., 1024 if is_byte else 512 :]).view(np.float16).astype(np.float32)
    scales, minimums = numbers[..., :32, None], numbers[..., 32:, None]
    if not is_byte:
        codes = np.concatenate([codes & 15, codes >> 4], axis=2)
    if not minimums.size:
        minimums = scales * (-128 if is_byte else -8)
    for group in range(8):  # inputs 4 * group .. 4 * group + 3
        values = scales * codes[:, :, group] + minimums
        weights[..., 4 * group : 4 * group + 4] = values.transpose(0, 2, 1, 3)
    return weights.reshape(rows * 32, columns * 32)


def rms_norm(values, scale, epsilon):
    return values / np.sqrt(np.mean(np.square(values), axis=-1, keepdims=True) + np.float32(epsilon)) * scale


def rotated(vectors, cos, sin):
    """Vectors [positions, heads, head_dim], each number rotated with the one half a head behind it."""
    first, second = np.split(vectors, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def embedding_lookup(table, ids):
    return untiled(table)[ids]


def head(hidden, norm, table, logits_idx, *, epsilon):
    return rms_norm(hidden.reshape(-1, hidden.shape[-1])[logits_idx], norm, epsilon) @ untiled(table).T


def decoder_layer(
    hidden,
    attention_norm,
    qkv,
    keys,
    values,
    seqlens_k,
    query_seqlens,
    cos,
    sin,
    output,
    mlp_norm,
    gate_up,
    down,
    *,
    epsilon,
    scale,
    kv_heads,
    head_dim,
):
    """The layer's output; it extends `keys` and `values` [B, kv_heads, positions, head_dim] in place."""
    qkv, output, gate_up, down = (untiled(tiles) for tiles in (qkv, output, gate_up, down))
    pairs = gate_up.reshape(-1, 2, 16, gate_up.shape[-1])
    gate, up = (pairs[:, part].reshape(-1, gate_up.shape[-1]) for part in (0, 1))
    heads = qkv.shape[0] // head_dim - 2 * kv_heads
    results = np.zeros_like(hidden)
    for row, count in enumerate(query_seqlens):
        if not count:
            continue
        end = seqlens_k[row] + 1
        at = np.arange(end - count, end)
        x = hidden[row, :count]
        vectors = (rms_norm(x, attention_norm, epsilon) @ qkv.T).reshape(count, -1, head_dim)
        query, key, value = np.split(vectors, [heads, heads + kv_heads], axis=1)
        query, key = rotated(query, cos[at], sin[at]), rotated(key, cos[at], sin[at])
        slot_keys = keys[row].reshape(-1, kv_heads, head_dim, TILE)
        slot_values = values[row].reshape(-1, kv_heads, TILE, head_dim)
        slot_keys[at // TILE, :, :, at % TILE] = key
        slot_values[at // TILE, :, at % TILE] = value
        all_keys = slot_keys.transpose(0, 3, 1, 2).reshape(-1, kv_heads, head_dim)[:end].astype(np.float32)
        all_values = slot_values.transpose(0, 2, 1, 3).reshape(-1, kv_heads, head_dim)[:end].astype(np.float32)
        mixed = np.empty_like(query)
        for each in range(heads):
            group = each // (heads // kv_heads)
            scores = scale * query[:, each] @ all_keys[:, group].T
            scores = np.where(np.arange(end) <= at[:, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            mixed[:, each] = weights / weights.sum(axis=-1, keepdims=True) @ all_values[:, group]
        x = x + mixed.reshape(count, -1) @ output.T
        normed = rms_norm(x, mlp_norm, epsilon)
        gated = normed @ gate.T
        results[row, :count] = x + (gated / (1 + np.exp(-gated)) * (normed @ up.T)) @ down.T
    return results


OPERATORS = {
    "EmbeddingLookup": embedding_lookup,
    "Head": head,
    "DecoderLayer": decoder_layer,
    "DecoderLayerHalf": decoder_layer,
}


@dataclass
class Declared:
    name: str
    type: str
    shape: list


class Binding:
    """Inputs and outputs at their addresses."""

    def __init__(self):
        self.inputs, self.outputs = {}, {}

    def bind_input(self, name, device, index, dtype, shape, address):
        self.inputs[name] = self._array(dtype, shape, address)

    def bind_output(self, name, device, index, dtype, shape, address):
        self.outputs[name] = self._array(dtype, shape, address)

    def _array(self, dtype, shape, address):
        size = math.prod(shape) * np.dtype(dtype).itemsize
        if not size:
            return np.empty(shape, dtype)
        return np.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype).reshape(shape)


class ReferenceSession:
    """A graph of our own operators, run by numpy."""

    def __init__(self, model: ir.Model):
        self.graph = model.graph
        self.weights = {name: value.const_value.numpy() for name, value in self.graph.initializers.items()}

    def get_inputs(self):
        return [self._declared(value) for value in self.graph.inputs]

    def get_outputs(self):
        return [self._declared(value) for value in self.graph.outputs]

    def _declared(self, value):
        sizes = [size if isinstance(size, int) else str(size) for size in value.shape]
        return Declared(value.name, TYPES[value.dtype], sizes)

    def io_binding(self):
        return Binding()

    def run_with_iobinding(self, binding):
        known = self.weights | binding.inputs
        for node in self.graph:
            attributes = {name: attribute.value for name, attribute in node.attributes.items()}
            given = [known[value.name] for value in node.inputs]
            known[node.outputs[0].name] = OPERATORS[node.op_type](*given, **attributes)
            for before, after in zip(node.inputs[3:5], node.outputs[1:], strict=False):  # keys and values stay in place
                assert binding.outputs[after.name].ctypes.data == known[before.name].ctypes.data
        binding.outputs["logits"][:] = known["logits"]


class ReferenceCpu(Cpu):
    """The processor, with numpy for onnxruntime where a graph is of our own operators."""

    def load(self, graph, threads, *, own_kernels=False):
        return ReferenceSession(ir.load(graph)) if own_kernels else super().load(graph, threads, own_kernels=False)
