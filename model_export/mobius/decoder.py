"""Loads a Hugging Face directory or a GGUF file as a float32 decoder of transformers.

No code that comes with a source is run, and no pickle is opened. Nothing is allocated before a check that the source
holds as many weights as it claims.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from model_export.errors import ExportError
from model_export.mobius import gguf
from model_export.sources.files import MIB
from model_export.sources.gguf.read import GgufModel
from model_export.sources.hugging_face.directory import Directory
from model_export.sources.hugging_face.shards import UNREAD
from model_export.sources.panics import reported_as

_INSTALL = "pip install '.[families]'"
# The most bytes of tables that a decoder computes for itself; GPT-2's have the square of its context length.
_LARGEST_TABLES = 1024 * MIB


def load(read: Directory | GgufModel) -> Any:
    """The decoder of a source. Raises ExportError where its weights do not fit its configuration."""
    path = read.path
    with transformers_reported_as(f"{path} cannot be loaded"):
        model = _from_file(read) if isinstance(read, GgufModel) else _from_directory(read)
        for name, tensor in model.state_dict().items():
            if not tensor.isfinite().all():
                raise ExportError(f"{path}: tensor {name} holds a weight that is not finite")
        return _decoder_of_text(model).eval()


def imported(name: str) -> Any:
    """A module of the extra `families`, which few exports need. Raises ExportError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"this family of models needs {error.name}: {_INSTALL}") from None


@contextmanager
def transformers_reported_as(message: str) -> Iterator[None]:
    """The same as `reported_as`, with the log, progress bars and warnings of transformers turned off."""
    transformers = imported("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(), reported_as(message):
        warnings.simplefilter("ignore")
        yield


def _from_directory(directory: Directory) -> Any:
    transformers, path = imported("transformers"), directory.path
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    _check_size(directory, _without_memory(config))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype="float32",
        attn_implementation="eager",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    for name, actual, expected in sorted(loading["mismatched_keys"]):
        raise ExportError(f"{path}: tensor {name} has shape {list(actual)}, expected {list(expected)}")
    if missing := sorted(loading["missing_keys"]):
        raise ExportError(f"{path} has no tensor {missing[0]}")
    if unexpected := sorted(name for name in loading["unexpected_keys"] if not UNREAD.fullmatch(name)):
        raise ExportError(f"{path} has a tensor that its family does not have, {unexpected[0]}")
    return model


def _check_size(directory: Directory, model: Any) -> None:
    """Raises ExportError where `model`, which the configuration describes, has more weights than the files."""
    path, held = directory.path, sum(math.prod(tensor.shape) for tensor in directory.tensors.values())
    claimed = sum(weight.numel() for weight in model.parameters())
    if claimed > held:
        raise ExportError(f"{path}: its configuration claims a model of {claimed} weights, but its files hold {held}")


def _from_file(file: GgufModel) -> Any:
    transformers, torch = imported("transformers"), imported("torch")
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding and len(embedding.shape) > 1 else 0
    config = transformers.AutoConfig.for_model(**gguf.configuration(file.metadata, rows))
    shapes = {name: tuple(weight.shape) for name, weight in _without_memory(config).state_dict().items()}
    state = gguf.state(file, shapes)
    model = _from_config(config)
    model.load_state_dict({name: torch.tensor(values) for name, values in state.items()}, strict=False)
    return model


def _without_memory(config: Any) -> Any:
    """The model without memory for its weights. Raises ExportError where its tables would take too much memory."""
    with imported("torch").device("meta"):
        model = _from_config(config)
    tables = sum(table.numel() * table.element_size() for table in model.buffers())
    if tables > _LARGEST_TABLES:
        raise ExportError(f"its configuration needs tables of {tables} bytes, expected at most {_LARGEST_TABLES}")
    return model


def _from_config(config: Any) -> Any:
    torch = imported("torch")
    return imported("transformers").AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )


def _decoder_of_text(model: Any) -> Any:
    """The text decoder within `model`: all of it, unless the model also reads images."""
    base = model.base_model
    if not hasattr(base, "language_model"):
        return model
    with imported("torch").device("meta"):
        decoder = _from_config(model.config.text_config)
    setattr(decoder, decoder.base_model_prefix, base.language_model)
    decoder.lm_head = model.lm_head
    return decoder
