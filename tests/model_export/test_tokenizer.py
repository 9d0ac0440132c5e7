"""Tokenizers rebuilt from GGUF metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGUFWriter
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from model_export.sources.gguf.header import read_header
from model_export.sources.gguf.pre_tokenizers import PRE_TOKENIZERS
from model_export.sources.gguf.tokenizer import merges_by_score, vocabulary_from_metadata
from model_export.sources.vocabulary import Vocabulary

SENTENCE_PIECES = {
    "<unk>": 0.0,
    "<s>": 0.0,
    "</s>": 0.0,
    "▁": -9.0,
    "a": -9.1,
    "b": -9.2,
    "c": -9.3,
    "ab": -2.0,
    "bc": -1.0,
    "▁a": -3.0,
    "abc": -4.0,
}


def sentence_piece(path: Path) -> Vocabulary:
    """A SentencePiece vocabulary of a few pieces and all bytes."""
    pieces = SENTENCE_PIECES | {f"<0x{byte:02X}>": 0.0 for byte in range(256)}
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(pieces))
    writer.add_token_scores(list(pieces.values()))
    writer.add_token_types([2, 3, 3] + [1] * 8 + [6] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return vocabulary_from_metadata(read_header(path).metadata)


@pytest.fixture(scope="module")
def default_tokenizer(model_dir: Path) -> Tokenizer:
    """The default model's tokenizer, which its GGUF file holds only as metadata."""
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [19556, 28, 905, 17]),
        ("In 1234, it's 5€", [788, 216, 33, 34, 35, 36, 28, 357, 506, 216, 37, 14195]),
        (" — naïve 👩‍👧", [1841, 15486, 46494, 15107, 235, 119, 321, 231, 10813, 235, 117]),
        ("  def f(x):\n\treturn x**2\n", [216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 828, 34, 198]),
        ("<|im_start|>user\nHi<|im_end|>", [1, 4093, 198, 26843, 2]),
        ("日本 Кошка", [23274, 115, 40993, 5470, 244, 6485, 37123, 34536]),
    ],
)
def test_default_tokens(default_tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    """The default tokenizer gives the ids that llama.cpp gives for the same file."""
    assert default_tokenizer.encode(text, add_special_tokens=False).ids == ids


@given(text=st.text(st.characters(max_codepoint=0xFFFF, categories=("L", "M", "N", "P", "S", "Z"))))
def test_default_round_trip(default_tokenizer: Tokenizer, text: str) -> None:
    """Decoding restores the encoded text; only rare bytes, of controls and later planes, have no token."""
    ids = default_tokenizer.encode(text, add_special_tokens=False).ids
    assert default_tokenizer.decode(ids, skip_special_tokens=False) == text


def test_best_score_merges_first(tmp_path: Path) -> None:
    """A SentencePiece vocabulary joins the pair with the best score, not the first pair."""
    encoded = sentence_piece(tmp_path / "pieces.gguf").tokenizer.encode("abc", add_special_tokens=False)
    assert encoded.tokens == ["▁a", "bc"]


def test_unknown_characters_fall_back_to_bytes(tmp_path: Path) -> None:
    """A character outside a SentencePiece vocabulary becomes its UTF-8 bytes, and decoding restores it."""
    tokenizer = sentence_piece(tmp_path / "pieces.gguf").tokenizer
    encoded = tokenizer.encode("aé", add_special_tokens=False)
    assert encoded.tokens == ["▁a", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(encoded.ids) == "aé"


def test_special_tokens_of_sentence_piece(tmp_path: Path) -> None:
    """A SentencePiece model begins texts with its bos token by default, and its eos token ends them."""
    vocabulary = sentence_piece(tmp_path / "pieces.gguf")
    assert (vocabulary.bos, vocabulary.add_bos, vocabulary.end) == (1, True, (2,))
    assert vocabulary.tokenizer.encode("<s>a", add_special_tokens=False).ids[0] == 1


@pytest.mark.parametrize(
    ("split", "pieces"),
    [
        ("llama-bpe", ["HelloWorld", "Ġit", "'s", "Ġ", "123", "45", "?!Ċ", "/x"]),
        ("dbrx", ["HelloWorld", "Ġit", "'s", "Ġ", "123", "45", "?!Ċ", "/x"]),
        ("qwen2", ["HelloWorld", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "5", "?!Ċ", "/x"]),
        ("seed-coder", ["HelloWorld", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "5", "?!", "Ċ", "/x"]),
        ("tekken", ["Hello", "World", "Ġit", "'s", "Ġ", "1", "2", "3", "4", "5", "?!Ċ/", "x"]),
        ("gpt-4o", ["Hello", "World", "Ġit's", "Ġ", "123", "45", "?!Ċ/", "x"]),
    ],
)
def test_how_texts_are_cut(split: str, pieces: list[str]) -> None:
    """Each type of byte-level tokenizer splits a text as its family does before it merges bytes."""
    cut = PRE_TOKENIZERS[split].build().pre_tokenize_str("HelloWorld it's 12345?!\n/x")
    assert [piece for piece, _ in cut] == pieces


def test_merges_cover_every_split() -> None:
    """Every way to split a token into two others is a merge, the best-scored token first."""
    assert merges_by_score(["a", "b", "ab", "aba", "ba"], [0, 0, -1.0, -3.0, -2.0]) == [
        ("a", "b"),
        ("b", "a"),
        ("a", "ba"),
        ("ab", "a"),
    ]


def test_merges_make_no_control_token(tmp_path: Path) -> None:
    """Text that spells a control token stays text, also where the vocabulary has the pieces to make it of.

    `s>` is such a piece of a vocabulary that was trained on HTML; SentencePiece itself never makes `</s>` of it.
    """
    pieces = {"<unk>": 2, "<s>": 3, "</s>": 3, "<0x41>": 6, "ab": 5, **dict.fromkeys(["▁", "a", "b", "<", "/", "s"], 1)}
    pieces |= dict.fromkeys([">", "</", "s>", "▁a"], 1)
    tokens = list(pieces)
    merges = merges_by_score(tokens, [0.0] * len(tokens), pieces)
    assert {first + second for first, second in merges} == {"</", "s>", "▁a"}
    writer = GGUFWriter(tmp_path / "html.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(list(pieces.values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = vocabulary_from_metadata(read_header(tmp_path / "html.gguf").metadata).tokenizer
    tokenizer.encode_special_tokens = True
    assert tokenizer.encode("a</s>b", add_special_tokens=False).tokens == ["▁a", "</", "s>", "b"]
