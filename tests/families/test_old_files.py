"""Files as older versions of transformers saved them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_export.export import Options, export
from tests.families.families import FAMILIES
from tests.families.oracle import make

pytestmark = pytest.mark.families


def test_tables_of_gpt2(tmp_path: Path) -> None:
    """GPT-2's tables for masks, which nothing reads, and its tied head change nothing (ggml-org/llama.cpp#4888)."""
    source = make(next(family for family in FAMILIES if family.name == "gpt2"), tmp_path / "source")
    file = source / "model.safetensors"
    held = load_file(file)
    for layer in range(2):
        held[f"transformer.h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 256, 256), np.uint8))
        held[f"transformer.h.{layer}.attn.masked_bias"] = np.array(-1e4, np.float32)
    held["lm_head.weight"] = held["transformer.wte.weight"]
    save_file(held, file, metadata={"format": "pt"})
    made = export(source, tmp_path / "model", Options(quantization="float32"), lambda label, total: lambda: None)
    assert made.quality.kl < 1e-6
