"""Which families of models are exported, and why others are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from model_export.errors import ExportError

# Built without torch, by our own builder; by the names that config.json and GGUF files give them.
OWN = ("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3", "phi3")
# Built with the extra `families`, by the names of config.json.
MOBIUS = (
    *("arcee", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "nemotron"),
    *("olmo", "olmo2", "olmo3", "phi", "stablelm", "starcoder2"),
)
# Those of them that are read from GGUF files as well.
MOBIUS_GGUF = ("gemma2", "gemma3", "gpt2")

RECURRENT = "its recurrent layers keep a state, where the engine keeps keys and values"
LATENT = "its latent attention (MLA) caches no keys and values of heads"
ENCODER = "it is no decoder: it reads a text with an encoder of its own"
EXPERTS = "its layers choose among experts, whose matrices the exported graph would not keep apart"
MANY_KINDS = "it reads more than text"
OWN_ATTENTION = "its attention is of a kind that the engine's operator does not compute"

REFUSED: Mapping[str, str] = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv6", "rwkv7", "xlstm", "retnet"), RECURRENT),
    **dict.fromkeys(("jamba", "bamba", "zamba", "zamba2", "nemotron_h", "falcon_h1", "falcon-h1", "plamo2"), RECURRENT),
    **dict.fromkeys(("recurrent_gemma", "granitemoehybrid", "granitehybrid", "lfm2", "lfm2_moe"), RECURRENT),
    **dict.fromkeys(
        ("qwen3_next", "qwen3next", "qwen3_5", "qwen35", "kimi_linear", "minimax", "olmo_hybrid"), RECURRENT
    ),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek2", "kimi_k2", "longcat_flash"), LATENT),
    **dict.fromkeys(("minicpm3", "youtu", "glm4_moe_lite", "mistral4"), LATENT),
    **dict.fromkeys(("t5", "t5gemma", "mt5", "umt5", "t5encoder", "bart", "mbart", "pegasus", "marian"), ENCODER),
    **dict.fromkeys(("bert", "modernbert", "modern-bert", "roberta", "distilbert", "deberta-v2", "electra"), ENCODER),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen2moe", "qwen3_moe", "qwen3moe", "olmoe", "phimoe", "dbrx"), EXPERTS),
    **dict.fromkeys(("granitemoe", "gpt_oss", "gpt-oss", "glm4_moe", "ernie4_5_moe", "jetmoe", "deepseek"), EXPERTS),
    **dict.fromkeys(("llava", "llava_next", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3n"), MANY_KINDS),
    **dict.fromkeys(("llama4", "mistral3", "internvl", "phi4_multimodal", "phi3_v", "idefics3", "smolvlm"), MANY_KINDS),
    **dict.fromkeys(("whisper", "qwen2_audio", "voxtral", "clip", "siglip", "paligemma"), MANY_KINDS),
    **dict.fromkeys(("bloom", "mpt", "falcon_alibi", "longformer", "big_bird"), OWN_ATTENTION),
}

# What tells a family that is in no table: the entries of its config.json.
MARKS: Mapping[str, str] = {
    "is_encoder_decoder": ENCODER,
    "vision_config": MANY_KINDS,
    "audio_config": MANY_KINDS,
    "kv_lora_rank": LATENT,
    "ssm_cfg": RECURRENT,
    "mamba_d_state": RECURRENT,
    "state_size": RECURRENT,
    "linear_num_key_heads": RECURRENT,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
}


def refusal(family: Any, config: Mapping[str, Any]) -> ExportError:
    """Why a family that none builds is refused; `config` is what its source says of itself."""
    reason = REFUSED.get(str(family)) or next((why for mark, why in MARKS.items() if config.get(mark)), None)
    if reason:
        return ExportError(f"architecture {family!r} is not supported: {reason}")
    if family in MOBIUS:
        return ExportError(f"architecture {family!r} is supported as a Hugging Face directory, not as a GGUF file")
    supported = f"{', '.join(OWN)}, and with the extra `families` {', '.join(MOBIUS)}"
    return ExportError(f"architecture {family!r} is not supported; supported are {supported}")
