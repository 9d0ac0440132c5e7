"""A model whose graph mobius-onnx builds and whose logits transformers computes; both need torch.

transformers reads the source, a Hugging Face directory or a GGUF file. No code that comes with a source is run, and no
pickle is opened.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from gguf import GGUFReader
from numpy.typing import NDArray

from model_export import gguf_decoder
from model_export.errors import ExportError
from model_export.gguf_metadata import Metadata
from model_export.gguf_source import gguf_name, gguf_parts, main_type, open_gguf, vocabulary_of
from model_export.hf_source import read_vocabulary
from model_export.initializers import Initializers
from model_export.mobius_graph import Attention, Translation
from model_export.mobius_nodes import key_shape
from model_export.operators import LinearForm, Operators
from model_export.quantize import Form
from model_export.source import Dimensions
from model_export.vocabulary import Vocabulary
from model_export.weights import Floats

_INSTALL = "pip install 'completion-service[families]'"


@dataclass(frozen=True)
class MobiusSource:
    """See Source. `path` is a directory or a GGUF file of the `family`.

    Raises ExportError where the extra `families` is not installed.
    """

    path: Path
    name: str
    organization: str
    family: str
    weights: str
    vocabulary: Vocabulary

    def __post_init__(self) -> None:
        _import("mobius")

    @cached_property
    def dimensions(self) -> Dimensions:
        attention = [node for node in self._graph if node.op_type == "GroupQueryAttention"]
        shapes = {key_shape(node) for node in attention}
        if len(shapes) != 1:
            raise ExportError(f"the layers do not all keep keys of one shape, but of {sorted(shapes)}")
        ((kv_heads, head_dim),) = shapes
        embedding = self._decoder.get_input_embeddings().weight
        return Dimensions(
            family=self.family,
            layers=len(attention),
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=embedding.shape[0],
            context_length=self._decoder.config.max_position_embeddings,
            layer_weights=sum(weight.numel() for weight in self._decoder.parameters()) - embedding.numel(),
        )

    @cached_property
    def _decoder(self) -> Any:
        """The model of text in transformers, in float32."""
        try:
            model = self._from_directory() if self.path.is_dir() else self._from_file()
        except ExportError:
            raise
        except Exception as error:  # of any library below it
            raise ExportError(f"{self.path} cannot be loaded: {_first_line(error)}") from error
        return _decoder_of_text(model).eval()

    def _from_directory(self) -> Any:
        model, loading = _import("transformers").AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype="float32",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if wrong := sorted(map(str, loading[kind])):
                raise ExportError(f"{self.path} has {kind.replace('_keys', '')} tensors, {wrong[0]} among them")
        return model

    def _from_file(self) -> Any:
        transformers, torch = _import("transformers"), _import("torch")
        reader = open_gguf(self.path)
        rows = next((tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight"), 0)
        config = transformers.AutoConfig.for_model(**gguf_decoder.configuration(Metadata(reader), int(rows)))
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        state = gguf_decoder.state(reader, self.family, list(model.state_dict()))
        tied = ["lm_head.weight"] if "lm_head.weight" not in state else []
        missing, _ = model.load_state_dict({name: torch.tensor(each) for name, each in state.items()}, strict=False)
        if lacking := sorted(set(missing) - set(tied)):
            raise ExportError(f"{self.path} has no tensor {lacking[0]}")
        return model

    @cached_property
    def _graph(self) -> ir.Graph:
        with self._for_mobius() as directory:
            try:
                package = _import("mobius").build(
                    str(directory), dtype="f32", execution_provider="cpu", trust_remote_code=False
                )
            except Exception as error:  # of any library below it
                raise ExportError(f"mobius-onnx cannot build {self.path}: {_first_line(error)}") from error
        if set(package) != {"model"}:
            raise ExportError(f"{self.path} has several parts ({', '.join(package)}), not only a decoder of text")
        graph: ir.Graph = package["model"].graph
        return graph

    @contextmanager
    def _for_mobius(self) -> Iterator[Path]:
        """A directory of the decoder alone: the source itself, unless it has other parts or is a file."""
        if self.path.is_dir() and self.family == self._decoder.config.model_type:
            yield self.path
            return
        with tempfile.TemporaryDirectory() as directory:
            self._decoder.save_pretrained(directory)
            yield Path(directory)

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


def from_directory(path: Path, config: dict[str, Any]) -> MobiusSource:
    """The model of a Hugging Face directory of one of `families.MOBIUS`."""
    kind = config.get("dtype") or config.get("torch_dtype") or "float32"
    vocabulary = read_vocabulary(path, {**config.get("text_config", {}), **config})
    return MobiusSource(path, path.resolve().name, "", config["model_type"], str(kind), vocabulary)


def from_gguf(path: Path, reader: GGUFReader) -> MobiusSource:
    """The model of a GGUF file of one of `families.MOBIUS_GGUF`, its matrices as float32."""
    metadata = Metadata(reader)
    if len(gguf_parts(path)) > 1:
        raise ExportError(f"{path} is in several parts, which this family is not read from; join them first")
    return MobiusSource(
        path,
        name=gguf_name(path),
        organization=metadata.get("general.organization", ""),
        family=metadata.require("general.architecture"),
        weights=main_type(reader.tensors),
        vocabulary=vocabulary_of(metadata),
    )


def _decoder_of_text(model: Any) -> Any:
    """The part of `model` that reads and writes text: all of it, but of one that sees images too."""
    whole = model.base_model
    if not hasattr(whole, "language_model"):
        return model
    decoder = _import("transformers").AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(decoder, decoder.base_model_prefix, whole.language_model)
    decoder.lm_head = model.lm_head
    return decoder


def _import(name: str) -> Any:
    """A module of the extra `families`, which most exports do without."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"this family of models needs {error.name}: {_INSTALL}") from None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
