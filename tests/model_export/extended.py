"""Tiny models with more tokens than their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

EMBEDDING = "model.embed_tokens.weight"


def extend(directory: Path, *names: str) -> Path:
    """Adds special tokens of these names to a Hugging Face directory, after all others."""
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = json.loads((directory / "config.json").read_text())
    settings["vocab_size"] += len(names)
    (directory / "config.json").write_text(json.dumps(settings))
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if EMBEDDING in tensors:
            old = tensors[EMBEDDING]
            rows = np.random.default_rng(11).normal(0, old.std(), (len(names), old.shape[1])).astype(old.dtype)
            save_file(tensors | {EMBEDDING: np.concatenate([old, rows])}, path)
    return directory
