"""GGUF vocabularies beside llama.cpp, whose answers llama_cpp/record.py has recorded in llama_cpp/recorded.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from model_export.errors import ExportError
from model_export.opening import read_source
from model_export.sources.gguf import pre_tokenizers
from model_export.sources.gguf.pre_tokenizers import PRE_TOKENIZERS, TOLD_BY_TOKENS, pre_tokenizer_name
from model_export.sources.vocabulary import Vocabulary
from service.text.decoding import Decoding
from tests.model_export.llama_cpp.record import RECORDED
from tests.model_export.llama_cpp.vocabularies import BYTE_LEVEL, DECODED, ENDS, TEXTS, byte_level, sentence_piece

ANSWERS = json.loads(RECORDED.read_text(encoding="utf-8"))
# Names that the recorded version does not know yet, and those whose way it has changed since.
NEWER = {name for name, way in ANSWERS["names"].items() if way is None}
# llama.cpp approximates the classes of letters of these patterns: it keeps no marks with their letters. It does not
# compose marks with their letters, as Qwen's own tokenizer does.
APPROXIMATED = ("tekken", "gpt-4o", "llama4", "kanana2", "minimax-m2", "qwen2")
MARKED = [text for text in TEXTS if "\u0301" in text or "हि" in text]


def read(vocabulary: object, folder: Path) -> Vocabulary:
    """The exporter's reading of a vocabulary in a file."""
    return read_source(vocabulary.write(folder / "Tiny.gguf")).origin.vocabulary


@pytest.mark.parametrize("case", ENDS)
def test_end_tokens(case: str, tmp_path: Path) -> None:
    """The tokens that end a completion are those of llama.cpp's is_eog."""
    assert list(read(ENDS[case], tmp_path).end) == ANSWERS["ends"][case]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_how_texts_are_cut(name: str, tmp_path: Path) -> None:
    """A text has the ids that llama.cpp gives it under the same name."""
    vocabulary = read(byte_level(pre=name), tmp_path)
    if name in NEWER:
        pytest.skip(f"{ANSWERS['llama.cpp']} does not know {name}")
    way = ANSWERS["ways"][ANSWERS["names"][name]]
    assert vocabulary.add_bos is way["begins"]
    vocabulary.tokenizer.encode_special_tokens = True
    for text, ids in zip(TEXTS, way["ids"], strict=True):
        if name not in APPROXIMATED or text not in MARKED:
            assert vocabulary.tokenizer.encode(text, add_special_tokens=False).ids == ids, text


def pieces(tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """The text of each token within a text."""
    decoding = Decoding(tokenizer, count)
    for index in range(count):
        yield decoding.of_token(index).decode("utf-8", "replace")


@pytest.mark.parametrize("case", DECODED)
def test_decoding(case: str, tmp_path: Path) -> None:
    """Each token has llama.cpp's text, and texts have its ids, with control tokens read and not."""
    answer, vocabulary = ANSWERS["decoded"][case], read(DECODED[case], tmp_path)
    assert list(pieces(vocabulary.tokenizer, len(DECODED[case].tokens))) == answer["pieces"]
    for read_control, part in ((False, "plain"), (True, "read")):
        vocabulary.tokenizer.encode_special_tokens = not read_control
        for text, ids in answer[part].items():
            assert vocabulary.tokenizer.encode(text, add_special_tokens=False).ids == ids, text
    ids = np.random.default_rng(7).integers(0, len(DECODED[case].tokens), 300).tolist()
    if case == "byte-level":  # in the others the library replaces whole runs of bytes that are no UTF-8
        decoded = b"".join(map(Decoding(vocabulary.tokenizer, 2000).of_token, ids)).decode("utf-8", "replace")
        assert vocabulary.tokenizer.decode(ids, skip_special_tokens=False) == decoded


SIGNED = {name: max(signs) + 1 for name, signs in TOLD_BY_TOKENS.items()}


@pytest.mark.parametrize("name", TOLD_BY_TOKENS)
def test_families_told_by_tokens(name: str) -> None:
    """Where the key is missing, tokens that only one family has tell its way to cut texts."""
    tokens = [f"@{index}" for index in range(SIGNED[name])]
    for index, token in TOLD_BY_TOKENS[name].items():
        tokens[index] = token
    assert pre_tokenizer_name(None, tokens) == name
    tokens[min(TOLD_BY_TOKENS[name])] = "other"
    with pytest.raises(ExportError, match=pre_tokenizers.KEY):
        pre_tokenizer_name(None, tokens)


def test_missing_name(tmp_path: Path) -> None:
    """Any other file without the key is refused by a sentence that names the key, a tool and the names."""
    made = byte_level()
    del made.keys["pre"]
    with pytest.raises(ExportError) as caught:
        read(made, tmp_path)
    message = str(caught.value)
    assert "Tiny.gguf" in message
    assert "tokenizer.ggml.pre is missing" in message
    assert "gguf-new-metadata --pre-tokenizer" in message
    assert all(name in message for name in PRE_TOKENIZERS)


def test_unknown_name(tmp_path: Path) -> None:
    """So is one with a name that llama.cpp has and the exporter has not."""
    with pytest.raises(ExportError, match=r"tokenizer.ggml.pre is 'kimi-k2', which is not supported; supported are ll"):
        read(byte_level(pre="kimi-k2"), tmp_path)


def test_control_tokens_are_not_joined(tmp_path: Path) -> None:
    """Pieces of a text never join into a control token (google/sentencepiece#102), unknown, byte or unused one."""
    vocabulary = read(sentence_piece({"</a>": 3, "</": 1, "a>": 1, "<": 1, "/": 1}), tmp_path)
    vocabulary.tokenizer.encode_special_tokens = True
    for token in ("</s>", "</a>", "<unk>", "<0x41>"):
        assert vocabulary.tokenizer.encode(token, add_special_tokens=False).tokens != ["▁", token], token
        assert vocabulary.tokenizer.token_to_id(token) not in vocabulary.tokenizer.encode(f"x{token}").ids


def test_letters_that_stand_for_bytes(tmp_path: Path) -> None:
    """A word that was added in its letters is decoded as that word."""
    vocabulary = read(byte_level({"ção": 4}), tmp_path)
    assert vocabulary.tokenizer.decode([len(BYTE_LEVEL)]) == "ção"
