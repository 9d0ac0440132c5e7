"""A small decoder over the operators of the kernel library, or over the same computed with NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

import kernels
from tests.support.reference_kernels import ReferenceSession

DOMAIN = "completion.kernels"
EPSILON = 1e-5
TILE = 16

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Matrix:
    """Random weights [outputs, inputs] in blocks: as the library stores them, and as numbers."""

    tiles: Bytes
    weights: Floats


def matrix(random: np.random.Generator, kind: str, outputs: int, inputs: int) -> Matrix:
    """A matrix of blocks of the type `kind`; its numbers have about the size of a trained model's."""
    bits = 8 if kind == "q8_0" else 4
    codes = random.integers(0, 1 << bits, (outputs, inputs // 32, 32), dtype=np.uint8)
    scales = (random.uniform(0.5, 1.5, (outputs, inputs // 32)) * 2 / (1 << bits) / inputs**0.5).astype(np.float16)
    minimums = (-scales * random.uniform(6, 9, scales.shape)).astype(np.float16)
    offsets = {"q4_0": -8 * scales.astype(np.float32), "q8_0": -128 * scales.astype(np.float32)}
    offset = offsets.get(kind, minimums.astype(np.float32))
    weights = scales.astype(np.float32)[..., None] * codes + offset[..., None]
    return Matrix(tiles(kind, codes, scales, minimums), weights.reshape(outputs, inputs).astype(np.float32))


def tiles(kind: str, codes: Bytes, scales: NDArray[np.float16], minimums: NDArray[np.float16]) -> Bytes:
    """The tiles [outputs / 32, inputs / 32, bytes] as kernels/src/blocks.h describes them, byte by byte."""
    outputs, blocks = scales.shape
    stored = []
    for tile in range(outputs // 32):
        rows = slice(tile * 32, tile * 32 + 32)
        for block in range(blocks):
            code = codes[rows, block]
            parts = [
                code[:, 4 * j : 4 * j + 4]
                if kind == "q8_0"
                else code[:, 4 * j : 4 * j + 4] | code[:, 16 + 4 * j : 20 + 4 * j] << 4
                for j in range(8 if kind == "q8_0" else 4)
            ]
            halves = np.array([scales[rows, block], *([minimums[rows, block]] if kind == "q4_1" else [])])
            stored.append(np.concatenate([*(part.ravel() for part in parts), halves.view(np.uint8).ravel()]))
    return np.array(stored).reshape(outputs // 32, blocks, -1)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder."""

    hidden: int = 96
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 160
    layers: int = 2
    vocabulary: int = 64
    positions: int = 512
    # Of qkv, output, gate-up and down, and of the table.
    kinds: tuple[str, str, str, str, str] = ("q4_1", "q4_1", "q4_0", "q8_0", "q8_0")


@dataclass
class Decoder:
    """The weights of a small decoder."""

    sizes: Sizes
    random: np.random.Generator
    table: Matrix = field(init=False)
    norms: Floats = field(init=False)
    layers: list[dict[str, Matrix]] = field(init=False)

    def __post_init__(self) -> None:
        s = self.sizes
        width = (s.heads + 2 * s.kv_heads) * s.head_dim
        shapes = {
            "qkv": (width, s.hidden),
            "output": (s.hidden, s.heads * s.head_dim),
            "gate_up": (2 * s.mlp, s.hidden),
            "down": (s.hidden, s.mlp),
        }
        self.layers = [
            {name: matrix(self.random, kind, *shapes[name]) for name, kind in zip(shapes, s.kinds[:-1], strict=True)}
            for _ in range(s.layers)
        ]
        self.table = matrix(self.random, s.kinds[-1], s.vocabulary, s.hidden)
        self.norms = self.random.uniform(0.5, 2, (2 * s.layers + 1, s.hidden)).astype(np.float32)
        angles = np.outer(np.arange(s.positions), 10000.0 ** (-np.arange(s.head_dim // 2) / (s.head_dim // 2)))
        self.cos, self.sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def graph(self, *, half: bool) -> ir.Model:
        """The ONNX graph over the operators."""
        s, initializers, nodes = self.sizes, [], []

        def constant(name: str, values: NDArray[np.generic]) -> ir.Value:
            value = ir.val(name, const_value=ir.tensor(values, name=name))
            initializers.append(value)
            return value

        def add(kind: str, inputs: Sequence[ir.Value], outputs: int = 1, **attributes: float) -> Sequence[ir.Value]:
            nodes.append(ir.node(kind, inputs, attributes, domain=DOMAIN, num_outputs=outputs))
            return nodes[-1].outputs

        floats = ir.DataType.FLOAT16 if half else ir.DataType.FLOAT
        ids = ir.val("input_ids", ir.DataType.INT64, ["B", "S"])
        seqlens = [ir.val(name, ir.DataType.INT32, ["B"]) for name in ("seqlens_k", "query_seqlens")]
        wanted = ir.val("logits_idx", ir.DataType.INT64, ["R"])
        table, cos, sin = constant("table", self.table.tiles), constant("cos", self.cos), constant("sin", self.sin)
        (hidden,) = add("EmbeddingLookup", [table, ids])
        inputs, outputs = [ids, *seqlens, wanted], []
        for index, layer in enumerate(self.layers):
            shape = ["B", s.kv_heads, "max_len", s.head_dim]
            past = [ir.val(f"past_{part}.{index}", floats, shape) for part in ("key", "value")]
            stored = {name: constant(f"{name}.{index}", values.tiles) for name, values in layer.items()}
            norms = [constant(f"norm.{2 * index + i}", self.norms[2 * index + i]) for i in range(2)]
            hidden, *present = add(
                "DecoderLayerHalf" if half else "DecoderLayer",
                [
                    *(hidden, norms[0], stored["qkv"], *past, *seqlens, cos, sin),
                    *(stored["output"], norms[1], stored["gate_up"], stored["down"]),
                ],
                outputs=3,
                epsilon=EPSILON,
                scale=s.head_dim**-0.5,
                kv_heads=s.kv_heads,
                head_dim=s.head_dim,
            )
            for part, value in zip(("key", "value"), present, strict=True):
                value.name, value.dtype, value.shape = f"present_{part}.{index}", floats, ir.Shape(shape)
            inputs += past
            outputs += present
        (logits,) = add("Head", [hidden, constant("norm.last", self.norms[-1]), table, wanted], epsilon=EPSILON)
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["R", s.vocabulary])
        opsets = {"": 21, DOMAIN: 1}
        graph = ir.Graph(inputs, [logits, *outputs], nodes=nodes, initializers=initializers, opset_imports=opsets)
        return ir.Model(graph, ir_version=10)

    def expected(self, tokens: Sequence[int], *, half: bool) -> Floats:
        """The logits after each of the tokens, in float arithmetic; the cache holds float16 numbers if `half`."""
        return Running(self, half=half, session=ReferenceSession(self.graph(half=half))).step([tokens], [0])[0]


class Running:
    """A decoder's session, with a cache of some slots."""

    def __init__(self, decoder: Decoder, *, half: bool, session: Any, slots: int = 8) -> None:
        self.sizes, self.slots, self.session = decoder.sizes, slots, session
        s = self.sizes
        kind = np.float16 if half else np.float32
        # Garbage where nothing was written: nobody may read it.
        self.cache = np.full((s.layers, 2, slots, s.positions // TILE, s.kv_heads, TILE * s.head_dim), np.nan, kind)

    def step(self, rows: Sequence[Sequence[int]], past: Sequence[int], slot: int = 0, width: int = 0) -> list[Floats]:
        """Extends slots `slot`.. by the tokens of the rows behind `past`; the logits after each token of each row."""
        width = max(width, *(len(row) for row in rows), 1)
        ids = np.zeros((len(rows), width), np.int64)
        for row, tokens in enumerate(rows):
            ids[row, : len(tokens)] = tokens
        lengths = np.array([len(row) for row in rows], np.int32)
        wanted = np.array([row * width + i for row in range(len(rows)) for i in range(lengths[row])], np.int64)
        logits = np.zeros((len(wanted), self.sizes.vocabulary), np.float32)
        binding = self.session.io_binding()
        inputs: dict[str, NDArray[Any]] = {  # in memory until the call is over
            "input_ids": ids,
            "seqlens_k": (np.array(past) + lengths - 1).astype(np.int32),
            "query_seqlens": lengths,
            "logits_idx": wanted,
        }
        for name, values in inputs.items():
            binding.bind_input(name, "cpu", 0, values.dtype.type, values.shape, values.ctypes.data)
        shape = (len(rows), self.sizes.kv_heads, self.sizes.positions, self.sizes.head_dim)
        for layer in range(self.sizes.layers):
            for part, name in enumerate(("key", "value")):
                place = self.cache[layer, part, slot:].ctypes.data
                binding.bind_input(f"past_{name}.{layer}", "cpu", 0, self.cache.dtype.type, shape, place)
                binding.bind_output(f"present_{name}.{layer}", "cpu", 0, self.cache.dtype.type, shape, place)
        binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self.session.run_with_iobinding(binding)
        return np.split(logits, np.cumsum(lengths)[:-1])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first positions of a slot, in whole tiles; what lies behind them becomes garbage."""
        whole = -(-length // TILE)
        self.cache[:, :, target] = np.nan
        self.cache[:, :, target, :whole] = self.cache[:, :, source, :whole]


def over_library(decoder: Decoder, *, half: bool, threads: int, slots: int = 8, in_float: bool = False) -> Running:
    """The decoder over the library's operators."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry(f"{DOMAIN}.threads", str(threads))
    options.add_session_config_entry(f"{DOMAIN}.float", str(int(in_float)))
    library = kernels.library()
    assert library is not None
    options.register_custom_ops_library(str(library))
    graph = ir.serde.serialize_model(decoder.graph(half=half)).SerializeToString()
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return Running(decoder, half=half, session=session, slots=slots)
