"""The decoder that transformers makes of a source, a Hugging Face directory or a GGUF file, in float32.

No code that comes with a source is run, and no pickle is opened. Nothing is allocated before the source has been found
to hold as many weights as it claims.
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
from model_export.sources.panics import reported_as

_INSTALL = "pip install '.[families]'"
# Tables that a decoder computes for itself; GPT-2's are as large as the square of its context.
_LARGEST_TABLES = 1024 * MIB


def load(read: Directory | GgufModel) -> Any:
    """The model of text of a source. Raises ExportError where its weights are not those of its configuration."""
    path = read.path
    with transformers_reported_as(f"{path} cannot be loaded"):
        whole = _from_file(read) if isinstance(read, GgufModel) else _from_directory(read)
        for name, tensor in whole.state_dict().items():
            if not tensor.isfinite().all():
                raise ExportError(f"{path}: tensor {name} holds a weight that is not finite")
        return _decoder_of_text(whole).eval()


def imported(name: str) -> Any:
    """A module of the extra `families`, which most exports do without. Raises ExportError where it is not installed."""
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
    _check_size(directory, _hollow(config))
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
    for name, found, expected in sorted(loading["mismatched_keys"]):
        raise ExportError(f"{path}: tensor {name} has shape {list(found)}, expected {list(expected)}")
    for kind in ("missing", "unexpected"):
        if wrong := sorted(loading[f"{kind}_keys"]):
            has = "has no tensor" if kind == "missing" else "has a tensor that its family has not,"
            raise ExportError(f"{path} {has} {wrong[0]}")
    return model


def _check_size(directory: Directory, hollow: Any) -> None:
    """Raises ExportError where the model that the configuration describes is larger than the files can fill."""
    path, held = directory.path, sum(math.prod(tensor.shape) for tensor in directory.tensors.values())
    claimed = sum(weight.numel() for weight in hollow.parameters())
    if claimed > held:
        raise ExportError(f"{path}: its configuration makes a model of {claimed} weights, but its files hold {held}")


def _from_file(file: GgufModel) -> Any:
    transformers, torch = imported("transformers"), imported("torch")
    embedding = file.tensors.get("token_embd.weight")
    rows = embedding.shape[0] if embedding and len(embedding.shape) > 1 else 0
    config = transformers.AutoConfig.for_model(**gguf.configuration(file.metadata, rows))
    shapes = {name: tuple(weight.shape) for name, weight in _hollow(config).state_dict().items()}
    state = gguf.state(file, shapes)
    model = _made(config)
    model.load_state_dict({name: torch.tensor(each) for name, each in state.items()}, strict=False)
    return model


def _hollow(config: Any) -> Any:
    """The model without memory for its weights. Raises ExportError where its tables would take too much."""
    with imported("torch").device("meta"):
        model = _made(config)
    tables = sum(each.numel() * each.element_size() for each in model.buffers())
    if tables > _LARGEST_TABLES:
        raise ExportError(f"its configuration needs tables of {tables} bytes, expected at most {_LARGEST_TABLES}")
    return model


def _made(config: Any) -> Any:
    torch = imported("torch")
    return imported("transformers").AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )


def _decoder_of_text(model: Any) -> Any:
    """The part of `model` that reads and writes text: all of it, but of one that sees images too."""
    whole = model.base_model
    if not hasattr(whole, "language_model"):
        return model
    with imported("torch").device("meta"):
        decoder = _made(model.config.text_config)
    setattr(decoder, decoder.base_model_prefix, whole.language_model)
    decoder.lm_head = model.lm_head
    return decoder
