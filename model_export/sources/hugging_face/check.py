"""Checks a Hugging Face directory before anything of it is used; its code, pickles and templates never are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import Strict
from safetensors import SafetensorError, safe_open

from model_export.errors import ExportError
from model_export.sources import bounds
from model_export.sources.bounds import check, check_heads, check_rotation, shown
from model_export.sources.files import MIB, plain_file, read_json

INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
LARGEST_INDEX, LARGEST_TOKENIZER = 64 * MIB, 512 * MIB

# Every name that some family has for it; what a family needs and has not is named where it is read.
NUMBERS: dict[str, Any] = {
    "num_hidden_layers": bounds.Layers,
    "n_layer": bounds.Layers,
    "hidden_size": bounds.Hidden,
    "n_embd": bounds.Hidden,
    "intermediate_size": bounds.Intermediate,
    "num_attention_heads": bounds.Heads,
    "n_head": bounds.Heads,
    "vocab_size": bounds.VocabSize,
    "max_position_embeddings": bounds.Context,
    "n_positions": bounds.Context,
    "rms_norm_eps": bounds.Epsilon,
    "layer_norm_epsilon": bounds.Epsilon,
    "model_type": bounds.Text,
}
# These may be null as well, which means the usual.
OPTIONAL: dict[str, Any] = {
    "n_inner": bounds.Intermediate,
    "num_key_value_heads": bounds.Heads,
    "head_dim": bounds.HeadDim,
    "sliding_window": bounds.Window,
    "use_sliding_window": bounds.Flag,
    "tie_word_embeddings": bounds.Flag,
    "rope_theta": bounds.RotaryBase,
    "rope_local_base_freq": bounds.RotaryBase,
    "partial_rotary_factor": Annotated[float, bounds.Real(0.0, 1.0)],
    "query_pre_attn_scalar": bounds.Scale,
    "attn_logit_softcapping": bounds.Scale,
    "final_logit_softcapping": bounds.Scale,
    "torch_dtype": bounds.Text,
    "dtype": bounds.Text,
    "original_max_position_embeddings": bounds.Context,
    "max_window_layers": Annotated[int, bounds.Whole(0, bounds.MOST_LAYERS)],
    "layer_types": bounds.Texts,
    "no_rope_layers": Annotated[
        list[Annotated[int, bounds.Whole(0, 1)]], Strict(), bounds.Expected(f"a list, each of {bounds.Whole(0, 1)}")
    ],
    "no_rope_layer_interval": bounds.Layers,
    "hidden_act": bounds.Text,
    "attention_bias": bounds.Flag,
    "attention_out_bias": bounds.Flag,
    "mlp_bias": bounds.Flag,
    "text_config": Annotated[dict[str, Any], Strict(), bounds.Expected("an object")],
    "rope_scaling": Annotated[dict[str, Any], Strict(), bounds.Expected("an object")],
    "rope_parameters": Annotated[dict[str, Any], Strict(), bounds.Expected("an object")],
}
ROTARY: dict[str, Any] = {
    "rope_type": bounds.Text,
    "type": bounds.Text,
    "rope_theta": bounds.RotaryBase,
    "partial_rotary_factor": Annotated[float, bounds.Real(0.0, 1.0)],
    "factor": bounds.Scale,
    "attention_factor": bounds.Scale,
    "beta_fast": bounds.Scale,
    "beta_slow": bounds.Scale,
    "truncate": bounds.Flag,
    "mscale": Annotated[float, bounds.Real(0.0, bounds.SCALE.high)],
    "short_factor": bounds.Scales,
    "long_factor": bounds.Scales,
    "low_freq_factor": bounds.Scale,
    "high_freq_factor": bounds.Scale,
    "original_max_position_embeddings": bounds.Context,
}
# What makes transformers open other files, or code of a hub; and what else the entry may say.
CODE: dict[str, tuple[object, ...]] = {
    "transformers_weights": (),
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager", "sdpa"),
    "_attn_implementation_internal": ("eager", "sdpa"),
    "experts_implementation": (),
    "_experts_implementation": (),
    "_experts_implementation_internal": (),
}
ADAPTER = "adapter_config.json"
FLOAT_TYPES = ("F32", "F16", "BF16")
# Tables that old files hold and nobody reads.
UNREAD = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")
TOKEN = Annotated[int, bounds.Whole(0, bounds.MOST_TOKENS - 1)]


def check_hugging_face(directory: Path) -> None:
    """Raises ExportError unless `directory` holds a configuration, whole safetensors and a tokenizer's file."""
    path = directory / "config.json"
    config = read_json(directory, path.name)
    for part in (config, config.get("text_config"), config.get("vision_config")):
        if isinstance(part, dict):
            check_config(str(path), part)
    if (directory / ADAPTER).exists():
        raise ExportError(f"{directory} holds an adapter ({ADAPTER}); merge it into its model first")
    _check_weights(directory)
    if not (directory / "tokenizer.json").exists():
        raise ExportError(f"{directory / 'tokenizer.json'} does not exist; a slow tokenizer has to be converted first")
    plain_file(directory, "tokenizer.json", LARGEST_TOKENIZER)
    generation = directory / "generation_config.json"
    if generation.exists():
        _check_tokens(str(generation), read_json(directory, generation.name))


def check_config(where: str, config: dict[str, Any]) -> None:
    """Raises ExportError where a configuration's number is none, or out of all bounds, or does not fit another."""
    for name, kind in NUMBERS.items():
        if name in config:
            check(f"{where}: {name}", config[name], kind)
    for name, kind in OPTIONAL.items():
        if config.get(name) is not None:
            check(f"{where}: {name}", config[name], kind)
    for name in ("rope_scaling", "rope_parameters"):
        _check_rotary(f"{where}: {name}", config.get(name) or {})
    for name, harmless in CODE.items():
        if (value := config.get(name)) is not None and value not in harmless:
            raise ExportError(f"{where}: {name} is {shown(value)}, which may name other files or code; remove it")
    _check_tokens(where, config)
    if method := config.get("quantization_config") or config.get("compression_config"):
        by = method.get("quant_method") if isinstance(method, dict) else method
        raise ExportError(f"{where}: weights that are already quantized ({by}) are supported only as GGUF")
    heads, hidden = (
        config.get(name, config.get(other)) for name, other in (("num_attention_heads", "n_head"), _HIDDEN)
    )
    if heads is not None and hidden is not None:
        check_heads(where, hidden, heads, config.get("num_key_value_heads") or heads, config.get("head_dim"))
        check_rotation(where, config.get("max_position_embeddings"), config.get("head_dim") or hidden // heads)


_HIDDEN = ("hidden_size", "n_embd")


def _check_rotary(where: str, scaling: dict[str, Any]) -> None:
    for name, value in scaling.items():
        if name in ROTARY and value is not None:
            check(f"{where}.{name}", value, ROTARY[name])
        elif isinstance(value, dict):  # one for each kind of layer
            for key in value.keys() & ROTARY.keys():
                check(f"{where}.{name}.{key}", value[key], ROTARY[key])
    low, high = scaling.get("low_freq_factor"), scaling.get("high_freq_factor")
    if low is not None and high is not None and low >= high:
        raise ExportError(f"{where}: low_freq_factor is {low}, expected less than high_freq_factor, {high}")


def _check_tokens(where: str, config: dict[str, Any]) -> None:
    for name in ("bos_token_id", "eos_token_id"):
        value = config.get(name)
        for index in value if isinstance(value, list) else [value]:
            if index is not None:
                check(f"{where}: {name}", index, TOKEN)


def weight_files(directory: Path) -> dict[Path, list[str]]:
    """The files of weights, and which tensors the index says that each has. Raises ExportError where there are none."""
    whole = directory / "model.safetensors"  # beside which other forms of the same weights may lie
    if (directory / INDEX).exists():
        if whole.exists():
            raise ExportError(f"{directory} holds both {whole.name} and {INDEX}; remove one of them")
        return _indexed(directory)
    found = [whole] if whole.exists() else sorted(directory.glob("*.safetensors"))
    if found:
        return {plain_file(directory, path.name): [] for path in found}
    if pickles := sorted(path.name for pattern in PICKLES for path in directory.glob(pattern)):
        reason = "a pickle, which may run any code when it is read; convert it to safetensors"
        raise ExportError(f"{directory} holds no safetensors, only {pickles[0]}: {reason}")
    raise ExportError(f"{directory} holds no safetensors")


def _indexed(directory: Path) -> dict[Path, list[str]]:
    weight_map = read_json(directory, INDEX, LARGEST_INDEX).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ExportError(f"{directory / INDEX}: weight_map is not an object of tensors and their files")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not file.endswith(".safetensors") or "\0" in file:
            raise ExportError(f"{directory / INDEX}: tensor {tensor} is in {file!r}, expected a safetensors file")
        files.setdefault(file, []).append(tensor)
    return {plain_file(directory, file): tensors for file, tensors in sorted(files.items())}


def _check_weights(directory: Path) -> None:
    """The safetensors library itself refuses headers that do not fit their file; their tensors must fit each other."""
    for path in sorted(directory.glob("*.safetensors")):  # whichever of them a library chooses to open
        plain_file(directory, path.name)
    found: dict[str, Path] = {}
    for path, expected in weight_files(directory).items():
        try:
            with safe_open(path, "numpy") as file:
                names = set(file.keys())
                kinds = {name: file.get_slice(name).get_dtype() for name in names if not UNREAD.fullmatch(name)}
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{path} is not a complete safetensors file: {error}") from error
        for name, kind in kinds.items():
            if kind not in FLOAT_TYPES:
                raise ExportError(f"{path}: tensor {name} holds {kind}, which is not supported")
        if missing := sorted(set(expected) - names):
            raise ExportError(f"{path} has no tensor {missing[0]}, expected by {INDEX}")
        if twice := sorted(names & found.keys()):
            raise ExportError(f"{path} has a tensor {twice[0]}, which {found[twice[0]].name} has too")
        found |= dict.fromkeys(names, path)
