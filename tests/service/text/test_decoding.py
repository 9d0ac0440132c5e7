"""Decoding is the tokenizer's own: the bytes of tokens, joined, are what the tokenizers library decodes."""

from __future__ import annotations

import codecs
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from service.text.decoding import Decoding, UnsupportedDecoderError
from service.text.transcript import Transcript
from tests.service.text.kinds import ADDED, CONTROL, KINDS, gemma, llama, unigram_like

MADE = {name: make() for name, make in KINDS.items()}
SIZE = max(made.get_vocab_size() for made in MADE.values()) + 5  # some rows of an embedding have no token
DECODINGS = {name: Decoding(made, SIZE) for name, made in MADE.items()}
CODE = ["def f(x):\n    return  x", "\t\n\n", " ", "  "]
PARTS = [*CODE, "日本語", "🚢👩\u200d👧", "é a\u0301", "\ufffd", "€", "'s", *CONTROL, *ADDED]
TEXTS = st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=5)), max_size=6).map("".join)
IDS = st.lists(st.integers(0, SIZE - 1), max_size=20)


def own(made: Tokenizer, ids: list[int]) -> str:
    """The library's text of `ids`, in which whole characters of a run of byte tokens stay if the run is not UTF-8."""
    if "ByteFallback" not in str(made.decoder):
        return made.decode(ids, skip_special_tokens=False)
    tokens = [token for token in map(made.id_to_token, ids) if token is not None]
    parts = []
    for are_bytes, group in itertools.groupby(tokens, key=lambda token: bool(re.fullmatch("<0x..>", token))):
        run = list(group)
        parts += [bytes(int(token[3:5], 16) for token in run).decode("utf-8", "replace")] if are_bytes else run
    return made.decoder.decode(parts)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_whole_texts(kind: str, text: str) -> None:
    """The tokens of a text decode to what the library decodes them to, with and without control tokens in it."""
    made = MADE[kind]
    for read in (False, True):
        made.encode_special_tokens = not read
        ids = made.encode(text, add_special_tokens=False).ids
        joined = b"".join(DECODINGS[kind].of_text(ids))
        assert joined.decode("utf-8", "replace") == made.decode(ids, skip_special_tokens=False) == own(made, ids)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=IDS)
def test_ids_and_streams(kind: str, ids: list[int]) -> None:
    """So do any ids, at once and one by one, also where their bytes are no UTF-8."""
    parts = list(DECODINGS[kind].of_text(ids))
    assert len(parts) == len(ids)
    assert b"".join(parts).decode("utf-8", "replace") == own(MADE[kind], ids)
    transcript = Transcript()
    streamed = "".join(transcript.push(part).text for part in parts) + transcript.finish().text
    assert streamed == codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(parts))


def spelled(made: Tokenizer, *tokens: str) -> list[int]:
    return [made.token_to_id(token) for token in tokens]


def test_marks_in_added_tokens_are_spaces() -> None:
    """Indented code comes back, and a stop text of spaces matches (ggml-org/llama.cpp#8228)."""
    made = gemma()
    ids = spelled(made, "def"[:2], "f", "▁▁▁▁", "return", "▁▁", "a")
    decoding = Decoding(made, SIZE)
    assert b"".join(decoding.of_text(ids)) == b"def    return  a"
    transcript = Transcript(stops=["    "])
    assert [transcript.push(decoding.of_token(index)).stopped for index in ids[:3]] == [False, False, True]


def test_byte_names_without_fallback_are_text() -> None:
    """A token named like a byte is text where the decoder has no bytes."""
    made = unigram_like()
    assert Decoding(made, SIZE).of_token(made.token_to_id("<0xE2>")) == b"<0xE2>"
    made = llama()
    assert Decoding(made, SIZE).of_token(made.token_to_id("<0xE2>")) == b"\xe2"


REFUSED = {
    "WordPiece": (decoders.WordPiece(), "decoder WordPiece needs more than one token at a time"),
    "CTC": (decoders.CTC(), "decoder CTC needs more than one token at a time"),
    "BPEDecoder": (decoders.BPEDecoder(), "decoder BPEDecoder needs more than one token at a time"),
    "replaced across tokens": (
        decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        "decoder Replace follows one that joins tokens",
    ),
    "bytes replaced": (
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()]),
        "decoder Metaspace follows one that joins tokens",
    ),
    "end of a text": (
        decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 0, 1)]),
        "decoder Strip removes 1 characters at the end, supported is 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_streamed(case: str) -> None:
    """A decoder that looks at several tokens at once is refused."""
    decoder, message = REFUSED[case]
    made = Tokenizer(models.BPE({"a": 0}, []))
    made.add_tokens([AddedToken("<s>")])
    made.decoder = decoder
    with pytest.raises(UnsupportedDecoderError, match=re.escape(message)):
        Decoding(made, 2)
