"""What every source is read into: the architecture, its tensors under GGUF names, and the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from model_export.errors import ExportError
from model_export.sources.families import Family
from model_export.sources.rotary import Rotary
from model_export.sources.vocabulary import Vocabulary
from model_export.sources.weights import Floats, LazyTensor, Matrix, dequantize, is_finite


@dataclass(frozen=True)
class LayerAttention:
    """How one layer attends.

    To the last `window` positions, its own included, or to all where that is None; with queries and keys rotated by
    their positions, or without where `rotary` is false.
    """

    window: int | None = None
    rotary: bool = True


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama shape.

    `attention` holds each layer's; `biases` names the linear maps of a layer that have one.
    """

    family: Family
    attention: tuple[LayerAttention, ...]
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    rotary: Rotary
    tied_embedding: bool
    biases: frozenset[str] = frozenset()

    @property
    def layers(self) -> int:
        return len(self.attention)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor that the architecture has."""
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, self.hidden_size),
            "output_norm.weight": (self.hidden_size,),
        }
        if not self.tied_embedding:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        for layer in range(self.layers):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, query, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (query, hidden),
            "attn_k.weight": (kv, hidden),
            "attn_v.weight": (kv, hidden),
            "attn_output.weight": (hidden, query),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (self.intermediate_size, hidden),
            "ffn_up.weight": (self.intermediate_size, hidden),
            "ffn_down.weight": (hidden, self.intermediate_size),
        }
        shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in self.biases}
        if self.family.qk_norm:
            shapes |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        return shapes


@dataclass(frozen=True)
class Checkpoint:
    """A source model: exactly the tensors of its architecture, each of the right shape.

    `weights` names the form of the source's matrices, `size` is that of its files of weights in bytes. Raises
    ExportError for a missing, extra or misshapen tensor.
    """

    name: str
    organization: str
    weights: str
    size: int
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        if not np.isfinite(self.architecture.rotary.frequencies).all():
            raise ExportError(f"{self.name}: the rotary frequencies are not finite")
        expected = self.architecture.tensor_shapes()
        for name, shape in expected.items():
            if name not in self.tensors:
                raise ExportError(f"{self.name} has no tensor {name}")
            if self.tensors[name].shape != shape:
                found = list(self.tensors[name].shape)
                raise ExportError(f"{self.name}: tensor {name} has shape {found}, expected {list(shape)}")
        if extra := sorted(self.tensors.keys() - expected.keys()):
            raise ExportError(
                f"{self.name} has a tensor {extra[0]}, which a {self.architecture.family.name} model has not"
            )

    def matrix(self, name: str) -> Matrix:
        """The matrix `name` in the form in which the source holds it. Raises ExportError where it is not finite."""
        with np.errstate(all="ignore"):
            matrix = self.tensors[name].load()
        if not is_finite(matrix):
            raise ExportError(f"{self.name}: tensor {name} holds a weight that is not finite")
        return matrix

    def floats(self, name: str) -> Floats:
        """The tensor `name` as float32."""
        return dequantize(self.matrix(name))


def split_fused(tensors: dict[str, LazyTensor], architecture: Architecture) -> None:
    """Replaces each matrix that holds several of a layer's below one another by those."""
    shapes = architecture.tensor_shapes()
    for layer in range(architecture.layers):
        for fused, names in architecture.family.fused.items():
            if (tensor := tensors.pop(f"blk.{layer}.{fused}.weight", None)) is None:
                continue
            rows = {name: shapes[name][0] for name in (f"blk.{layer}.{each}.weight" for each in names)}
            if tensor.shape[0] != sum(rows.values()):
                found = f"has {tensor.shape[0]} rows, expected {sum(rows.values())}"
                raise ExportError(f"tensor blk.{layer}.{fused}.weight {found}")
            start = 0
            for name, size in rows.items():
                tensors[name] = tensor.rows(start, start + size)
                start += size
