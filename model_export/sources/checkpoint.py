"""The common form of every source: the architecture, its tensors under GGUF names, and the tokenizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from model_export.errors import ExportError
from model_export.sources.families import Family
from model_export.sources.rotary import Rotary
from model_export.sources.vocabulary import Vocabulary
from model_export.sources.weights import Floats, LazyTensor, Matrix, dequantize, is_finite


@dataclass(frozen=True)
class LayerAttention:
    """The attention of one layer.

    A token attends to the last `window` positions up to and including its own, or to all if `window` is None. Queries
    and keys are rotated by their positions if `rotary`: by the architecture's `local_rotary` if `local`.
    """

    window: int | None = None
    rotary: bool = True
    local: bool = False


@dataclass(frozen=True)
class Architecture:
    """A decoder of the Llama architecture.

    `attention` has one entry per layer; `biases` names the linear maps of a layer that have a bias. Scores are divided
    by the square root of `score_divisor`.
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
    score_divisor: int
    biases: frozenset[str] = frozenset()
    local_rotary: Rotary | None = None

    @property
    def layers(self) -> int:
        return len(self.attention)

    @property
    def embedding_scale(self) -> float:
        return math.sqrt(self.hidden_size) if self.family.scaled_embedding else 1.0

    def rotation(self, attention: LayerAttention) -> Rotary | None:
        """How a layer rotates queries and keys."""
        if not attention.rotary:
            return None
        return self.local_rotary if attention.local else self.rotary

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of the architecture, by name."""
        hidden, query, kv = self.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        in_layer: dict[str, tuple[int, ...]] = {
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
        in_layer |= {f"{name}.bias": in_layer[f"{name}.weight"][:1] for name in self.biases}
        if self.family.qk_norm:
            in_layer |= {"attn_q_norm.weight": (self.head_dim,), "attn_k_norm.weight": (self.head_dim,)}
        if self.family.post_norms:
            in_layer |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, hidden),
            "output_norm.weight": (hidden,),
        }
        if not self.tied_embedding:
            shapes["output.weight"] = (self.vocab_size, hidden)
        for layer in range(self.layers):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in in_layer.items()}
        return shapes


@dataclass(frozen=True)
class Origin:
    """What every source has, whatever its architecture. It lies at `path`.

    `weights` names the form of the source's matrices, `size` is that of its weight files in bytes.
    """

    path: Path
    name: str
    organization: str
    weights: str
    size: int
    vocabulary: Vocabulary


@dataclass(frozen=True)
class Checkpoint:
    """A source model: exactly the tensors of its architecture, each of the right shape.

    `stored_name` is the name in the source of a tensor that has this name here. Raises ExportError for a missing
    tensor, an extra one, or one of another shape.
    """

    origin: Origin
    architecture: Architecture
    tensors: Mapping[str, LazyTensor]
    stored_name: Callable[[str], str] = str

    def __post_init__(self) -> None:
        if not np.isfinite(self.architecture.rotary.frequencies).all():
            raise ExportError(f"{self.origin.path}: the rotary frequencies are not finite")
        expected = self.architecture.tensor_shapes()
        extra = sorted(self.tensors.keys() - expected.keys())
        family = self.architecture.family.name
        unused = f"a tensor {self.stored_name(extra[0])}, which a {family} model does not have" if extra else ""
        for name, shape in expected.items():
            stored = self.stored_name(name)
            if name not in self.tensors:
                raise ExportError(f"{self.origin.path} has no tensor {stored}{', but ' if extra else ''}{unused}")
            if self.tensors[name].shape != shape:
                actual = list(self.tensors[name].shape)
                raise ExportError(f"{self.origin.path}: tensor {stored} has shape {actual}, expected {list(shape)}")
        if extra:
            raise ExportError(f"{self.origin.path} has {unused}")

    def tensor(self, name: str) -> LazyTensor:
        """The tensor `name` in the form that it has in the source.

        Reading a part of it raises ExportError where a weight of that part is not finite.
        """
        tensor = self.tensors[name]

        def read(rows: slice) -> Matrix:
            with np.errstate(all="ignore"):
                matrix = tensor.read(rows)
            if not is_finite(matrix):
                raise ExportError(
                    f"{self.origin.path}: tensor {self.stored_name(name)} holds a weight that is not finite"
                )
            return matrix

        return replace(tensor, read=read)

    def floats(self, name: str) -> Floats:
        """The tensor `name` as float32."""
        return dequantize(self.tensor(name).load())


def split_fused(tensors: dict[str, LazyTensor], architecture: Architecture) -> None:
    """Splits each fused matrix of a layer into the matrices that it stacks."""
    shapes = architecture.tensor_shapes()
    for layer in range(architecture.layers):
        for fused, names in architecture.family.fused.items():
            if (tensor := tensors.pop(f"blk.{layer}.{fused}.weight", None)) is None:
                continue
            rows = {name: shapes[name][0] for name in (f"blk.{layer}.{part}.weight" for part in names)}
            if tensor.shape[0] != sum(rows.values()):
                raise ExportError(
                    f"tensor blk.{layer}.{fused}.weight has {tensor.shape[0]} rows, expected {sum(rows.values())}"
                )
            start = 0
            for name, size in rows.items():
                tensors[name] = tensor.rows(start, start + size)
                start += size
