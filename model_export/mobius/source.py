"""A source whose graph mobius-onnx builds and whose logits transformers computes. Both need torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from model_export.errors import ExportError
from model_export.graph.initializers import Initializers
from model_export.graph.operators import Operators
from model_export.graph.quantize import Form
from model_export.graph.source import Dimensions
from model_export.mobius import decoder
from model_export.mobius.decoder import imported, transformers_reported_as
from model_export.mobius.graph import AttentionOverride, Translation
from model_export.mobius.nodes import key_shape
from model_export.mobius.variants import check_variant
from model_export.sources.checkpoint import Origin
from model_export.sources.field_types import abbreviated, parse
from model_export.sources.gguf.read import GgufModel, gguf_origin
from model_export.sources.hugging_face.config import TokenIds
from model_export.sources.hugging_face.directory import Directory
from model_export.sources.hugging_face.read import directory_origin
from model_export.sources.weights import Floats

# The families whose classes in transformers have windows; the others ignore `sliding_window` of config.json.
_WINDOWS_BY_LAYER = ("gemma2", "gemma3_text", "olmo3")
_WINDOWS_EVERYWHERE = ("starcoder2",)


@dataclass(frozen=True)
class MobiusSource:
    """See Source. `read` is the directory or GGUF file.

    Raises ExportError where the extra `families` is not installed.
    """

    read: Directory | GgufModel
    origin: Origin
    family: str

    def __post_init__(self) -> None:
        imported("mobius")

    @property
    def path(self) -> Path:
        return self.read.path

    @cached_property
    def dimensions(self) -> Dimensions:
        attention = [node for node in self._graph if node.op_type == "GroupQueryAttention"]
        shapes = {key_shape(node) for node in attention}
        if len(shapes) != 1:
            raise ExportError(f"the layers have KV caches of different shapes (heads, head size): {sorted(shapes)}")
        ((kv_heads, head_dim),) = shapes
        embedding = self._decoder.get_input_embeddings().weight
        return Dimensions(
            family=self.family,
            layers=len(attention),
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            context_length=_context(self._decoder.config),
            layer_weights=sum(weight.numel() for weight in self._decoder.parameters()) - embedding.numel(),
        )

    @cached_property
    def _decoder(self) -> Any:
        """The float32 decoder of transformers."""
        return decoder.load(self.read)

    @cached_property
    def _graph(self) -> ir.Graph:
        with self._for_mobius() as directory, transformers_reported_as(f"mobius-onnx cannot build {self.path}"):
            package = imported("mobius").build(
                str(directory), dtype="f32", execution_provider="cpu", trust_remote_code=False
            )
        if set(package) != {"model"}:
            raise ExportError(f"{self.path} has several parts ({', '.join(package)}), expected only a text decoder")
        graph: ir.Graph = package["model"].graph
        return graph

    @contextmanager
    def _for_mobius(self) -> Iterator[Path]:
        """A directory with only the decoder: the source, or a copy if the source has other parts or is a file."""
        if self.path.is_dir() and self.family == self._decoder.config.model_type:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as directory:
            self._decoder.save_pretrained(directory)
            yield Path(directory)

    @cached_property
    def _attentions(self) -> list[AttentionOverride]:
        """The attention of each layer in transformers."""
        config, layers = self._decoder.config, self.dimensions.layers
        window, layer_types = _windows(config, layers)
        rotations: dict[str, tuple[Floats, Floats] | None] = dict.fromkeys(layer_types)
        if set(layer_types) <= set(getattr(config, "rope_parameters", None) or {}):
            rotations = {layer_type: self._rotations(layer_type) for layer_type in rotations}
        scales = [module.scaling for module in self._decoder.modules() if hasattr(module, "scaling")]
        return [
            AttentionOverride(window if layer_type == "sliding_attention" else None, scale, rotations[layer_type])
            for layer_type, scale in zip(layer_types, scales if len(scales) == layers else [None] * layers, strict=True)
        ]

    def _rotations(self, layer_type: str) -> tuple[Floats, Floats]:
        torch = imported("torch")
        positions = torch.arange(self.dimensions.context_length)[None]
        with torch.inference_mode():
            tables = self._decoder.base_model.rotary_emb(torch.zeros(1), positions, layer_type)
        # Both halves of a head have the same rotations.
        cosine, sine = (table[0].chunk(2, dim=-1)[0].contiguous().numpy() for table in tables)
        return cosine, sine

    def build(self, form: Form, data: Initializers, on_layer: Callable[[], object]) -> ir.Model:
        operators = Operators(data, form)
        context = self.dimensions.context_length
        return Translation(self._graph, operators, data, self._attentions, context).translate(on_layer)

    def logits(self, tokens: NDArray[np.int64], on_layer: Callable[[], object]) -> Floats:
        torch = imported("torch")
        with torch.inference_mode():
            logits: Floats = self._decoder(torch.from_numpy(tokens)[None]).logits[0].float().numpy()
        for _ in range(self.dimensions.layers):
            on_layer()
        return logits


def from_directory(directory: Directory) -> MobiusSource:
    """The source in a Hugging Face directory of a family in `families.MOBIUS`."""
    ids = check_configuration(str(directory.path / "config.json"), directory.entries)
    return MobiusSource(directory, directory_origin(directory, ids), directory.config.model_type)


def check_configuration(where: str, entries: Mapping[str, Any]) -> TokenIds:
    """The tokens in a config.json. Raises ExportError where its `entries` ask for a variant that cannot be built."""
    text = entries.get("text_config", {})
    if not isinstance(text, dict):
        raise ExportError(f"{where}: text_config is {abbreviated(text)}, expected an object")
    for part in (entries, {**text, "model_type": f"{entries['model_type']}_text"}):
        check_variant(where, part)
    return parse(TokenIds, where, {**text, **entries})


def from_gguf(model: GgufModel) -> MobiusSource:
    """The source in a GGUF file of a family in `families.MOBIUS_GGUF`, its matrices in float32."""
    if model.parts > 1:
        raise ExportError(f"{model.path} is in several parts, which is not supported for this family; join them first")
    return MobiusSource(model, gguf_origin(model), model.metadata.require("general.architecture"))


def _context(config: Any) -> int:
    """The longest context in which the rotation of a position does not depend on the length of the text."""
    scaling = getattr(config, "rope_parameters", None) or {}
    originals = [
        part["original_max_position_embeddings"]
        for part in (scaling, *scaling.values())
        if isinstance(part, dict) and part.get("rope_type") == "longrope"
    ]
    context: int = min([config.max_position_embeddings, *originals])
    return context


def _windows(config: Any, layers: int) -> tuple[int | None, list[str]]:
    """The window of the layers that have one, and the type of each layer."""
    if config.model_type in _WINDOWS_BY_LAYER:
        return config.sliding_window, config.layer_types
    if config.model_type in _WINDOWS_EVERYWHERE and config.sliding_window:
        return config.sliding_window, ["sliding_attention"] * layers
    return None, ["full_attention"] * layers
