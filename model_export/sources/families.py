"""The families of models that can be exported, one row each, and the reasons why others cannot."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from model_export.errors import ExportError

QUERY_KEY_VALUE = ("attn_q", "attn_k", "attn_v")
ATTENTION = (*QUERY_KEY_VALUE, "attn_output")
MLP = ("ffn_gate", "ffn_up", "ffn_down")

ScalingKind = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope"]
# The scalings of the rotary embedding, by their names in config.json.
SCALINGS: Mapping[str, ScalingKind] = {name: name for name in get_args(ScalingKind)}


@dataclass(frozen=True)
class Biases:
    """Linear maps with biases: always, or if the `entry` of config.json, by default `default`, is true."""

    maps: tuple[str, ...]
    entry: str | None = None
    default: bool = False


@dataclass(frozen=True)
class Windows:
    """Layers that attend only to the last `sliding_window` positions.

    `size` is the window where config.json has no `sliding_window`. `opt_in`: there is a window only if
    `use_sliding_window` is true. `reads_layer_types`: `layer_types` of config.json names the layers with a window.
    Otherwise, or where it is missing, these are all layers, those from `max_window_layers` on ("late"), or those
    without rotation ("unrotated").
    """

    size: int | None = None
    opt_in: bool = False
    reads_layer_types: bool = True
    layers: Literal["all", "late", "unrotated"] = "all"


@dataclass(frozen=True)
class Family:
    """A family of the Llama architecture: what its class in transformers computes, and the layout of its files.

    `name` is config.json's `model_type`, `title` what its models are called, `gguf` the `general.architecture` of GGUF
    files, None where GGUF files have no architecture of their own for this family. Defaults of entries apply where
    config.json does not have them.
    """

    name: str
    title: str
    gguf: str | None = None
    tied_embedding: bool = False
    norm_epsilon: float = 1e-6
    # None: the hidden size divided by the number of heads.
    head_dim: int | None = None
    biases: tuple[Biases, ...] = ()
    # Whether the queries and keys of each head are normed.
    qk_norm: bool = False
    windows: Windows | None = None
    # Every n-th layer has no rotary embedding, unless config.json lists the layers.
    unrotated_every: int | None = None
    rotary_base: float = 10_000.0
    # Whether `partial_rotary_factor` may leave a part of each head unrotated.
    partial_rotation: bool = False
    scalings: Mapping[str, ScalingKind] = field(default_factory=lambda: SCALINGS)
    # The default of the context length before scaling, which is then read only from the top level of config.json.
    original_context: int | None = None
    # Each fused matrix, and the matrices that it stacks.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    # Whether the numbers of a rotary pair are adjacent in GGUF files, not half a head apart.
    gguf_adjacent_pairs: bool = False
    # Tensors of a layer that have another name in GGUF files, and their usual names.
    gguf_names: Mapping[str, str] = field(default_factory=dict)
    # Whether `native` reads Hugging Face directories too, or only GGUF files.
    directories: bool = True
    gelu: bool = False
    # Whether embeddings are multiplied by the square root of the hidden size.
    scaled_embedding: bool = False
    # Whether the outputs of attention and MLP are normed before they are added to the residual.
    post_norms: bool = False
    # In GGUF files, every layer but each n-th has a window, and rotates by the local base, without scaling.
    full_every: int | None = None
    local_rotary_base: float = 10_000.0
    # In GGUF files, models of that many layers scale scores by hidden size / heads instead of the head size.
    scaled_by_width: int | None = None


FAMILIES = (
    Family(
        "llama",
        "Llama, SmolLM, SmolLM2, Yi and others with the same architecture",
        gguf="llama",
        biases=(Biases(ATTENTION, "attention_bias"), Biases(MLP, "mlp_bias")),
        gguf_adjacent_pairs=True,
    ),
    Family("mistral", "Mistral", windows=Windows(size=4096)),
    Family("ministral", "Ministral", windows=Windows(size=4096)),
    Family(
        "qwen2",
        "Qwen2, Qwen2.5",
        gguf="qwen2",
        biases=(Biases(QUERY_KEY_VALUE),),
        windows=Windows(size=4096, opt_in=True, layers="late"),
    ),
    Family(
        "qwen3",
        "Qwen3",
        gguf="qwen3",
        head_dim=128,
        biases=(Biases(ATTENTION, "attention_bias"),),
        qk_norm=True,
        windows=Windows(size=4096, opt_in=True, layers="late"),
    ),
    Family(
        "smollm3",
        "SmolLM3",
        gguf="smollm3",
        tied_embedding=True,
        biases=(Biases(ATTENTION, "attention_bias"), Biases(MLP, "mlp_bias")),
        windows=Windows(opt_in=True, layers="unrotated"),
        unrotated_every=4,
        rotary_base=2e6,
        gguf_adjacent_pairs=True,
    ),
    Family(
        "phi3",
        "Phi-3, Phi-3.5, Phi-4",
        gguf="phi3",
        norm_epsilon=1e-5,
        windows=Windows(reads_layer_types=False),
        partial_rotation=True,
        scalings={"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
        original_context=4096,
        fused={"attn_qkv": QUERY_KEY_VALUE, "ffn_gate_up": ("ffn_gate", "ffn_up")},
        gguf_names={"ffn_up": "ffn_gate_up"},
    ),
    Family(
        "seed_oss",
        "Seed-OSS",
        gguf="seed_oss",
        head_dim=128,
        biases=(
            Biases(QUERY_KEY_VALUE, "attention_bias", default=True),
            Biases(("attn_output",), "attention_out_bias"),
            Biases(MLP, "mlp_bias"),
        ),
        gguf_names={"post_attention_norm": "ffn_norm"},
    ),
    Family(
        "gemma3",
        "Gemma 3, from GGUF files",
        gguf="gemma3",
        directories=False,
        qk_norm=True,
        gelu=True,
        scaled_embedding=True,
        post_norms=True,
        full_every=6,
        rotary_base=1e6,
        scaled_by_width=62,
    ),
)
# Families that `native` builds, without torch, by their names in config.json and in GGUF files.
NATIVE: Mapping[str, Family] = {family.name: family for family in FAMILIES if family.directories}
NATIVE_GGUF: Mapping[str, Family] = {family.gguf: family for family in FAMILIES if family.gguf}
# Families that `mobius` builds, with the extra `families`: their names in config.json, and what they are called.
MOBIUS: Mapping[str, str] = {
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, its text decoder, from directories",
    "gemma3_text": "Gemma 3, text only, from directories",
    "gpt2": "GPT-2",
    "gpt_bigcode": "StarCoder and others with the same architecture",
    "starcoder2": "StarCoder2",
    "gpt_neox": "GPT-NeoX, Pythia",
    "phi": "Phi-1.5, Phi-2",
    "granite": "Granite",
    "olmo": "OLMo",
    "olmo2": "OLMo 2",
    "olmo3": "OLMo 3",
    "nemotron": "Nemotron",
    "stablelm": "StableLM",
    "arcee": "Arcee",
}
# Those of them that can also be read from GGUF files.
MOBIUS_GGUF = ("gemma2", "gpt2")

RECURRENT = "its recurrent layers keep a state, which the engine's KV cache cannot hold"
LATENT = "its latent attention (MLA) does not cache keys and values per head, as the engine's KV cache does"
ENCODER = "it is not only a decoder, but encodes a whole text first"
EXPERTS = "its layers choose among experts, for which the exported graph has no operator"
MULTIMODAL = "it reads more than text"
DISTANCE_BIAS = "its attention is biased by distance, which the exported graph's operator does not compute"

_BY_REASON = {
    RECURRENT: (
        "mamba mamba2 falcon_mamba rwkv rwkv6 rwkv7 rwkv6qwen2 arwkv7 xlstm jamba bamba zamba zamba2 nemotron_h "
        "falcon_h1 falcon-h1 plamo2 recurrent_gemma granitemoehybrid granitehybrid lfm2 lfm2_moe lfm2moe qwen3_next "
        "qwen3next qwen3_5 qwen3_5_text qwen35 kimi_linear kimi-linear minimax olmo_hybrid"
    ),
    LATENT: (
        "deepseek_v2 deepseek_v3 deepseek_v32 deepseek2 kimi_k2 longcat_flash minicpm3 plm youtu glm4_moe_lite "
        "mistral4 sarvam_mla"
    ),
    ENCODER: (
        "t5 mt5 umt5 longt5 t5gemma t5encoder switch_transformers bart mbart plbart pegasus marian prophetnet bert "
        "roberta distilbert electra deberta deberta-v2 modernbert modern-bert xlm-roberta"
    ),
    EXPERTS: (
        "mixtral qwen2_moe qwen2moe qwen3_moe qwen3moe olmoe phimoe dbrx granitemoe gpt_oss gpt-oss glm4_moe glm4moe "
        "ernie4_5_moe ernie4_5-moe jetmoe deepseek llama4 llama4_text minimax_m2 minimax-m2 grok arctic"
    ),
    MULTIMODAL: (
        "llava llava_next mllama qwen2_vl qwen2vl qwen2_5_vl qwen3_vl qwen3vl gemma3n internvl phi4_multimodal "
        "idefics3 smolvlm paligemma whisper qwen2_audio voxtral clip siglip"
    ),
    DISTANCE_BIAS: "bloom mpt",
}
REFUSED: Mapping[str, str] = {family: reason for reason, names in _BY_REASON.items() for family in names.split()}

# Entries of config.json that show why a family in no table is not supported.
REASON_BY_ENTRY: Mapping[str, str] = {
    "is_encoder_decoder": ENCODER,
    "vision_config": MULTIMODAL,
    "audio_config": MULTIMODAL,
    "kv_lora_rank": LATENT,
    "ssm_cfg": RECURRENT,
    "mamba_d_state": RECURRENT,
    "state_size": RECURRENT,
    "linear_num_key_heads": RECURRENT,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
}


def refusal(family: Any, config: Mapping[str, Any], *, gguf: bool = False) -> ExportError:
    """The error for a family that cannot be exported, from a GGUF file if `gguf`; `config` has its entries."""
    reason = REFUSED.get(str(family)) or next(
        (why for entry, why in REASON_BY_ENTRY.items() if config.get(entry)), None
    )
    if reason:
        return ExportError(f"architecture {family!r} is not supported: {reason}")
    if family in (*NATIVE, *MOBIUS):
        return ExportError(f"architecture {family!r} is supported as a Hugging Face directory, not as a GGUF file")
    native, mobius = (NATIVE_GGUF, MOBIUS_GGUF) if gguf else (NATIVE, MOBIUS)
    supported = f"{', '.join(native)}, and with the extra `families` {', '.join(mobius)}"
    return ExportError(f"architecture {family!r} is not supported; supported are {supported}")
