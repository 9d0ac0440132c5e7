"""What cannot be exported is refused, with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType

from model_export.__main__ import main
from model_export.sources.families import MOBIUS, NATIVE, NATIVE_GGUF, REFUSED
from tests.model_export import tiny
from tests.support.stack import ROOT

REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": ({}, "recurrent layers"),
    "jamba": ({}, "recurrent layers"),
    "granitemoehybrid": ({}, "recurrent layers"),
    "qwen3_next": ({}, "recurrent layers"),
    "rwkv": ({}, "recurrent layers"),
    "deepseek_v3": ({}, "latent attention (MLA)"),
    "minicpm3": ({}, "latent attention (MLA)"),
    "t5": ({}, "encodes a whole text first"),
    "mixtral": ({}, "choose among experts"),
    "llava": ({}, "more than text"),
    "bloom": ({}, "biased by distance"),
    "unheard_of": ({}, f"supported are {', '.join(NATIVE)}"),
    "unheard of, with experts": ({"num_local_experts": 8}, "choose among experts"),
    "unheard of, with images": ({"vision_config": {"depth": 2}}, "more than text"),
    "unheard of, latent": ({"kv_lora_rank": 512}, "latent attention (MLA)"),
    "unheard of, in two parts": ({"is_encoder_decoder": True}, "encodes a whole text first"),
}


def refused(source: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one sentence with which the exporter refuses a source; nothing may be left behind."""
    assert main([str(source), str(target / "model")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not target.exists() or not any(target.iterdir())
    return error


@pytest.mark.parametrize("family", REASONS)
def test_family_is_refused(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A directory of a family that the engine cannot run is refused with the reason."""
    source = tiny.hugging_face(tmp_path / "source")
    changes, reason = REASONS[family]
    (source / "config.json").write_text(json.dumps(tiny.config(family, **changes)))
    error = refused(source, tmp_path / "out", capsys)
    assert f"architecture {family!r} is not supported" in error
    assert reason in error


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("mamba", "recurrent"),
        ("deepseek2", "MLA"),
        ("gptj", "supported are"),
        ("mistral", "as a Hugging Face directory, not as a GGUF file"),  # such files say llama
    ],
)
def test_gguf_family_is_refused(family: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So is a GGUF file, by its `general.architecture`."""
    source = tiny.gguf(tmp_path / "tiny.gguf", GGMLQuantizationType.F32, architecture=family)
    assert reason in refused(source, tmp_path / "out", capsys)


def test_tables_agree() -> None:
    """No family is built twice, or built and refused, and the documents name every one that is built."""
    built = [*NATIVE, *MOBIUS]
    assert tiny.FAMILIES.keys() == NATIVE.keys()
    assert {family for family, shape in tiny.SHAPES.items() if shape.gguf} == set(NATIVE_GGUF)
    assert set(tiny.ONLY_GGUF) <= set(MOBIUS)
    assert len(set(built)) == len(built)
    assert not set(built) & set(REFUSED)
    documented = set(re.findall(r"`([a-z0-9_]+)`", (ROOT / "docs" / "models.md").read_text()))
    assert set(built) <= documented
    assert set(NATIVE_GGUF) <= documented & set(MODEL_ARCH_NAMES.values())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "config.json: hidden_act is 'gelu', supported are silu and swish"),
        ({"family": "phi3", "partial_rotary_factor": 0.3}, "rotating 9 of a head's 32 numbers is not supported"),
        ({"family": "phi3", "partial_rotary_factor": 0.0}, "rotating 0 of a head's 32 numbers is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported in llama, only in phi3"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5 is not supported in llama"),
        (
            {"family": "phi3", "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            "rope_type is 'linear', supported in phi3 are default, longrope, su, yarn",
        ),
        ({"rope_scaling": {"type": "su"}}, "rope_type is 'su', supported in llama are default"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
            "a rotary scaling of its own for layers of the type 'full_attention'",
        ),
        (
            {"family": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "layer_types have windows, but no sliding_window is in use",
        ),
        ({"family": "mistral", "sliding_window": 0}, "sliding_window is 0, expected at least 1"),
        ({"max_position_embeddings": 1 << 22, "head_dim": 1024}, "expected at most 524288 positions"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized"),
        ({"family": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"family": "smollm3", "no_rope_layers": [1]}, "lists 1 layers, expected num_hidden_layers, 2"),
        ({"family": "phi3", "intermediate_size": 100}, "ffn_gate_up.weight has 192 rows, expected 200"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor has 1 entries, expected 16",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}},
            "YaRN is supported only with truncate true and mscale 0",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "YaRN needs a rotary base above 1",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 20.0}},
            "YaRN from 1 to 20 turns within 192 positions is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.0}},
            "rope_scaling.attention_factor is 0.0, expected",
        ),
    ],
)
def test_variant_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A variant of a supported family that cannot be built is refused, and the message says what is different."""
    family = changes.get("family", "llama")
    source = tiny.hugging_face(tmp_path / "source", family)
    rest = {key: value for key, value in changes.items() if key != "family"}
    (source / "config.json").write_text(json.dumps(tiny.config(family, **rest)))
    assert reason in refused(source, tmp_path / "out", capsys)
