"""Opens a source and chooses the builder of its graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model_export.errors import ExportError
from model_export.graph.source import Source
from model_export.mobius import source as mobius
from model_export.native.kernels import obstacle
from model_export.native.source import DecoderSource
from model_export.sources import families
from model_export.sources.files import read_json
from model_export.sources.gguf.read import GgufModel, open_gguf, open_header, outline, read_gguf
from model_export.sources.gguf.tokenizer import vocabulary_from_metadata
from model_export.sources.hugging_face.architecture import read_architecture
from model_export.sources.hugging_face.config import TokenIds, read_config
from model_export.sources.hugging_face.directory import read_directory
from model_export.sources.hugging_face.read import read_hugging_face, vocabulary_from_directory
from model_export.sources.vocabulary import check_vocabulary


@np.errstate(all="ignore")  # values that are not finite raise ExportError later
def read_source(path: Path) -> Source:
    """Opens a GGUF file or a Hugging Face directory. Raises ExportError where it is damaged or not supported."""
    try:
        source = _open(path)
        check_vocabulary(str(path), source.origin.vocabulary, source.dimensions.vocab_size)
    except ExportError as error:
        if str(path) in str(error):
            raise
        raise ExportError(f"{path}: {error}") from error
    return source


def check_before_download(path: Path, *, own_kernels: bool = False) -> None:
    """Raises ExportError for a source that cannot be exported, as far as can be told without its weights.

    `path` is a GGUF file of which only the header is there, or a directory in which files are missing. With
    `own_kernels` our own operators have to compute it.
    """
    if own_kernels and (reason := _obstacle_before_download(path)) is not None:
        raise ExportError(f"--kernels own cannot be used: {reason}")
    if path.is_file():
        metadata = open_header(path).metadata
        family = metadata.require("general.architecture")
        if family not in (*families.NATIVE_GGUF, *families.MOBIUS_GGUF):
            raise families.refusal(family, {"num_experts": metadata.get(f"{family}.expert_count")}, gguf=True)
        vocabulary = vocabulary_from_metadata(metadata)
        check_vocabulary(path.name, vocabulary, len(metadata.require("tokenizer.ggml.tokens")))
        return
    entries, where = read_json(path, "config.json"), str(path / "config.json")
    config = read_config(where, entries)
    if config.model_type in families.MOBIUS:
        ids = mobius.check_configuration(where, entries)
    else:
        read_architecture(config, entries)
        ids = config
    if (path / "tokenizer.json").exists():
        vocabulary_from_directory(path, ids, TokenIds())


@np.errstate(all="ignore")  # where only the header is there, the factors of rotary frequencies are zeros
def _obstacle_before_download(path: Path) -> str | None:
    """Why our own operators do not compute a source, as far as can be told without its weights."""
    if not path.is_file():
        return "own kernels take the blocks of GGUF files, and this is a directory of safetensors"
    header = open_header(path)
    family = header.metadata.require("general.architecture")
    if family not in families.NATIVE_GGUF:  # refused, or built by mobius-onnx
        return None if family not in families.MOBIUS_GGUF else built_by_mobius(family)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    return obstacle(*outline(GgufModel(path, 1, header.size, header.metadata, tensors)))


def built_by_mobius(family: str) -> str:
    """Why our own operators do not compute a family that mobius-onnx builds, as a clause."""
    return f"mobius-onnx builds the family {family}, and not over own kernels"


def _open(path: Path) -> Source:
    if path.is_file():
        model = open_gguf(path)
        by_mobius = model.metadata.get("general.architecture") in families.MOBIUS_GGUF
        return mobius.from_gguf(model) if by_mobius else DecoderSource(read_gguf(model))
    if path.is_dir():
        directory = read_directory(path)
        by_mobius = directory.config.model_type in families.MOBIUS
        return mobius.from_directory(directory) if by_mobius else DecoderSource(read_hugging_face(directory))
    if path.exists():
        raise ExportError(f"{path} is neither a plain file nor a directory")
    raise ExportError(f"{path} does not exist{', it is a link that leads nowhere' if path.is_symlink() else ''}")
