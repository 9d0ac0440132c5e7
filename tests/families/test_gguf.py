"""GGUF files of families whose Hugging Face directories mobius-onnx builds."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from model_export.__main__ import main
from model_export.export import Options, export
from model_export.opening import read_source
from service.manifest import Manifest
from tests.families.families import FAMILIES
from tests.families.family import Family
from tests.families.oracle import Oracle, make
from tests.families.vocabularies import BOS, EOS, tokenizer

pytestmark = pytest.mark.families

ARCHITECTURES = {
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
# Entries that GGUF files do not have are the same for all models of a family.
UNSAID = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None},
    "gpt2": {},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family that can be read from GGUF files."""
    return named(request.param)


def named(name: str) -> Family:
    """A family with the entries that its GGUF files imply."""
    family = next(family for family in FAMILIES if family.name == name)
    return replace(family, config={**family.config, **UNSAID[name]})


def write(
    family: Family, oracle: Oracle, path: Path, keys: Mapping[str, Any] | None = None, extra: str | None = None
) -> None:
    """Writes the oracle's model as a GGUF file, its weights in float32, with `keys` of its family besides.

    `extra` is the name of a further tensor.
    """
    model = oracle.model
    config, architecture = model.config, ARCHITECTURES[family.name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(hidden)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_eps(1e-5)
    writer.add_layer_norm_rms_eps(1e-6)
    if family.name.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    if family.name == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    for key, value in (keys or {}).items():
        kind = gguf.GGUFValueType.UINT32 if type(value) is int else gguf.GGUFValueType.get_type(value)
        writer.kv_data[0].pop(f"{family.name}.{key}", None)
        writer.add_key_value(f"{family.name}.{key}", value, kind)
    _write_tokenizer(writer, family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if family.name.startswith("gemma") and "norm" in name:
            values = values + 1  # the file has the scale, transformers the scale minus one
        if family.name == "gpt2" and values.ndim == 2 and "transformer.h" in name:
            values = values.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    if extra is not None:
        writer.add_tensor(extra, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_tokenizer(writer: gguf.GGUFWriter, family: Family) -> None:
    made = tokenizer(family.tokenizer, family.add_bos)
    tokens = [made.id_to_token(index) or f"@{index}" for index in range(family.sizes["vocab_size"])]
    special = {made.token_to_id(BOS), made.token_to_id(EOS)}
    kinds = [gguf.TokenType.CONTROL if index in special else gguf.TokenType.NORMAL for index in range(len(tokens))]
    byte_level = family.tokenizer == "byte-level"
    writer.add_tokenizer_model("gpt2" if byte_level else "llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if byte_level:
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_merges(["t h", "Ġ th", "th e"])
    else:
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_add_space_prefix(False)
    writer.add_bos_token_id(made.token_to_id(BOS))
    writer.add_eos_token_id(made.token_to_id(EOS))
    writer.add_add_bos_token(family.add_bos)


def test_files_hold_what_directories_hold(family: Family, tmp_path: Path) -> None:
    """A family's GGUF file gives the logits of the directory that it was made from, and so does its export."""
    made = exported(family, {}, tmp_path)
    assert made.quality.kl < 1e-6


def exported(family: Family, keys: Mapping[str, Any], tmp_path: Path) -> Manifest:
    """The export of the family's GGUF file with `keys`, whose logits are those of the directory."""
    oracle = Oracle(make(family, tmp_path / "source"))
    path = tmp_path / "model-F32.gguf"
    write(family, oracle, path, keys)
    tokens = np.arange(100) % family.sizes["vocab_size"]
    expected = oracle.continuation(list(tokens), 1).logprobs
    logits = read_source(path).logits(tokens, lambda: None)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected, atol=family.tolerance)
    return export(path, tmp_path / "model", Options(quantization="float32"), lambda label, total: lambda: None)


LINEAR = {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
# Keys of rotary embeddings and windows, and the configuration with the same meaning.
SAID: dict[str, dict[str, Any]] = {
    "gemma2": {"rope_parameters": LINEAR},
    "gemma3": {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}},
}
ROTATION = {"rope.freq_base": 50000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
PATTERNS: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.sliding_window_pattern": 2},
    "gemma3": {"attention.sliding_window_pattern": [True] * 5 + [False], "rope.freq_base_swa": 10000.0},
}


@pytest.mark.parametrize("name", SAID)
def test_files_say_how_positions_turn(name: str, tmp_path: Path) -> None:
    """Keys of base and scaling have an effect, and keys with values that all models of the family share have none."""
    family = named(name)
    family = replace(family, config={**family.config, **SAID[name]})
    assert exported(family, {**ROTATION, **PATTERNS[name]}, tmp_path).quality.kl < 1e-6


REFUSED: dict[str, tuple[str, dict[str, Any], str | None, str]] = {
    "pattern": ("gemma2", {"attention.sliding_window_pattern": 3}, None, "sliding_window_pattern is 3, supported is 2"),
    "pattern of layers": (
        "gemma3",
        {"attention.sliding_window_pattern": [True] * 6},
        None,
        "sliding_window_pattern of [True, True, True, True, True, True] is not supported",
    ),
    "base in windows": ("gemma3", {"rope.freq_base_swa": 500.0}, None, "gemma3.rope.freq_base_swa of 500.0"),
    "yarn": ("gemma3", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, None, "rope.scaling.type of 'yarn'"),
    "rotations": (
        "gemma2",
        {"context_length": 1 << 22, "attention.key_length": 4096},
        None,
        "the context is 4194304 positions of a head of 4096 numbers",
    ),
    "not causal": ("gemma2", {"attention.causal": False}, None, "attention.causal is False"),
    "far layer": ("gemma2", {}, "blk.3000000.attn_norm.weight", "has a tensor blk.3000000.attn_norm.weight, which a"),
    "layer that is no number": ("gpt2", {}, "blk.x.attn_norm.weight", "has a tensor blk.x.attn_norm.weight, which a"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A key that contradicts the family, and a tensor that belongs to no layer, end in one sentence."""
    name, keys, extra, message = REFUSED[case]
    write(named(name), Oracle(make(named(name), tmp_path / "source")), tmp_path / "Tiny.gguf", keys, extra)
    assert message in refusal(tmp_path, capfd)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("gemma2", {"intermediate_size": 1 << 20}),
        ("gemma2", {"num_hidden_layers": 1000}),
        ("gpt2", {"n_positions": 1 << 20}),
        ("gpt2", {"n_layer": 1000}),
    ],
)
def test_lies_cost_no_memory(
    name: str, sizes: dict[str, int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file that claims other sizes than its tensors have is refused before anything is allocated."""
    oracle = Oracle(make(named(name), tmp_path / "source"))
    for key, size in sizes.items():
        setattr(oracle.model.config, key, size)
    write(named(name), oracle, tmp_path / "Tiny.gguf")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(tmp_path, capfd)
    assert "Tiny.gguf: " in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB


def refusal(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """The sentence with which the command line refuses the folder's file; nothing is left behind."""
    capfd.readouterr()
    assert main([str(folder / "Tiny.gguf"), str(folder / "out" / "model")]) == 2
    out, error = capfd.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith("model_export: ")
    assert not (folder / "out").exists()
    return error
