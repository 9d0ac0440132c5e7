"""A checkpoint of a Llama-like family as a Source, built and computed without torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.graph.initializers import Initializers
from model_export.graph.operators import Operators
from model_export.graph.quantize import Activations, Form
from model_export.graph.source import Dimensions
from model_export.native.graph import Decoder
from model_export.native.kernels import KernelDecoder, obstacle
from model_export.native.reference import reference_logits
from model_export.sources.checkpoint import Checkpoint, Origin
from model_export.sources.weights import Floats


@dataclass(frozen=True)
class DecoderSource:
    """See Source."""

    checkpoint: Checkpoint

    @property
    def origin(self) -> Origin:
        return self.checkpoint.origin

    @property
    def dimensions(self) -> Dimensions:
        architecture, tensors = self.checkpoint.architecture, self.checkpoint.tensors
        return Dimensions(
            family=architecture.family.name,
            layers=architecture.layers,
            kv_heads=architecture.kv_heads,
            head_dim=architecture.head_dim,
            vocab_size=architecture.vocab_size,
            context_length=architecture.context_length,
            layer_weights=sum(math.prod(tensor.shape) for name, tensor in tensors.items() if name.startswith("blk.")),
            hidden_size=architecture.hidden_size,
            rotary_pairs=sum(
                len(rotary.frequencies) for rotary in (architecture.rotary, architecture.local_rotary) if rotary
            ),
            table_weights=architecture.vocab_size * architecture.hidden_size,
            largest_matrix=2 * architecture.intermediate_size * architecture.hidden_size,
            tied_embedding=architecture.tied_embedding,
        )

    def build(self, form: Form, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        return self._model(Decoder(self.checkpoint, Operators(data, form)), data, on_layer)

    def obstacle(self) -> str | None:
        return obstacle(self.checkpoint.architecture, self.checkpoint.tensors)

    def build_over_kernels(self, kv: Activations, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        return self._model(KernelDecoder(self.checkpoint, data, kv), data, on_layer)

    def _model(self, decoder: Decoder | KernelDecoder, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        def on_table() -> None:
            for _ in range(self.dimensions.table_steps):
                on_layer()

        logits = decoder.logits(on_layer, on_table)
        return decoder.interface.model(logits, self.dimensions.vocab_size, data, self.origin.name)

    def logits(self, tokens: NDArray[np.int64], on_layer: Callable[[], object]) -> Floats:
        return reference_logits(self.checkpoint, tokens, on_layer)

    def logits_at(
        self, tokens: NDArray[np.int64], positions: NDArray[np.int64], on_layer: Callable[[], object]
    ) -> Floats:
        return reference_logits(self.checkpoint, tokens, on_layer, positions)
