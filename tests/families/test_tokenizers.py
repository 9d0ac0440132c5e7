"""Text prompts have the ids that transformers' tokenizers give them for the same directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_export.opening import read_source
from model_export.sources.hugging_face.config import TokenIds
from model_export.sources.hugging_face.read import vocabulary_from_directory
from service.manifest import SpecialTokens
from service.text.tokenizer import Tokenizer
from tests.families import vocabularies
from tests.families.test_families import TEXTS

pytestmark = pytest.mark.families

EDGES = [
    " leading",
    "  two",
    "two  spaces",
    "trailing ",
    "tab\tand\nlines\n\n",
    "\n",
    " ",
    "12345",
    "é",
    "🚢🚢",
    "a\u0301",
]
CLASSES = ["LlamaTokenizer", "GemmaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer"]


def served(directory: Path) -> Tokenizer:
    """The service's tokenizer of a directory that the exporter has read."""
    config = TokenIds.model_validate_json((directory / "config.json").read_text())
    vocabulary = vocabulary_from_directory(directory, config, TokenIds())
    path = directory / "exported.json"
    vocabulary.tokenizer.save(str(path))
    special = SpecialTokens(bos=vocabulary.bos, add_bos=vocabulary.add_bos, end=vocabulary.end, default_prompt=None)
    return Tokenizer(path, special, vocabularies.VOCAB)


def check(directory: Path, family: str) -> None:
    """Every text has the same ids in both tokenizers, and the ids the same text."""
    from transformers import AutoTokenizer

    (directory / "config.json").write_text(json.dumps({"model_type": family, "bos_token_id": 1, "eos_token_id": 2}))
    ours, theirs = served(directory), AutoTokenizer.from_pretrained(directory)
    for text in [*TEXTS, *EDGES]:
        ids = list(theirs(text).input_ids)
        assert list(ours.prompt(text).token_ids) == ids, text
        decoded = b"".join(ours.text_bytes(ids)).decode()
        assert decoded == theirs.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False), text


@pytest.mark.parametrize("kind", vocabularies.KINDS)
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("says", [True, False, None])
def test_each_kind(kind: str, begins: bool, says: bool | None, tmp_path: Path) -> None:
    """Tokenizers of each type, with and without a beginning token, whatever `add_bos_token` says."""
    vocabularies.tokenizer(kind, begins).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    settings |= {} if says is None else {"add_bos_token": says}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    check(tmp_path, "llama")


# What config.json, generation_config.json and tokenizer_config.json say of end tokens, None where they say nothing, and
# the tokens that end a completion.
ENDS: dict[str, tuple[Any, Any, str | None, tuple[int, ...]]] = {
    "config": (2, None, None, (2,)),
    "config's list": ([2, 5], None, None, (2, 5)),
    "generation": (2, 5, None, (5,)),
    "generation's list": (2, [5, 7], None, (5, 7)),
    "tokenizer": (2, None, "th", (2, 259)),
    "tokenizer alone": (None, None, "</s>", (2,)),
    "all": (2, [5], "th", (5, 259)),
}


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens(case: str, tmp_path: Path) -> None:
    """Completions end at the tokens at which transformers' generation ends, and at the tokenizer's own end token."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config, generation, own, expected = ENDS[case]
    vocabularies.tokenizer("prepend", add_bos=False).save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | ({} if own is None else {"eos_token": own})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    described = AutoConfig.for_model("llama", **sizes, vocab_size=vocabularies.VOCAB, eos_token_id=config)
    AutoModelForCausalLM.from_config(described).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id
    ends = {*(theirs if isinstance(theirs, list) else [theirs]), AutoTokenizer.from_pretrained(tmp_path).eos_token_id}
    assert ends - {None} == set(expected)
    assert read_source(tmp_path).origin.vocabulary.end == expected


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("begins", [True, False])
def test_each_class(name: str, begins: bool, tmp_path: Path) -> None:
    """Tokenizers that transformers' own classes make and save."""
    import transformers

    kind = "bare" if name in ("LlamaTokenizer", "GemmaTokenizer") else "byte-level"
    model = json.loads(vocabularies.tokenizer(kind, begins).to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    made = getattr(transformers, name)(
        vocab=model["vocab"],
        merges=merges,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>" if kind == "bare" else "</s>",
        add_bos_token=begins,
    )
    made.save_pretrained(tmp_path)
    check(tmp_path, {"LlamaTokenizer": "llama", "GemmaTokenizer": "gemma", "GPT2Tokenizer": "gpt2"}.get(name, "qwen2"))
