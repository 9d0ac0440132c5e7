"""What config.json and generation_config.json may say, entry by entry, and what it is where they do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, model_validator
from pydantic_core import PydanticCustomError

from model_export.errors import ExportError
from model_export.sources import bounds
from model_export.sources.bounds import INNER, Expected, Whole, check_heads, check_rotation, parse, shown
from model_export.sources.families import OWN

TOKEN = Whole(0, bounds.MOST_TOKENS - 1)
Token = Annotated[int, TOKEN]
Tokens = Annotated[Token | Annotated[list[Token | None], Strict()], Expected(f"{TOKEN}, or a list of such")]
Rotates = Annotated[list[Annotated[int, Whole(0, 1)]], Strict(), Expected(f"a list, each of {Whole(0, 1)}")]

# The default of entries that may be missing, but not null.
MISSING: Any = None
# What makes transformers open other files, or code of a hub; and what else the entry may say.
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
    """Entries of a JSON object, each within its bounds. Others are ignored."""

    model_config = ConfigDict(frozen=True)

    def given(self, name: str, default: Any = None) -> Any:
        """The entry `name`, perhaps null, or `default` where it is missing."""
        return getattr(self, name) if name in self.model_fields_set else default


class Scaling(Entries):
    """A rotation and how it is scaled."""

    rope_type: bounds.Text | None = None
    type: bounds.Text | None = None
    rope_theta: bounds.RotaryBase | None = None
    partial_rotary_factor: bounds.Share | None = None
    factor: bounds.Scale | None = None
    attention_factor: bounds.Scale | None = None
    beta_fast: bounds.Scale | None = None
    beta_slow: bounds.Scale | None = None
    truncate: bounds.Flag | None = True
    mscale: Annotated[float, bounds.Real(0.0, bounds.SCALE.high)] | None = None
    short_factor: bounds.Scales | None = None
    long_factor: bounds.Scales | None = None
    low_freq_factor: bounds.Scale | None = None
    high_freq_factor: bounds.Scale | None = None
    original_max_position_embeddings: bounds.Context | None = None


class Rotation(Scaling):
    """The rotation of all layers, or in `by_kind` that of each kind of layer."""

    by_kind: Mapping[str, Scaling] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, entries: Any) -> Any:
        if not isinstance(entries, dict):
            raise PydanticCustomError("expected", "an object")
        kinds = {name for name, entry in entries.items() if isinstance(entry, dict)} - Scaling.model_fields.keys()
        return {**entries, INNER: {name: entries[name] for name in sorted(kinds)}}


# An empty object says as little as null.
RotationOrNone = Annotated[Rotation | None, BeforeValidator(lambda entries: None if entries == {} else entries)]


class TokenIds(Entries):
    """What both files say of the tokens that begin and end a text."""

    bos_token_id: Token | None = None
    eos_token_id: Tokens | None = None


class AnyConfig(TokenIds):
    """The configuration of any family, by every name that some family has for a number."""

    model_type: bounds.Text = MISSING
    num_hidden_layers: bounds.Layers = MISSING
    n_layer: bounds.Layers = MISSING
    hidden_size: bounds.Hidden = MISSING
    n_embd: bounds.Hidden = MISSING
    intermediate_size: bounds.Intermediate = MISSING
    n_inner: bounds.Intermediate | None = None
    num_attention_heads: bounds.Heads = MISSING
    n_head: bounds.Heads = MISSING
    num_key_value_heads: bounds.Heads | None = None
    head_dim: bounds.HeadDim | None = None
    vocab_size: bounds.VocabSize = MISSING
    max_position_embeddings: bounds.Context = MISSING
    n_positions: bounds.Context = MISSING
    original_max_position_embeddings: bounds.Context | None = None
    rms_norm_eps: bounds.Epsilon = MISSING
    layer_norm_epsilon: bounds.Epsilon = MISSING
    tie_word_embeddings: bounds.Flag | None = None
    torch_dtype: bounds.Text | None = None
    dtype: bounds.Text | None = None
    hidden_act: bounds.Text | None = "silu"
    attention_bias: bounds.Flag | None = None
    attention_out_bias: bounds.Flag | None = None
    mlp_bias: bounds.Flag | None = None
    query_pre_attn_scalar: bounds.Scale | None = None
    attn_logit_softcapping: bounds.Scale | None = None
    final_logit_softcapping: bounds.Scale | None = None
    sliding_window: bounds.Window | None = None
    use_sliding_window: bounds.Flag | None = False
    max_window_layers: Annotated[int, Whole(0, bounds.MOST_LAYERS)] | None = 28
    layer_types: bounds.Texts | None = None
    no_rope_layers: Rotates | None = None
    no_rope_layer_interval: bounds.Layers | None = None
    rope_theta: bounds.RotaryBase | None = None
    rope_local_base_freq: bounds.RotaryBase | None = None
    partial_rotary_factor: bounds.Share | None = None
    rope_scaling: RotationOrNone = None
    rope_parameters: RotationOrNone = None
    text_config: Annotated[dict[str, Any], Strict(), Expected("an object")] | None = None


class Config(AnyConfig):
    """The configuration of a family of our own, which has to say all its sizes."""

    model_type: bounds.Text
    num_hidden_layers: bounds.Layers
    hidden_size: bounds.Hidden
    intermediate_size: bounds.Intermediate
    num_attention_heads: bounds.Heads
    vocab_size: bounds.VocabSize
    max_position_embeddings: bounds.Context


def read_config(where: str, entries: Mapping[str, Any]) -> AnyConfig:
    """What the `entries` of a config.json say, a Config where its family is one of our own.

    Raises ExportError where one is of the wrong kind, out of all bounds, or does not fit another.
    """
    config = parse(Config if str(entries.get("model_type")) in OWN else AnyConfig, where, entries)
    _check(where, entries, config)
    for part in (entries.get("text_config"), entries.get("vision_config")):
        if isinstance(part, dict):
            _check(where, part, parse(AnyConfig, where, part))
    return config


def _check(where: str, entries: Mapping[str, Any], config: AnyConfig) -> None:
    _check_order(f"{where}: rope_scaling", config.rope_scaling)
    _check_order(f"{where}: rope_parameters", config.rope_parameters)
    for name, harmless in CODE.items():
        if (value := entries.get(name)) is not None and value not in harmless:
            raise ExportError(f"{where}: {name} is {shown(value)}, which may name other files or code; remove it")
    if method := entries.get("quantization_config") or entries.get("compression_config"):
        by = method.get("quant_method") if isinstance(method, dict) else method
        raise ExportError(f"{where}: weights that are already quantized ({by}) are supported only as GGUF")
    heads, hidden = config.num_attention_heads or config.n_head, config.hidden_size or config.n_embd
    if heads and hidden:
        check_heads(where, hidden, heads, config.num_key_value_heads or heads, config.head_dim)
        check_rotation(where, config.max_position_embeddings, config.head_dim or hidden // heads)


def _check_order(where: str, rotation: Rotation | None) -> None:
    low, high = (rotation.low_freq_factor, rotation.high_freq_factor) if rotation else (None, None)
    if low is not None and high is not None and low >= high:
        raise ExportError(f"{where}: low_freq_factor is {low}, expected less than high_freq_factor, {high}")
