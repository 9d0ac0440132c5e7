"""Reads the architecture that a Hugging Face config.json describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.errors import ExportError
from model_export.sources import rotary
from model_export.sources.checkpoint import Architecture, LayerAttention
from model_export.sources.families import OWN, Family, ScalingKind, Windows, refusal
from model_export.sources.hugging_face.config import AnyConfig, Config, Rotation
from model_export.sources.rotary import Rotary

# One function by two names.
ACTIVATIONS = ("silu", "swish")


def read_architecture(config: AnyConfig, entries: Mapping[str, Any]) -> Architecture:
    """The architecture that `config` describes, which was read from these `entries`.

    Raises ExportError for one that the builder does not build.
    """
    if not isinstance(config, Config):
        raise refusal(config.model_type, entries)
    _refuse_variants(config)
    try:
        return _architecture(config, OWN[config.model_type])
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ExportError(f"config.json describes no model that can be computed: {error}") from error


def _architecture(config: Config, family: Family) -> Architecture:
    heads = config.num_attention_heads
    head_dim = config.head_dim or family.head_dim or config.hidden_size // heads
    rotation = _rotary(config, family, head_dim)
    context = min(config.max_position_embeddings, rotation.longest or config.max_position_embeddings)
    return Architecture(
        family=family,
        attention=_attention(config, family, context),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=heads,
        kv_heads=config.num_key_value_heads or heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        context_length=context,
        norm_epsilon=config.rms_norm_eps or family.norm_epsilon,
        rotary=rotation,
        tied_embedding=config.given("tie_word_embeddings", family.tied_embedding),
        biases=_biases(config, family),
    )


def _refuse_variants(config: Config) -> None:
    if config.hidden_act not in ACTIVATIONS:
        raise ExportError(f"activation {config.hidden_act!r} is not supported; supported is silu")


def _biases(config: Config, family: Family) -> frozenset[str]:
    there = [each for each in family.biases if each.entry is None or config.given(each.entry, each.default)]
    return frozenset(name for each in there for name in each.maps)


def _attention(config: Config, family: Family, context: int) -> tuple[LayerAttention, ...]:
    """How each layer attends. A window that spans the whole context is none."""
    rotates, windows = _rotates(config, family), family.windows
    if windows is None:
        return tuple(LayerAttention(None, each) for each in rotates)
    window, listed = _window(config, windows), config.layer_types if windows.listed else None
    kinds = _kinds(config, windows, rotates) if listed is None else listed
    _check_layers(config, len(kinds))
    if other := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ExportError(f"layers of the kind {min(other)!r} are not supported")
    if listed and window is None and "sliding_attention" in listed:
        raise ExportError("config.json's layer_types have windows, but no sliding_window is in use")
    return tuple(
        LayerAttention(window if window and window < context and kind == "sliding_attention" else None, each)
        for kind, each in zip(kinds, rotates, strict=True)
    )


def _check_layers(config: Config, listed: int) -> None:
    if listed != (layers := config.num_hidden_layers):
        raise ExportError(f"config.json tells of {listed} layers, but has {layers}")


def _window(config: Config, windows: Windows) -> int | None:
    if windows.by_choice and not config.use_sliding_window:
        return None
    window: int | None = config.given("sliding_window", windows.size)
    if window == 0:
        raise ExportError("config.json's sliding_window is 0, expected at least 1")
    return window


def _rotates(config: Config, family: Family) -> list[bool]:
    """Which layers rotate; the entries of `no_rope_layers` are 1 for those that do."""
    layers = config.num_hidden_layers
    if family.unrotated_every is None:
        return [True] * layers
    if config.no_rope_layers is not None:
        _check_layers(config, len(config.no_rope_layers))
        return [bool(each) for each in config.no_rope_layers]
    interval = config.given("no_rope_layer_interval", family.unrotated_every)
    return [(layer + 1) % interval != 0 for layer in range(layers)]


def _kinds(config: Config, windows: Windows, rotates: list[bool]) -> list[str]:
    """The kind of each layer where `layer_types` does not list them."""
    match windows.layers:
        case "late":
            first: Any = config.max_window_layers
            slides = [layer >= first for layer in range(len(rotates))]
        case "unrotated":
            slides = [not each for each in rotates]
        case "all":
            slides = [True] * len(rotates)
    return ["sliding_attention" if each else "full_attention" for each in slides]


def _rotary(config: Config, family: Family, head_dim: int) -> Rotary:
    """The rotation, which `rope_scaling` slows down; newer configurations keep all of it in `rope_parameters`."""
    scaling = next((each for each in (config.rope_scaling, config.rope_parameters) if each), Rotation())
    if scaling.by_kind:
        raise ExportError(f"rotary scaling of its own for layers of the kind {min(scaling.by_kind)!r} is not supported")
    base = float(scaling.given("rope_theta", config.given("rope_theta", family.rotary_base)))
    size = _rotated_size(config, scaling, family, head_dim)
    plain = rotary.plain(size, base)
    match _scaling_kind(scaling, family):
        case "default":
            return Rotary(plain)
        case "dynamic":  # plain within `max_position_embeddings`, the context here
            _needed(scaling, "factor")
            return Rotary(plain)
        case "linear":
            return Rotary(plain / _needed(scaling, "factor"))
        case "llama3":
            factor, low, high = (_needed(scaling, name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
            return Rotary(rotary.llama3(plain, factor, low, high, _original(config, scaling, family)))
        case "yarn":
            return _yarn(config, scaling, size, base, _original(config, scaling, family))
        case "longrope":
            return _longrope(config, scaling, size, base, _original(config, scaling, family))


def _scaling_kind(scaling: Rotation, family: Family) -> ScalingKind:
    given = scaling.given("rope_type", scaling.given("type", "default"))
    if (kind := family.scalings.get(str(given))) is None:
        known = ", ".join(family.scalings)
        raise ExportError(f"rotary scaling {given!r} is not supported in {family.name}; supported are {known}")
    return kind


def _rotated_size(config: Config, scaling: Rotation, family: Family, head_dim: int) -> int:
    """How many numbers of a head rotate."""
    shares = (scaling.partial_rotary_factor, config.partial_rotary_factor)
    share = next((share for share in shares if share is not None), 1.0)
    if share != 1 and not family.partial_rotation:
        known = ", ".join(each.name for each in OWN.values() if each.partial_rotation)
        raise ExportError(f"partial_rotary_factor {share} is not supported in {family.name}, only in {known}")
    return rotary.checked_size(int(head_dim * share), head_dim)


def _needed(scaling: Rotation, name: str) -> Any:
    if (value := getattr(scaling, name)) is None:
        raise ExportError(f"config.json has no {name}, which its rotary scaling needs")
    return value


def _original(config: Config, scaling: Rotation, family: Family) -> int:
    """The context length before scaling. A top-level entry of config.json overrides the one inside rope_scaling."""
    name = "original_max_position_embeddings"
    if family.original_context is not None:
        return int(config.given(name, family.original_context))
    return int(config.given(name, scaling.given(name, config.max_position_embeddings)))


def _yarn(config: Config, scaling: Rotation, size: int, base: float, original: int) -> Rotary:
    if not scaling.truncate or scaling.mscale:
        raise ExportError("YaRN with mscale or without truncate is not supported")
    if "factor" not in scaling.model_fields_set:
        raise ExportError("config.json has no factor, which its rotary scaling needs")
    factor = _factor(config, scaling.factor, original)
    turns = scaling.beta_fast or 32.0, scaling.beta_slow or 1.0
    scale = scaling.attention_factor
    return Rotary(
        rotary.yarn(size, base, factor, original, turns), rotary.yarn_scale(factor) if scale is None else scale
    )


def _longrope(config: Config, scaling: Rotation, size: int, base: float, original: int) -> Rotary:
    """The short factors, which hold up to the original context; beyond it all positions would turn anew."""
    short, long = _needed(scaling, "short_factor"), _needed(scaling, "long_factor")
    for name, values in (("short_factor", short), ("long_factor", long)):
        if len(values) != size // 2:
            raise ExportError(f"config.json's {name} has {len(values)} entries, expected {size // 2}")
    scale = scaling.attention_factor
    if scale is None:
        scale = rotary.longrope_scale(_factor(config, scaling.factor, original), original)
    return Rotary(rotary.plain(size, base, rotary.factors(short)), scale, longest=original)


def _factor(config: Config, given: float | None, original: int) -> float:
    """By how much the context is longer than the original one."""
    return float(config.max_position_embeddings / original if given is None else given)
