"""The entries of config.json and generation_config.json: their types, ranges and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator
from pydantic_core import PydanticCustomError

from model_export.errors import ExportError
from model_export.sources import field_types
from model_export.sources.families import NATIVE

TOKEN = field_types.Within(0, field_types.MOST_TOKENS - 1)
Token = Annotated[int, TOKEN]
Tokens = Annotated[Token | Annotated[list[Token | None], Strict()], field_types.Expected(f"{TOKEN}, or a list of them")]
Rotates = Annotated[
    list[Annotated[int, field_types.Within(0, 1)]],
    Strict(),
    field_types.Expected(f"a list, each entry {field_types.Within(0, 1)}"),
]

# The default of entries that may be missing, but not null.
MISSING: Any = None
# The entries that `native` needs for every family that it builds.
SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
# Entries with which transformers opens other files or code from a hub, and the values that are harmless.
CODE: Mapping[str, tuple[object, ...]] = {
    "transformers_weights": (),
    "attn_implementation": ("eager", "sdpa"),
    "_attn_implementation": ("eager", "sdpa"),
    "_attn_implementation_internal": ("eager", "sdpa"),
    "experts_implementation": (),
    "_experts_implementation": (),
    "_experts_implementation_internal": (),
}


class Entries(BaseModel):
    """Entries of a JSON object, each of its type. Other entries are ignored."""

    model_config = ConfigDict(frozen=True)

    def entry(self, name: str, default: Any = None) -> Any:
        """The entry `name`, which may be null, or `default` where it is missing."""
        return getattr(self, name) if name in self.model_fields_set else default


class Scaling(Entries):
    """A rotary embedding and its scaling."""

    rope_type: field_types.Text | None = None
    type: field_types.Text | None = None
    rope_theta: field_types.RotaryBase | None = None
    partial_rotary_factor: field_types.Share | None = None
    factor: field_types.Scale | None = None
    attention_factor: field_types.Scale | None = None
    beta_fast: field_types.Scale | None = None
    beta_slow: field_types.Scale | None = None
    truncate: field_types.Flag | None = True
    mscale: Annotated[float, field_types.Within(0.0, field_types.SCALE.high)] | None = None
    short_factor: field_types.Scales | None = None
    long_factor: field_types.Scales | None = None
    low_freq_factor: field_types.Scale | None = None
    high_freq_factor: field_types.Scale | None = None
    original_max_position_embeddings: field_types.Context | None = None


class Rotation(Scaling):
    """The rotation of all layers, or in `by_layer_type` that of each type of layer."""

    by_layer_type: Mapping[str, Scaling] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, entries: Any) -> Any:
        if not isinstance(entries, dict):
            raise PydanticCustomError("expected", "an object")
        layer_types = {name for name, entry in entries.items() if isinstance(entry, dict)} - Scaling.model_fields.keys()
        return {**entries, field_types.BY_LAYER_TYPE: {name: entries[name] for name in sorted(layer_types)}}


# An empty object means the same as null.
RotationOrNone = Annotated[Rotation | None, BeforeValidator(lambda entries: None if entries == {} else entries)]


class TokenIds(Entries):
    """The tokens that begin and end a text, entries of both files."""

    bos_token_id: Token | None = None
    eos_token_id: Tokens | None = None


class AddedToken(Entries):
    """A token with settings of its own."""

    content: field_types.Text = MISSING


class TokenizerSettings(Entries):
    """The entries of tokenizer_config.json that are read."""

    eos_token: (
        Annotated[
            field_types.Text | AddedToken, field_types.Expected("a text, or an object with a content that is a text")
        ]
        | None
    ) = None


class Config(TokenIds):
    """The configuration of any family, with every name that families have for the same number."""

    model_type: field_types.Text = MISSING
    num_hidden_layers: field_types.Layers = MISSING
    n_layer: field_types.Layers = MISSING
    hidden_size: field_types.Hidden = MISSING
    n_embd: field_types.Hidden = MISSING
    intermediate_size: field_types.Intermediate = MISSING
    n_inner: field_types.Intermediate | None = None
    num_attention_heads: field_types.Heads = MISSING
    n_head: field_types.Heads = MISSING
    num_key_value_heads: field_types.Heads | None = None
    head_dim: field_types.HeadDim | None = None
    vocab_size: field_types.VocabSize = MISSING
    max_position_embeddings: field_types.Context = MISSING
    n_positions: field_types.Context = MISSING
    original_max_position_embeddings: field_types.Context | None = None
    rms_norm_eps: field_types.Epsilon = MISSING
    layer_norm_epsilon: field_types.Epsilon = MISSING
    tie_word_embeddings: field_types.Flag | None = None
    torch_dtype: field_types.Text | None = None
    dtype: field_types.Text | None = None
    hidden_act: field_types.Text | None = "silu"
    attention_bias: field_types.Flag | None = None
    attention_out_bias: field_types.Flag | None = None
    mlp_bias: field_types.Flag | None = None
    query_pre_attn_scalar: field_types.Scale | None = None
    attn_logit_softcapping: field_types.Scale | None = None
    final_logit_softcapping: field_types.Scale | None = None
    sliding_window: field_types.Window | None = None
    use_sliding_window: field_types.Flag | None = False
    max_window_layers: Annotated[int, field_types.Within(0, field_types.MOST_LAYERS)] | None = 28
    layer_types: field_types.Texts | None = None
    no_rope_layers: Rotates | None = None
    no_rope_layer_interval: field_types.Layers | None = None
    rope_theta: field_types.RotaryBase | None = None
    rope_local_base_freq: field_types.RotaryBase | None = None
    partial_rotary_factor: field_types.Share | None = None
    rope_scaling: RotationOrNone = None
    rope_parameters: RotationOrNone = None
    text_config: Annotated[dict[str, Any], Strict(), field_types.Expected("an object")] | None = None


def read_config(where: str, entries: Mapping[str, Any]) -> Config:
    """The `entries` of a config.json.

    Raises ExportError where an entry has the wrong type, is out of range, or contradicts another, and where a family
    that `native` builds lacks a size.
    """
    config = field_types.parse(Config, where, entries)
    missing = [name for name in SIZES if name not in entries]
    if config.model_type in NATIVE and missing:
        raise ExportError(f"{where} has no {missing[0]}")
    _check(where, entries, config)
    for part in (entries.get("text_config"), entries.get("vision_config")):
        if isinstance(part, dict):
            _check(where, part, field_types.parse(Config, where, part))
    return config


def _check(where: str, entries: Mapping[str, Any], config: Config) -> None:
    for name, rotation in {"rope_scaling": config.rope_scaling, "rope_parameters": config.rope_parameters}.items():
        low, high = (rotation.low_freq_factor, rotation.high_freq_factor) if rotation else (None, None)
        if low is not None and high is not None and low >= high:
            problem = f"low_freq_factor is {low}, expected less than high_freq_factor, {high}"
            raise ExportError(f"{where}: {name}: {problem}")
    for name, harmless in CODE.items():
        if (value := entries.get(name)) is not None and value not in harmless:
            raise ExportError(
                f"{where}: {name} is {field_types.abbreviated(value)}, which may name other files or code; remove it"
            )
    names = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
    if method := next((entries[name] for name in names if entries.get(name)), None):
        by = method.get("quant_method", f"{method.get('bits')} bits") if isinstance(method, dict) else method
        raise ExportError(f"{where}: weights that are already quantized ({by}) are supported only as GGUF")
    heads, hidden = config.num_attention_heads or config.n_head, config.hidden_size or config.n_embd
    if heads and hidden:
        field_types.check_heads(where, hidden, heads, config.num_key_value_heads or heads, config.head_dim)
        field_types.check_rotation(where, config.max_position_embeddings, config.head_dim or hidden // heads)
