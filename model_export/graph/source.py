"""What every builder of graphs offers the export pipeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.graph.initializers import Initializers
from model_export.graph.quantize import Activations, Form
from model_export.sources.checkpoint import Origin
from model_export.sources.weights import Floats


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model; `layer_weights` counts the weights of all layers' matrices.

    `table_weights` counts those of the embedding, which is also the output matrix if it is `tied_embedding`, and
    `largest_matrix` those of the largest product of a layer. The last five are 0 where the builder does not know them.
    """

    family: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    layer_weights: int
    hidden_size: int = 0
    rotary_pairs: int = 0
    table_weights: int = 0
    largest_matrix: int = 0
    tied_embedding: bool = False

    @property
    def table_steps(self) -> int:
        """How many layers take about as long to build as the embedding or the output matrix does."""
        return round(self.table_weights * self.layers / max(1, self.layer_weights))

    @property
    def build_steps(self) -> int:
        """How many steps of about the same length `Source.build` has."""
        return self.layers + 2 * self.table_steps


class Source(Protocol):
    """A source model."""

    @property
    def origin(self) -> Origin: ...
    @property
    def dimensions(self) -> Dimensions: ...

    def build(self, form: Form, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        """The graph over onnxruntime's operators, which runs any call; its matrices take the form `form`.

        Writes weights to `data` and calls `on_layer` after each layer, and `table_steps` times after each table.
        """

    def logits(self, tokens: NDArray[np.int64], on_layer: Callable[[], object]) -> Floats:
        """The source's own float32 logits [tokens, vocab] after each of `tokens` [tokens], which are one text."""


@runtime_checkable
class SelectiveSource(Source, Protocol):
    """A source model that need not compute the logits after every token."""

    def logits_at(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], on_layer: Callable[[], object]
    ) -> Floats:
        """The float32 logits [positions, vocab] after those of `tokens` [tokens], one text, that `positions` names."""


@runtime_checkable
class KernelSource(Source, Protocol):
    """A source model that our own operators may compute."""

    def obstacle(self) -> str | None:
        """Why our own operators do not compute it, as a clause; None where they do. Reads no weights."""

    def build_over_kernels(self, kv: Activations, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        """The graph over our own operators, whose KV cache has the type `kv`; calls `on_layer` as `build` does.

        Raises ExportError where they do not compute the model.
        """
