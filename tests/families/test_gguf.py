"""GGUF files of families whose graphs come from mobius-onnx."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from model_export.export import Options, export
from model_export.opening import read_source
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


# What files do not say is the same in all of a family's models.
UNSAID = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "num_hidden_layers": 6, "layer_types": None},
    "gpt2": {},
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest) -> Family:
    """Each family that has such files."""
    family = next(family for family in FAMILIES if family.name == request.param)
    return replace(family, config={**family.config, **UNSAID[family.name]})


def write(family: Family, oracle: Oracle, path: Path) -> None:
    """Writes the oracle's model as a GGUF file, its weights in float32."""
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
    _write_tokenizer(writer, family)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.numpy()
        if family.name.startswith("gemma") and "norm" in name:
            values = values + 1  # the file has the factors themselves
        if family.name == "gpt2" and values.ndim == 2 and "transformer.h" in name:
            values = values.T
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
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
        writer.add_token_merges(["t h", "Ġ th", "th e"])
    else:
        writer.add_token_scores([-float(index) for index in range(len(tokens))])
        writer.add_add_space_prefix(False)
    writer.add_bos_token_id(made.token_to_id(BOS))
    writer.add_eos_token_id(made.token_to_id(EOS))
    writer.add_add_bos_token(family.add_bos)


def test_files_hold_what_directories_hold(family: Family, tmp_path: Path) -> None:
    """A family's GGUF file has the logits of the directory that it was made of, and exports as near to them."""
    oracle = Oracle(make(family, tmp_path / "source"))
    path = tmp_path / "model-F32.gguf"
    write(family, oracle, path)
    tokens = np.arange(100) % family.sizes["vocab_size"]
    expected = oracle.continuation(list(tokens), 1).logprobs
    logits = read_source(path).logits(tokens, lambda: None)
    logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(logprobs, expected, atol=family.tolerance)
    made = export(path, tmp_path / "model", Options(quantization="float32"), lambda label, total: lambda: None)
    assert made.quality.kl < 1e-6
