"""A Hugging Face directory whose graph mobius-onnx builds and whose logits transformers computes; both need torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.hf_source import read_vocabulary
from model_export.initializers import Initializers
from model_export.mobius_graph import Attention, Translation, key_shape
from model_export.operators import LinearForm, Operators
from model_export.quantize import Form
from model_export.source import Dimensions
from model_export.vocabulary import Vocabulary
from model_export.weights import Floats

# Those that the tests compare with transformers.
FAMILIES = (
    "arcee",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_bigcode",
    "gpt_neox",
    "granite",
    "ministral",
    "nemotron",
    "olmo",
    "olmo2",
    "olmo3",
    "phi",
    "stablelm",
    "starcoder2",
)

_INSTALL = "pip install 'completion-service[families]'"


@dataclass(frozen=True)
class MobiusSource:
    """See Source."""

    directory: Path
    config: dict[str, Any]

    organization = ""

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def weights(self) -> str:
        return str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32")

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.directory, self.config)

    @cached_property
    def dimensions(self) -> Dimensions:
        attention = [node for node in self._graph if node.op_type == "GroupQueryAttention"]
        shapes = {key_shape(node) for node in attention}
        if len(shapes) != 1:
            raise ExportError(f"the layers do not all keep keys of one shape, but of {sorted(shapes)}")
        ((kv_heads, head_dim),) = shapes
        embedding = self._decoder.get_input_embeddings().weight
        return Dimensions(
            family=self.config["model_type"],
            layers=len(attention),
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            context_length=self._decoder.config.max_position_embeddings,
            layer_weights=sum(weight.numel() for weight in self._decoder.parameters()) - embedding.numel(),
        )

    @cached_property
    def _decoder(self) -> Any:
        """The model in transformers, in float32. No code of the directory's own is run and no pickle is opened."""
        transformers = _import("transformers")
        try:
            return transformers.AutoModelForCausalLM.from_pretrained(
                self.directory, dtype="float32", trust_remote_code=False, use_safetensors=True, local_files_only=True
            ).eval()
        except Exception as error:  # of any library below it
            raise ExportError(f"{self.directory} cannot be loaded: {_first_line(error)}") from error

    @cached_property
    def _graph(self) -> ir.Graph:
        mobius = _import("mobius")
        try:
            package = mobius.build(str(self.directory), dtype="f32", execution_provider="cpu", trust_remote_code=False)
        except Exception as error:  # of any library below it
            raise ExportError(f"mobius-onnx cannot build {self.directory}: {_first_line(error)}") from error
        if set(package) != {"model"}:
            raise ExportError(f"{self.directory} has several parts ({', '.join(package)}), not only a decoder of text")
        graph: ir.Graph = package["model"].graph
        return graph

    @cached_property
    def _attentions(self) -> list[Attention]:
        """What each layer attends to, as transformers has it."""
        config, layers = self._decoder.config, self.dimensions.layers
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * layers
        rotations: dict[str, tuple[Floats, Floats] | None] = dict.fromkeys(kinds)
        if set(kinds) <= set(getattr(config, "rope_parameters", None) or {}):
            rotations = {kind: self._rotations(kind) for kind in rotations}
        scales = [module.scaling for module in self._decoder.modules() if hasattr(module, "scaling")]
        return [
            Attention(window if kind == "sliding_attention" else None, scale, rotations[kind])
            for kind, scale in zip(kinds, scales if len(scales) == layers else [None] * layers, strict=True)
        ]

    def _rotations(self, kind: str) -> tuple[Floats, Floats]:
        torch = _import("torch")
        positions = torch.arange(self.dimensions.context_length)[None]
        with torch.inference_mode():
            tables = self._decoder.base_model.rotary_emb(torch.zeros(1), positions, kind)
        # Both halves of a head turn alike.
        cosine, sine = (table[0].chunk(2, dim=-1)[0].contiguous().numpy() for table in tables)
        return cosine, sine

    def build(self, form: Form, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        return self.build_for_prompts(form, form, data, on_layer)

    def build_for_prompts(
        self, layers: LinearForm, form: Form, data: Initializers, on_layer: Callable[[], object]
    ) -> ir.Model:
        operators = Operators(data, layers, form)
        context = self.dimensions.context_length
        return Translation(self._graph, operators, data, self._attentions, context).translate(on_layer)

    def logits(self, tokens: NDArray[np.int64], on_layer: Callable[[], object]) -> Floats:
        torch = _import("torch")
        with torch.inference_mode():
            logits: Floats = self._decoder(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
        for _ in range(self.dimensions.layers):
            on_layer()
        return logits


def read_mobius(directory: Path, config: dict[str, Any]) -> MobiusSource:
    """Opens a directory of one of FAMILIES. Raises ExportError where the extra `families` is not installed."""
    _import("mobius")
    return MobiusSource(directory, config)


def _import(name: str) -> Any:
    """A module of the extra `families`, which most exports do without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"this family of models needs {error.name}: {_INSTALL}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
