"""Every family of models that is proven: one entry each."""

from __future__ import annotations

from tests.families.family import SIZES, WINDOW, Family

FOUR_LAYERS = {"num_hidden_layers": 4}
WINDOWED = {"sliding_window": WINDOW}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
# Its context is cut to the original one, where the short factors hold.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(8)],
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 160,
    "partial_rotary_factor": 0.5,
}
WHOLE_LONGROPE = LONGROPE | {"partial_rotary_factor": 1.0}
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}
SLIDING_AND_FULL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
# A part of each head rotates; the attention operator supports multiples of 16.
WIDE = SIZES | {"hidden_size": 256}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": SIZES["vocab_size"]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}

FAMILIES = [
    Family("llama", {"model_type": "llama", "tie_word_embeddings": False}, tokenizer="prepend", add_bos=True),
    Family("llama3-scaling", {"model_type": "llama", "rope_parameters": LLAMA3}, add_bos=True),
    Family("llama-linear", {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    Family("llama-dynamic", {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}),
    Family("llama-biases", {"model_type": "llama", "attention_bias": True, "mlp_bias": True}),
    Family("smollm2", {"model_type": "llama", "tie_word_embeddings": True}),
    Family("mistral", {"model_type": "mistral", "sliding_window": None}, tokenizer="metaspace", add_bos=True),
    Family("mistral-window", {"model_type": "mistral", **WINDOWED}, tokenizer="metaspace", add_bos=True),
    Family(
        "ministral",
        {"model_type": "ministral", **WINDOWED, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 32},
        tokenizer="bare",
    ),
    Family("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    Family("qwen2-yarn", {"model_type": "qwen2", "tie_word_embeddings": False, "rope_parameters": YARN}),
    Family(
        "qwen2-window",
        {"model_type": "qwen2", **FOUR_LAYERS, **WINDOWED, "use_sliding_window": True, "max_window_layers": 1},
    ),
    Family("qwen3", {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True}),
    Family("qwen3-biases", {"model_type": "qwen3", "head_dim": 16, "attention_bias": True}),
    Family("smollm3", {"model_type": "smollm3", **FOUR_LAYERS}),
    Family(
        "smollm3-window",
        {
            "model_type": "smollm3",
            **FOUR_LAYERS,
            **WINDOWED,
            "use_sliding_window": True,
            "no_rope_layers": [1, 0, 0, 1],
        },
    ),
    Family("phi3", {"model_type": "phi3", **WINDOWED}, tokenizer="prepend"),
    Family(
        "phi3-longrope",
        {"model_type": "phi3", **TWO_HEADS, "rope_parameters": LONGROPE, "original_max_position_embeddings": 160},
        tokenizer="prepend",
    ),
    Family("seed_oss", {"model_type": "seed_oss", "head_dim": 32}),
    Family(
        "seed_oss-biases",
        {"model_type": "seed_oss", "head_dim": 16, "tie_word_embeddings": True}
        | {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    # Built by mobius-onnx.
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
    Family(
        "granite-longrope",
        {"model_type": "granite", "rope_parameters": WHOLE_LONGROPE, "original_max_position_embeddings": 160},
    ),
    Family("nemotron", {"model_type": "nemotron", "head_dim": 64}, sizes=WIDE),
    Family("olmo", {"model_type": "olmo"}),
    Family("olmo2", {"model_type": "olmo2"}),
    # Windows that transformers stores but does not use.
    Family("olmo2-unused-window", {"model_type": "olmo2"} | SLIDING_AND_FULL),
    Family("olmo2-yarn", {"model_type": "olmo2", "rope_parameters": YARN | {"original_max_position_embeddings": 64}}),
    Family("olmo3", {"model_type": "olmo3"} | SLIDING_AND_FULL),
    Family("phi", {"model_type": "phi", "partial_rotary_factor": 0.5}, sizes=WIDE),
    Family("stablelm", {"model_type": "stablelm"}, sizes=WIDE),
    Family("starcoder2", {"model_type": "starcoder2", "sliding_window": WINDOW}),
    Family("starcoder2-unused-kinds", {"model_type": "starcoder2"} | SLIDING_AND_FULL),
]
