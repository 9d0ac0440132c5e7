"""Makes a checkpoint of a Hugging Face directory."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.sources.checkpoint import Architecture, Checkpoint, Origin, split_fused
from model_export.sources.field_types import parse
from model_export.sources.files import looks_like, read_json
from model_export.sources.hugging_face.architecture import read_architecture
from model_export.sources.hugging_face.chat_template import chat_template
from model_export.sources.hugging_face.config import TokenIds, TokenizerSettings
from model_export.sources.hugging_face.directory import Directory
from model_export.sources.panics import reported_as
from model_export.sources.vocabulary import Vocabulary, ends_of_generation
from model_export.sources.weights import LazyTensor, dequantize

MODEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.gate_up_proj": "ffn_gate_up",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# The folder of a model in the hub's cache.
CACHED = re.compile(r"models--(?P<owner>.+?)--(?P<name>.+)")
# The files with the settings of a tokenizer, the newer one first.
TOKENIZER_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
LAYER, GGUF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)"), re.compile(r"blk\.(\d+)\.(.+)")


def read_hugging_face(directory: Directory) -> Checkpoint:
    """The checkpoint in a directory; a tensor is read when it is used."""
    config = directory.config
    architecture = read_architecture(config, directory.entries)
    tensors = {
        _gguf_name(name): tensor
        for name, tensor in _with_prefix(directory.tensors).items()
        if not name.endswith("rotary_emb.inv_freq")
    }
    split_fused(tensors, architecture)
    if architecture.tied_embedding and "output.weight" in tensors:
        embedding, output = tensors.setdefault("token_embd.weight", tensors["output.weight"]), tensors["output.weight"]
        if embedding is output or _equal(embedding, output):
            del tensors["output.weight"]
        else:  # two different matrices in the file are not tied, whatever config.json says
            architecture = replace(architecture, tied_embedding=False)
    return Checkpoint(directory_origin(directory, config), architecture, tensors, partial(_stored_name, architecture))


def _with_prefix(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The tensors as those of a whole model, also where they were saved without its head and its prefix."""
    if not any(name in tensors for name in ("embed_tokens.weight", "layers.0.input_layernorm.weight")):
        return tensors
    return {
        name if name.startswith(("model.", "lm_head.")) else f"model.{name}": each for name, each in tensors.items()
    }


def _equal(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether both are matrices of the same shape and weights."""
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    return all(np.array_equal(dequantize(one.read(rows)), dequantize(other.read(rows))) for rows in one.parts())


def directory_origin(directory: Directory, ids: TokenIds) -> Origin:
    """The name, the tokenizer and the weights' form of a directory whose config.json has the token `ids`."""
    organization, name = _origin_name(directory.path.resolve())
    return Origin(
        path=directory.path,
        name=name,
        organization=organization,
        weights=directory.config.torch_dtype or directory.config.dtype or "float32",
        size=directory.size,
        vocabulary=vocabulary_from_directory(directory.path, ids, directory.generation),
    )


def _origin_name(path: Path) -> tuple[str, str]:
    """The owner and the name of the model in a directory; a snapshot of the hub's cache lies below both."""
    cached = CACHED.fullmatch(path.parent.parent.name) if path.parent.name == "snapshots" else None
    return (cached["owner"], cached["name"]) if cached else ("", path.name)


def _gguf_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if layer := LAYER.fullmatch(module):
        return f"blk.{layer[1]}.{LAYER_NAMES.get(layer[2], layer[2])}.{parameter}"
    return f"{MODEL_NAMES.get(module, module)}.{parameter}"


def _stored_name(architecture: Architecture, name: str) -> str:
    """The name in Hugging Face's files of a tensor with the GGUF `name`."""
    module, _, parameter = name.rpartition(".")
    if module in MODEL_NAMES.values():
        return f"{next(own for own, gguf in MODEL_NAMES.items() if gguf == module)}.{parameter}"
    if (layer := GGUF_LAYER.fullmatch(module)) is None:
        return name
    fused = next((whole for whole, parts in architecture.family.fused.items() if layer[2] in parts), layer[2])
    own = next((own for own, gguf in LAYER_NAMES.items() if gguf == fused), fused)
    return f"model.layers.{layer[1]}.{own}.{parameter}"


def vocabulary_from_directory(directory: Path, config: TokenIds, generation: TokenIds) -> Vocabulary:
    """The tokenizer of a directory, and the special tokens of its configurations.

    Raises ExportError where tokenizer.json is not a tokenizer.
    """
    path = directory / "tokenizer.json"
    try:
        with reported_as(f"{path} is not a tokenizer"):
            tokenizer = Tokenizer.from_file(str(path))
            first = _first_tokens(tokenizer)
    except ExportError as error:
        raise ExportError(f"{error}{looks_like(path)}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if len(first) > 1:
        raise ExportError(f"{path} begins texts with {len(first)} tokens, expected at most one")
    return Vocabulary(
        tokenizer,
        bos=first[0] if first else config.bos_token_id,
        add_bos=bool(first),
        end=tuple(sorted(_ends(directory, tokenizer, config, generation))),
        eos=_eos(directory, tokenizer, config, generation),
        chat_template=chat_template(directory),
    )


def _ends(directory: Path, tokenizer: Tokenizer, config: TokenIds, generation: TokenIds) -> set[int]:
    """The tokens that end a completion: those of generation_config.json, or else of config.json, and the tokenizer's.

    Where none of these files names one, these are the tokens with the name of an end token.
    """
    found = {index for index in (*_declared(config, generation), _own_end(directory, tokenizer)) if index is not None}
    return found or ends_of_generation(tokenizer.get_vocab(with_added_tokens=True), ())


def _declared(config: TokenIds, generation: TokenIds) -> list[int | None]:
    """The end tokens of generation_config.json, or else of config.json."""
    declared = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
    return declared if isinstance(declared, list) else [declared]


def _eos(directory: Path, tokenizer: Tokenizer, config: TokenIds, generation: TokenIds) -> int | None:
    """The token that ends a text: the tokenizer's own, or else the first one of the configuration."""
    ids = (_own_end(directory, tokenizer), *_declared(config, generation))
    return next((index for index in ids if index is not None), None)


def _own_end(directory: Path, tokenizer: Tokenizer) -> int | None:
    """The tokenizer's own end token, if it is in the vocabulary."""
    for name in TOKENIZER_SETTINGS:
        if (directory / name).exists():
            settings = parse(TokenizerSettings, str(directory / name), read_json(directory, name))
            token = settings.eos_token
            if token is not None:
                return tokenizer.token_to_id(token if isinstance(token, str) else token.content)
    return None


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    """The tokens that the tokenizer itself puts before every text, whatever `add_bos_token` in its settings says."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [index for index, _ in itertools.takewhile(lambda pair: pair[1], pairs)]
