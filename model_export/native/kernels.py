"""Builds the ONNX graph of a checkpoint over our own operators: one for the embedding, each layer, and the head.

The inputs and outputs are those of `native.graph`, which `docs/model-directory.md` describes. Keys and values lie in
tiles of 16 positions, which only the operators look into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

from model_export.errors import ExportError
from model_export.graph.initializers import Initializers
from model_export.graph.interface import Interface
from model_export.graph.operators import Operators
from model_export.graph.quantize import Activations
from model_export.graph.tiles import in_pairs, matrix_obstacle, pack_tiles
from model_export.native.graph import rotary_caches
from model_export.sources.checkpoint import Architecture, Checkpoint
from model_export.sources.weights import LazyTensor, stack_rows

DOMAIN = "completion.kernels"

# The operator of a layer, by the type of its KV cache.
_LAYERS: dict[Activations, str] = {"float16": "DecoderLayerHalf", "float32": "DecoderLayer"}
# The matrices of a layer, those that are multiplied by the same input together.
_PRODUCTS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
# The operators take heads of multiples of so many numbers, up to as many.
_HEAD_STEP, _LARGEST_HEAD = 32, 256


def obstacle(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> str | None:
    """Why our own operators do not compute a model, as a clause; None where they do. Reads no weights.

    `tensors` may lack some, as where only a part of the source is there.
    """
    if (feature := _feature(architecture)) is not None:
        return f"own kernels do not compute {feature}, which this model has"
    reasons = (matrix_obstacle(name, matrix) for name, matrix in _matrices(architecture, tensors))
    return next((reason for reason in reasons if reason is not None), None)


def _matrices(architecture: Architecture, tensors: Mapping[str, LazyTensor]) -> Iterator[tuple[str, LazyTensor]]:
    """The matrices that the operators take, by name."""
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors:
            yield name, tensors[name]
    for layer in range(architecture.layers):
        for parts in _PRODUCTS:
            found = [tensors[name] for part in parts if (name := f"blk.{layer}.{part}.weight") in tensors]
            if len(found) == len(parts):
                yield f"blk.{layer}.{'+'.join(parts)}", stack_rows(found)


def _feature(architecture: Architecture) -> str | None:
    """What of a model our own operators do not compute; None where they compute all of it."""
    family, attention = architecture.family, architecture.attention
    features = {
        "norms of queries and keys": family.qk_norm,
        "biases": bool(architecture.biases),
        "norms after attention and MLP": family.post_norms,
        "GELU": family.gelu,
        "a scaled embedding": family.scaled_embedding,
        "sliding windows": any(layer.window is not None for layer in attention),
        "layers without rotation, or with one of their own": any(
            layer.local or not layer.rotary for layer in attention
        ),
        "heads that rotate in part": 2 * len(architecture.rotary.frequencies) != architecture.head_dim,
        f"heads of {architecture.head_dim} numbers": (
            architecture.head_dim % _HEAD_STEP != 0 or architecture.head_dim > _LARGEST_HEAD
        ),
    }
    return next((name for name, there in features.items() if there), None)


class KernelDecoder:
    """Builds the nodes between the inputs and outputs of `interface`; the KV cache has the type `kv`."""

    def __init__(self, checkpoint: Checkpoint, data: Initializers, kv: Activations) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.architecture
        if (reason := obstacle(self.architecture, checkpoint.tensors)) is not None:
            raise ExportError(f"{reason}; use --kernels stock")
        self._data = data
        self._kv = kv
        self._operators = Operators(data, "float32")
        self.interface = Interface(self._operators)
        self._rotations = rotary_caches(self._operators, self.architecture.rotary, self.architecture.context_length)

    def logits(self, on_layer: Callable[[], object], on_table: Callable[[], object]) -> ir.Value:
        """The logits [R, vocab]. Calls `on_layer` after each layer, `on_table` after embedding and output matrix."""
        table = self._tiles("token_embd.weight", self._matrix("token_embd"))
        on_table()
        hidden = self._apply("EmbeddingLookup", table, self.interface.input_ids)
        for layer in range(self.architecture.layers):
            hidden = self._layer(f"blk.{layer}.", hidden)
            on_layer()
        head = table if self.architecture.tied_embedding else self._tiles("output.weight", self._matrix("output"))
        norm, epsilon = self._vector("output_norm.weight"), self.architecture.norm_epsilon
        logits = self._apply("Head", hidden, norm, head, self.interface.logits_idx, epsilon=epsilon)
        on_table()
        return logits

    def _layer(self, prefix: str, hidden: ir.Value) -> ir.Value:
        architecture, interface = self.architecture, self.interface
        queries_keys_values = stack_rows([self._matrix(f"{prefix}attn_{part}") for part in "qkv"])
        gate_up = in_pairs(self._matrix(f"{prefix}ffn_gate"), self._matrix(f"{prefix}ffn_up"))
        kv_type = ir.DataType.FLOAT16 if self._kv == "float16" else ir.DataType.FLOAT
        past = interface.past(kv_type, architecture.kv_heads, architecture.head_dim)
        hidden, *present = self._operators.apply_many(
            _LAYERS[self._kv],
            hidden,
            self._vector(f"{prefix}attn_norm.weight"),
            self._tiles(f"{prefix}attn_qkv", queries_keys_values),
            *past,
            interface.seqlens_k,
            interface.query_seqlens,
            *self._rotations,
            self._tiles(f"{prefix}attn_output", self._matrix(f"{prefix}attn_output")),
            self._vector(f"{prefix}ffn_norm.weight"),
            self._tiles(f"{prefix}ffn_gate+ffn_up", gate_up),
            self._tiles(f"{prefix}ffn_down", self._matrix(f"{prefix}ffn_down")),
            outputs=3,
            domain=DOMAIN,
            epsilon=architecture.norm_epsilon,
            scale=architecture.score_divisor**-0.5,
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
        )
        interface.extend(past, present)
        return hidden

    def _apply(self, operator: str, *inputs: ir.Value, **attributes: float) -> ir.Value:
        return self._operators.apply(operator, *inputs, domain=DOMAIN, **attributes)

    def _matrix(self, name: str) -> LazyTensor:
        return self.checkpoint.tensor(f"{name}.weight")

    def _tiles(self, name: str, matrix: LazyTensor) -> ir.Value:
        tiles = pack_tiles(name, matrix)
        return self._data.add_rows(name, tiles.shape, tiles.parts())

    def _vector(self, name: str) -> ir.Value:
        return self._operators.vector(name, self.checkpoint.floats(name))
