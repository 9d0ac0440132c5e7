"""Files like those of public reports, one row each: the report, what is in the file, and what comes of it here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model_export.errors import ExportError
from model_export.opening import read_source
from tests.model_export import tiny
from tests.model_export.bad_gguf import string, u32
from tests.model_export.bad_sources import content, hugging_face, no_tokenizer, single, written
from tests.model_export.gguf_files import Gguf, Maker, gguf, keys
from tests.model_export.llama_cpp import vocabularies

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
IS_POINTER = "it looks like a Git LFS pointer: fetch the file itself with `git lfs pull`"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TYPE, PRE = "general.type", "tokenizer.ggml.pre"
ADAPTER = "Tiny holds an adapter (adapter_config.json); merge it into its model first"
ADAPTED = "general.type is 'adapter': it holds an adapter; merge it into its model first"
QUANTIZED = "weights that are already quantized ({}) are supported only as GGUF"
EXPERTS = "its layers choose among experts"


def renamed(change: Callable[[str], str | None], **entries: object) -> Maker:
    """A directory with one weight file, its tensors under other names; None leaves one out."""

    def rename(path: Path) -> Path:
        single({})(path)
        config = json.loads((path / "config.json").read_text()) | entries
        (path / "config.json").write_text(json.dumps(config))
        tensors = {change(name): each for name, each in load_file(path / "model.safetensors").items()}
        save_file({name: each for name, each in tensors.items() if name}, path / "model.safetensors")
        return path

    return rename


def lora(path: Path) -> Path:
    """A directory as PEFT saves an adapter: without a config.json."""
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    return path


def only_gguf(path: Path) -> Path:
    path.mkdir()
    (path / "Model-Q4_0.gguf").write_bytes(b"GGUF")
    return path


def with_bom(path: Path) -> None:
    (path / "config.json").write_bytes(b"\xef\xbb\xbf" + (path / "config.json").read_bytes())


def twice(path: Path) -> None:
    text = (path / "config.json").read_text()
    (path / "config.json").write_text('{"vocab_size": 1, ' + text[1:])


def integers(name: str) -> Maker:
    return single({name: np.zeros((8, 8), np.int32)})


def key(name: str, value: bytes) -> Maker:
    return keys({name: value})


def columns(path: Path) -> Path:
    """A feed-forward of 172."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(tiny, "INTERMEDIATE", 172)
        return tiny.hugging_face(path)


def unsigned(path: Path) -> Path:
    """The embedding as MLX packs it: eight weights in each number."""
    return single({EMBED: np.zeros((tiny.VOCAB, 8), np.uint32)})(path)


def scored(path: Path) -> Path:
    """A model that classifies texts: it has no head for tokens."""
    single({"score.weight": np.zeros((2, tiny.HIDDEN), np.float32)})(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return path


def without_pre(model: Gguf) -> None:
    model.drop(PRE)


def vocabulary(tokens: dict[str, int]) -> Maker:
    return lambda path: vocabularies.byte_level(tokens).write(path)


# The report ("-": none), what is in the file, the file, and words of the refusal; None where the source is read.
# fmt: off
REPORTS: list[tuple[str, str, Maker, str | None]] = [
    ("ggml-org/llama.cpp#2708", "feed-forward of 172", columns, None),
    ("vllm-project/vllm#336", "head size 100", hugging_face(head_dim=100), "config.json: the head size is 100, supported are"),
    ("vllm-project/vllm#336", "head size 100 as GGUF", key("llama.attention.key_length", u32(100)), "the head size is 100, supported"),
    ("ggml-org/llama.cpp#6920", "no pre-tokenizer", gguf(without_pre), "tokenizer.ggml.pre is missing"),
    ("ollama/ollama#17698", "pre-tokenizer default", key(PRE, string("default")), None),
    ("-", "unknown pre-tokenizer", key(PRE, string("x")), "tokenizer.ggml.pre is 'x', which is not supported; supported are llama-bpe"),
    ("apple/coreai-models#25", "<end_of_turn>, no key", vocabulary({"<end_of_turn>": 3}), None),
    ("ggml-org/llama.cpp#1084", "adapter without a model", lora, ADAPTER),
    ("lm-sys/FastChat#502", "adapter beside a model", written("adapter_config.json", "{}"), ADAPTER),
    ("-", "adapter as GGUF", key(TYPE, string("adapter")), ADAPTED),
    ("-", "importance matrix", key(TYPE, string("imatrix")), "it holds an importance matrix"),
    ("huggingface/transformers#27923", "LFS pointer as weights", written("model-0.safetensors", POINTER), IS_POINTER),
    ("huggingface/transformers#27923", "LFS pointer as tokenizer", written("tokenizer.json", POINTER), IS_POINTER),
    ("huggingface/transformers#27923", "LFS pointer as config", written("config.json", POINTER), IS_POINTER),
    ("huggingface/transformers#27923", "LFS pointer as GGUF", content(POINTER.encode()), IS_POINTER),
    ("-", "web page as GGUF", content(b"<!DOCTYPE html>"), "it looks like a web page"),
    ("-", "directory with only a GGUF", only_gguf, "no config.json, but a GGUF file, which is a source itself"),
    ("ggml-org/llama.cpp#10965", "AWQ", hugging_face(quantization_config={"quant_method": "awq"}), QUANTIZED.format("awq")),
    ("ggml-org/llama.cpp#22431", "MLX", hugging_face(quantization={"bits": 4}), QUANTIZED.format("4 bits")),
    ("ggml-org/llama.cpp#7505", "GPTQ without its settings", integers("model.layers.0.mlp.up_proj.qweight"), "so it is already quantized"),
    ("ml-explore/mlx#887", "MLX without its settings", unsigned, "holds U32, so it is already quantized"),
    ("ggml-org/llama.cpp#5095", "no tokenizer.json", hugging_face(no_tokenizer), "a slow tokenizer has to be converted first"),
    ("ggml-org/llama.cpp#9211", "names without model.", renamed(lambda name: name.removeprefix("model.")), None),
    ("-", "names of a compiled model", renamed(lambda name: f"_orig_mod.{name}"), f"has no tensor {EMBED}, but a tensor _orig_mod.model."),
    ("-", "names of an adapted model", renamed(lambda name: f"base_model.model.{name}"), f"has no tensor {EMBED}, but a tensor base_model."),
    ("-", "no head", hugging_face(tie_word_embeddings=False), f"has no tensor {HEAD}"),
    ("-", "classification head", scored, f"has no tensor {HEAD}, but a tensor score.weight, which a llama model does not have"),
    ("-", "tied, only the head stored", renamed(lambda name: HEAD if name == EMBED else name), None),
    ("-", "experts in llama", key("llama.expert_count", u32(8)), f"llama.expert_count is 8: {EXPERTS}"),
    ("-", "family without GGUF files", key("general.architecture", string("olmo")), "as a Hugging Face directory, not as a GGUF file"),
    ("-", "unknown family as GGUF", key("general.architecture", string("x")), "supported are llama, qwen2, qwen3, smollm3, phi3, seed_oss, gemma3, and"),
    ("-", "config.json with a BOM", hugging_face(with_bom), None),
    ("-", "config.json with a key twice", hugging_face(twice), None),
    ("-", "bos_token_id as a list", hugging_face(bos_token_id=[0]), "bos_token_id is [0], expected a whole number"),
]
# fmt: on


@pytest.mark.parametrize(
    ("report", "what", "make", "message"), [pytest.param(*row, id=f"{row[0]} {row[1]}") for row in REPORTS]
)
def test_reports(report: str, what: str, make: Maker, message: str | None, tmp_path: Path) -> None:
    """A source is read, or refused by a sentence that says what it is and what is supported."""
    source = make(tmp_path / "Tiny")
    if message is None:
        assert read_source(source).dimensions.layers > 0
        return
    with pytest.raises(ExportError) as caught:
        read_source(source)
    assert message in str(caught.value)
    assert "Tiny" in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_snapshot_has_the_models_name(tmp_path: Path) -> None:
    """A directory in the hub's cache is exported under the model's name, not under its commit."""
    snapshot = tmp_path / "models--Somebody--Tiny-1M" / "snapshots" / ("0123456789" * 4)
    snapshot.parent.mkdir(parents=True)
    tiny.hugging_face(snapshot)
    origin = read_source(snapshot).origin
    assert (origin.name, origin.organization) == ("Tiny-1M", "Somebody")
