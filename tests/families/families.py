"""Every family of models that is proven: one entry each."""

from __future__ import annotations

from tests.families.family import SIZES, WINDOW, Family

SLIDING_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# A part of a head is turned; attention takes parts of 16 at least.
WIDE = SIZES | {"hidden_size": 256}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": SIZES["vocab_size"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES = [
    Family("llama", {"model_type": "llama", "tie_word_embeddings": False}, tokenizer="prepend", add_bos=True),
    Family("mistral", {"model_type": "mistral", "sliding_window": None}, tokenizer="metaspace", add_bos=True),
    Family("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    Family("qwen3", {"model_type": "qwen3", "head_dim": 32}),
    Family("arcee", {"model_type": "arcee"}),
    Family("gemma", {"model_type": "gemma", "head_dim": 16}, tokenizer="bare", add_bos=True),
    Family(
        "gemma2",
        {"model_type": "gemma2", "head_dim": 16, "query_pre_attn_scalar": 24} | SLIDING_AND_FULL,
        tokenizer="bare",
        add_bos=True,
    ),
    Family(
        "gemma3",
        {"model_type": "gemma3_text", "head_dim": 16, "query_pre_attn_scalar": 24} | SLIDING_AND_FULL,
        tokenizer="bare",
        add_bos=True,
    ),
    Family(
        "gemma3-with-images",
        {
            "model_type": "gemma3",
            "text_config": SIZES | {"head_dim": 16, "query_pre_attn_scalar": 16} | SLIDING_AND_FULL,
            "vision_config": VISION,
        },
        tokenizer="bare",
        add_bos=True,
        sizes={},
    ),
    Family("gpt2", {"model_type": "gpt2"}, sizes=GPT2),
    Family("gpt_bigcode", {"model_type": "gpt_bigcode"}, sizes=GPT2),
    Family("gpt_neox", {"model_type": "gpt_neox", "num_key_value_heads": 4}, sizes=WIDE),
    Family(
        "granite",
        {"model_type": "granite", "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5}
        | {"attention_multiplier": 0.3},
    ),
    Family("ministral", {"model_type": "ministral", "head_dim": 16} | SLIDING_AND_FULL, tokenizer="metaspace"),
    Family("nemotron", {"model_type": "nemotron", "head_dim": 64}, sizes=WIDE),
    Family("olmo", {"model_type": "olmo"}),
    Family("olmo2", {"model_type": "olmo2"}),
    Family("olmo3", {"model_type": "olmo3"} | SLIDING_AND_FULL),
    Family("phi", {"model_type": "phi", "partial_rotary_factor": 0.5}, sizes=WIDE),
    Family("stablelm", {"model_type": "stablelm"}, sizes=WIDE),
    Family("starcoder2", {"model_type": "starcoder2", "sliding_window": WINDOW}),
]
