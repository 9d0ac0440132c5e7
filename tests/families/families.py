"""Every family of models that is proven: one entry each."""

from __future__ import annotations

from tests.families.family import Family

FAMILIES = [
    Family("llama", {"model_type": "llama", "tie_word_embeddings": False}, tokenizer="prepend", add_bos=True),
    Family("mistral", {"model_type": "mistral", "sliding_window": None}, tokenizer="metaspace", add_bos=True),
    Family("qwen2", {"model_type": "qwen2", "tie_word_embeddings": True}),
    Family("qwen3", {"model_type": "qwen3", "head_dim": 32}),
]
