"""Which tokens mark a prompt's parts, and in which order they stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.sources.fill_in_the_middle import find_marks, reorder
from model_export.sources.gguf.header import read_header
from model_export.sources.gguf.tokenizer import vocabulary_from_metadata
from model_export.sources.vocabulary import Vocabulary
from service import manifest
from service.manifest import FillInTheMiddle
from tests.model_export import tiny
from tests.model_export.extended import extend

FIRST = tiny.VOCAB
PSM = FillInTheMiddle(prefix=FIRST, suffix=FIRST + 1, middle=FIRST + 2)

FAMILIES: dict[str, tuple[list[str], FillInTheMiddle]] = {
    "Qwen2.5-Coder, CodeGemma": (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], PSM),
    "StarCoder, Granite": (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], PSM),
    "SantaCoder": (["<fim-prefix>", "<fim-suffix>", "<fim-middle>"], PSM),
    "DeepSeek-Coder": (["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"], PSM),
    "Code Llama": (["▁<PRE>", "▁<SUF>", "▁<MID>"], PSM),
    "Codestral": (
        ["[PREFIX]", "[SUFFIX]", "[MIDDLE]"],
        FillInTheMiddle(prefix=FIRST, suffix=FIRST + 1, middle=None, order="spm"),
    ),
}


def described(directory: Path, *names: str, **options: object) -> manifest.SpecialTokens:
    """The special tokens in the manifest of a tiny model with further tokens."""
    source = extend(tiny.hugging_face(directory / "Tiny"), *names)
    chosen = Options(**{"quantization": "float32"} | options)
    export(source, directory / "model", chosen, lambda label, total: lambda: None)
    return manifest.load(directory / "model").special_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_by_name(family: str, tmp_path: Path) -> None:
    """The manifest of each family's tokenizer has its tokens, in the order that the family was trained on."""
    names, marks = FAMILIES[family]
    assert described(tmp_path, *names).fill_in_the_middle == marks


def test_no_marks(tmp_path: Path) -> None:
    """A tokenizer with only some of the tokens has no marks, and its file separator ends no completion."""
    special = described(tmp_path, "<fim_prefix>", "<fim_suffix>", "<file_sep>")
    assert special.fill_in_the_middle is None
    assert special.end == (0,)


def test_ends_of_a_middle(tmp_path: Path) -> None:
    """If the model has the marks, the tokens that end a middle also end every completion."""
    names = [*FAMILIES["StarCoder, Granite"][0], "<file_sep>", "<fim_pad>", "<|other|>"]
    assert described(tmp_path, *names).end == (0, FIRST + 3, FIRST + 4)


@pytest.mark.parametrize("order", ["psm", "spm"])
def test_order_as_asked(order: str, tmp_path: Path) -> None:
    """`--fim-order` overrides the order that follows from the names."""
    marks = described(tmp_path, *FAMILIES["SantaCoder"][0], fim_order=order).fill_in_the_middle
    assert marks == PSM.model_copy(update={"order": order})


def test_no_order_without_a_token_for_the_middle() -> None:
    """The order prefix, suffix, middle needs a token before the middle."""
    suffix_first = FAMILIES["Codestral"][1]
    assert reorder(suffix_first, "spm") == suffix_first
    with pytest.raises(ExportError, match="needs a token before the middle"):
        reorder(suffix_first, "psm")


def gguf_vocabulary(path: Path, **ids: int) -> Vocabulary:
    """The vocabulary of a GGUF file that declares letters as special tokens."""
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tiny.TOKENS)
    writer.add_token_types([3] + [1] * (tiny.VOCAB - 1))
    writer.add_token_merges([" ".join(merge) for merge in tiny.MERGES])
    writer.add_eos_token_id(0)
    for name, index in ids.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", index)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return vocabulary_from_metadata(read_header(path).metadata)


@pytest.mark.parametrize("names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_marks_of_gguf_metadata(names: tuple[str, str, str], tmp_path: Path) -> None:
    """A GGUF file may declare the marks under the current keys or those of older files; their names do not matter."""
    vocabulary = gguf_vocabulary(tmp_path / "file.gguf", **dict(zip(names, (7, 8, 9), strict=True)))
    marks = find_marks(vocabulary.tokenizer, vocabulary.marks)
    assert marks == FillInTheMiddle(prefix=7, suffix=8, middle=9, order="psm")
    assert vocabulary.end == (0,)


def test_ends_of_gguf_metadata(tmp_path: Path) -> None:
    """Declared padding, repository and file separators end a completion; with only half of the marks there are none."""
    vocabulary = gguf_vocabulary(tmp_path / "file.gguf", fim_pre=7, fim_pad=10, fim_rep=11, fim_sep=12)
    assert vocabulary.end == (0, 10, 11, 12)
    assert find_marks(vocabulary.tokenizer, vocabulary.marks) is None
