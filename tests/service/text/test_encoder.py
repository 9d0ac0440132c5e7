"""Control tokens: read where they are to be read, and made of no text anywhere else."""

from __future__ import annotations

import time

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from service.errors import InvalidRequestError
from service.manifest import SpecialTokens
from service.text.tokenizer import Tokenizer
from service.types import Prompt

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
UNK, BOS, EOS, START = range(4)
# Characters and pieces of which control tokens can be made, and a few others.
PIECES = st.sampled_from(
    ["<", "/", "s", ">", "s>", "</", "<s", "|", "im", "_start", "<unk", " ", "a", "é", "☃", *CONTROL]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
PLAIN = SpecialTokens(bos=BOS, add_bos=False, end=(EOS,), default_prompt=BOS)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = ["▁", "<", "/", "s", ">", "a", "|", "u", "n", "k", "i", "m", "_", "t", "r"]


def made_by_merges():
    """A SentencePiece BPE that merges pieces into control tokens: `</` + `s>` is EOS, and `<` + `s>` is BOS."""
    vocabulary = [*CONTROL, *BYTES, *LETTERS, "s>", "</", "▁a", "<u", "nk", "nk>"]
    merges = [("s", ">"), ("<", "/"), ("</", "s>"), ("<", "s>"), ("▁", "a"), ("<", "u"), ("n", "k"), ("nk", ">")]
    merges.append(("<u", "nk>"))
    ids = {token: index for index, token in enumerate(vocabulary)}
    made = tokenizers.Tokenizer(models.BPE(ids, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return made, len(vocabulary), True


def made_of_scores():
    """A SentencePiece Unigram whose control tokens are pieces of score 0, the best there is."""
    pieces = [*((token, 0.0) for token in CONTROL), *((token, -3.0) for token in BYTES + LETTERS), ("s>", -2.0)]
    made = tokenizers.Tokenizer(models.Unigram(pieces, UNK, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made, len(pieces), True


def made_of_whole_words():
    """A byte-level BPE that takes a whole word from the vocabulary before it merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*CONTROL, *alphabet, "</"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("<", "/")], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return made, len(vocabulary), False


SPACED = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
KINDS = {"merges": made_by_merges, "scores": made_of_scores, "whole words": made_of_whole_words}


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    """The service's tokenizer, and the library's own that reads control tokens."""
    made, size, spaced = KINDS[request.param]()
    made.decoder = SPACED if spaced else decoders.ByteLevel()
    made.add_special_tokens(CONTROL)
    path = tmp_path_factory.mktemp("kind") / "tokenizer.json"
    made.save(str(path))
    return Tokenizer(path, PLAIN, size), made


def kept(library, text):
    """What of a text the library keeps: Metaspace takes a space at its start for the one that it adds."""
    return text.removeprefix(" ") if isinstance(library.pre_tokenizer, pre_tokenizers.Metaspace) else text


def text_of(tokenizer, ids):
    """The text of token ids."""
    return b"".join(tokenizer.text_bytes(ids)).decode()


@given(text=TEXTS)
def test_plain_text_never_becomes_a_control_token(both, text):
    """Whatever the vocabulary merges or prefers; and the text comes back."""
    tokenizer, library = both
    ids = tokenizer.encode(text)
    assert {BOS, EOS, START}.isdisjoint(ids)
    assert "<unk>" not in text or UNK not in ids
    assert text_of(tokenizer, ids) == kept(library, text)


@given(text=TEXTS)
def test_control_tokens_are_read_as_the_library_reads_them(both, text):
    """And the text is what the library decodes, which may have a space more after each control token."""
    tokenizer, library = both
    ids, implied = tokenizer.tokens([text], parse_special=True, add_special=True)
    assert (ids, implied) == (library.encode(text, add_special_tokens=False).ids, 0)
    assert text_of(tokenizer, ids) == library.decode(ids, skip_special_tokens=False)


@given(before=TEXTS, middle=TEXTS, after=TEXTS)
def test_parts_are_what_a_template_would_be(both, before, middle, after):
    """Where their texts name no control token, parts give the tokens of the same text read with its control tokens."""
    tokenizer, _ = both
    texts = [before, middle, after]
    ids, _ = tokenizer.tokens([before, [START], middle, [EOS], after], parse_special=False, add_special=True)
    assert [index for index in ids if index in {BOS, EOS, START}] == [START, EOS]
    if not any(name in text for text in texts for name in CONTROL):
        template = f"{before}<|im_start|>{middle}</s>{after}"
        assert ids == tokenizer.tokens([template], parse_special=True, add_special=True)[0]


@given(text=TEXTS, cut=st.integers(0, 40))
def test_parts_that_meet_make_no_control_token(both, text, cut):
    """Texts that follow one another are one text: what is cut in two does not become a control token where it meets."""
    tokenizer, _ = both
    assert tokenizer.prompt_of_parts([text[:cut], text[cut:]], add_special=True) == tokenizer.prompt(text)


def test_pieces_stay_as_they_are(both):
    """Only the merge into the control token is undone."""
    tokenizer, _ = both
    assert [tokenizer.token_text(index) for index in tokenizer.encode("a</s>")][-2:] in (
        ["<", "/s>"],
        ["/", "s>"],
        ["s", ">"],
    )


def test_unknown_characters_are_no_control_token(tmp_path):
    """The token for a character that the vocabulary lacks is that character's, and nothing is refused."""
    made = tokenizers.Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], unk_token="<unk>"))
    made.add_special_tokens(["<unk>"])
    made.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer(tmp_path / "tokenizer.json", PLAIN, 2).encode("a☃") == [1, 0]


def test_a_character_that_is_a_control_token(tmp_path):
    """It can be written as no other token: a text that needs it is refused."""
    made = tokenizers.Tokenizer(models.BPE({"⏹": 0, "a": 1}, []))
    made.add_special_tokens(["⏹"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", PLAIN, 2)
    with pytest.raises(InvalidRequestError, match=r"'⏹' is a control token of this model"):
        tokenizer.encode("a⏹")
    assert tokenizer.tokens(["a⏹"], parse_special=True, add_special=False) == ([1, 0], 0)


def test_many_control_tokens_in_a_text(both):
    """The time to keep them apart grows with the text, not with its square."""
    tokenizer, _ = both
    began = time.monotonic()
    assert text_of(tokenizer, tokenizer.encode("</s>" * 5_000)) == "</s>" * 5_000
    assert time.monotonic() - began < 60


def test_bos_is_not_added_twice(tmp_path):
    """A template that begins with it is left as it is; plain text of its name is no such beginning."""
    made, size, _ = made_by_merges()
    made.decoder = SPACED
    made.add_special_tokens(CONTROL)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", PLAIN.model_copy(update={"add_bos": True}), size)
    a = tokenizer.encode("a")
    assert tokenizer.tokens(["a"], parse_special=True, add_special=True) == ([BOS, *a], 1)
    assert tokenizer.tokens(["a"], parse_special=True, add_special=False) == (a, 0)
    assert tokenizer.tokens(["<s>a"], parse_special=True, add_special=True) == ([BOS, *a], 0)
    assert tokenizer.tokens([[BOS], "a"], parse_special=False, add_special=True) == ([BOS, *a], 0)
    assert tokenizer.prompt("<s>", add_special=True).implied == 1
    assert tokenizer.prompt_of_parts([[EOS], "a"], add_special=True) == Prompt((BOS, EOS, *a), "</s> a", implied=1)


def test_stripping_tokens_are_the_librarys(tmp_path):
    """A control token that takes the spaces around it does so where it is read, and not in parts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(["<x>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", PLAIN, 257)
    (a,), (space,) = tokenizer.encode("a"), tokenizer.encode(" ")
    assert tokenizer.tokens(["a <x> a"], parse_special=True, add_special=False)[0] == [a, 0, a]
    assert tokenizer.tokens(["a ", [0], " a"], parse_special=False, add_special=False)[0] == [a, space, 0, space, a]


def test_control_tokens_beyond_the_model(tmp_path):
    """One that the model has no embedding for is text, even where control tokens are read."""
    made, size, _ = made_by_merges()
    made.decoder = SPACED
    made.add_special_tokens([*CONTROL, "<image>"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json", PLAIN, size)
    ids, _ = tokenizer.tokens(["<image>"], parse_special=True, add_special=True)
    assert max(ids) < size
    assert tokenizer.control_token("<image>") is None
    assert tokenizer.control_tokens == dict(enumerate(CONTROL))


def test_names_of_control_tokens(both):
    """Only their names are, and a hidden one has no text."""
    tokenizer, _ = both
    assert [tokenizer.control_token(name) for name in CONTROL] == [UNK, BOS, EOS, START]
    assert tokenizer.control_token("a") is None
    assert (tokenizer.token_bytes(EOS), tokenizer.token_bytes(EOS, skip_special=True)) == (b"</s>", b"")
    assert tokenizer.token_bytes(*tokenizer.encode("/")[-1:], skip_special=True) != b""
