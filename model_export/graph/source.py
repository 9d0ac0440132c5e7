"""What the pipeline knows of a model, whoever builds its graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.graph.initializers import Initializers
from model_export.graph.operators import LinearForm
from model_export.graph.quantize import Form
from model_export.sources.vocabulary import Vocabulary
from model_export.sources.weights import Floats


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model that its caller has to know; `layer_weights` counts the weights of all layers' matrices."""

    family: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    layer_weights: int


class Source(Protocol):
    """A source model. `weights` names the form of its matrices, `size` is that of its files of weights in bytes."""

    @property
    def name(self) -> str: ...
    @property
    def organization(self) -> str: ...
    @property
    def weights(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def dimensions(self) -> Dimensions: ...
    @property
    def vocabulary(self) -> Vocabulary: ...

    def build(self, form: Form, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        """The graph with its matrices in `form`; weights go to `data`, `on_layer` hears of each layer."""
        ...

    def build_for_prompts(
        self, layers: LinearForm, form: Form, data: Initializers, on_layer: Callable[[], object]
    ) -> ir.Model:
        """The graph for calls of many positions, of which few get logits: layers in `layers`, embedding in `form`."""
        ...

    def logits(self, tokens: NDArray[np.int64], on_layer: Callable[[], object]) -> Floats:
        """The source's own logits [tokens, vocab] after each of `tokens` [tokens], read as one text, in float32."""
        ...
