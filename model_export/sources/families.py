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
LATENT = "its latent attention (MLA) keeps no keys and values of heads, as the engine does"
ENCODER = "it is no decoder alone, but encodes a whole text first"
EXPERTS = "its layers choose among experts, for which the exported graph has no operator"
MORE_THAN_TEXT = "it reads more than text"
BY_DISTANCE = "its attention is biased by distance, which the exported graph's operator does not compute"

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
    MORE_THAN_TEXT: (
        "llava llava_next mllama qwen2_vl qwen2vl qwen2_5_vl qwen3_vl qwen3vl gemma3n internvl phi4_multimodal "
        "idefics3 smolvlm paligemma whisper qwen2_audio voxtral clip siglip"
    ),
    BY_DISTANCE: "bloom mpt",
}
REFUSED: Mapping[str, str] = {family: reason for reason, names in _BY_REASON.items() for family in names.split()}

# What tells a family that is in no table: the entries of its config.json.
MARKS: Mapping[str, str] = {
    "is_encoder_decoder": ENCODER,
    "vision_config": MORE_THAN_TEXT,
    "audio_config": MORE_THAN_TEXT,
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
