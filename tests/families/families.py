"""Every family of models that is proven: one entry each."""

from __future__ import annotations

from tests.families.family import WINDOW, Family

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
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}

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
]
