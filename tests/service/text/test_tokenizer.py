"""Tokenizer: text to ids and back, exactly."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from service.errors import InvalidRequestError, ModelDirectoryError
from service.manifest import FillInTheMiddle, SpecialTokens
from service.text.tokenizer import Detokenizer, Tokenizer
from service.types import Prompt

NONE = SpecialTokens(bos=None, add_bos=False, end=(0,), default_prompt=None)
CONTROL = "<|end|>"
# Surrogates are no text, and a private-use character is as good as any other.
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


def _byte_level(path):
    """GPT-2's kind: 0 is a control token, then the 256 bytes, then "he"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([CONTROL, *alphabet, "he"])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("h", "e")]))
    made.add_special_tokens([tokenizers.AddedToken(CONTROL, special=True)])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(path))
    return path


def _sentencepiece(path):
    """Llama's kind: 0 unknown, 1 begins, 2 ends, then the 256 bytes, then some pieces; a space goes before all text."""
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "é"]
    vocabulary = {token: index for index, token in enumerate(["<unk>", "<s>", "</s>", *pieces])}
    made = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.save(str(path))
    return path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="module")
def byte_level(directory):
    return Tokenizer(_byte_level(directory / "byte_level.json"), NONE, 260)


@pytest.fixture(scope="module")
def sentencepiece(directory):
    special = SpecialTokens(bos=1, add_bos=True, end=(2,), default_prompt=1)
    return Tokenizer(_sentencepiece(directory / "sentencepiece.json"), special, 264)


@given(text=TEXT)
def test_byte_level_text_comes_back(byte_level, text):
    """The bytes of a text's tokens joined are the text's."""
    assert b"".join(byte_level.text_bytes(byte_level.encode(text))) == text.encode()


@given(text=TEXT)
def test_sentencepiece_text_comes_back(sentencepiece, text):
    """So it is where unknown characters are spelled in bytes and a space goes before all text."""
    assert b"".join(sentencepiece.text_bytes(sentencepiece.encode(text))) == text.encode()


@given(tokens=st.lists(st.integers(1, 257), min_size=1, max_size=12))
def test_prompt_of_tokens_keeps_unfinished_bytes(byte_level, tokens):
    """Of a prompt given as tokens the text and the unfinished tail hold everything."""
    prompt = byte_level.prompt_of_tokens(tokens)
    whole = b"".join(byte_level.token_bytes(token) for token in tokens)
    assert prompt.token_ids == tuple(tokens)
    assert (prompt.text.encode() + prompt.tail).decode("utf-8", "replace") == whole.decode("utf-8", "replace")


def test_control_tokens_in_a_prompt_are_plain_text(byte_level, sentencepiece):
    """A caller cannot write a control token as text."""
    assert 0 not in byte_level.encode(f"a{CONTROL}b")
    assert {1, 2}.isdisjoint(sentencepiece.encode("a</s><s>b"))


def test_merges_apply(byte_level):
    """Common texts are one token."""
    assert byte_level.encode("he") == [257]
    assert byte_level.token_text(257) == "he"


def test_byte_tokens_and_pieces(sentencepiece):
    """Byte tokens decode to their bytes, and the space mark to a space."""
    assert sentencepiece.token_bytes(3 + 0xE2) == b"\xe2"
    assert sentencepiece.token_text(3 + 0xE2) == "bytes:\\xe2"
    assert sentencepiece.token_text(262) == " a"


def test_first_space_of_a_text_alone_is_taken_away(sentencepiece):
    """The space that encoding adds is not part of the text; later ones are, also after a token without text."""
    assert list(sentencepiece.text_bytes([262, 262])) == [b"a", b" a"]
    assert list(sentencepiece.text_bytes([1, 262, 262], implied=1)) == [b"", b"a", b" a"]


def test_metaspace_that_prepends_nothing_strips_nothing(directory):
    """If encoding adds no space, decoding removes none."""
    path = directory / "metaspace.json"
    made = tokenizers.Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.save(str(path))
    tokenizer = Tokenizer(path, NONE, 3)
    assert b"".join(tokenizer.text_bytes(tokenizer.encode(" a a"))) == b" a a"
    made.decoder = made.pre_tokenizer = None
    made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.save(str(path))
    assert list(Tokenizer(path, NONE, 3).text_bytes([2])) == [b"a"]


def test_truncation_and_padding_of_the_file_are_off(directory):
    """Settings for training are nothing to a prompt: its tokens are all there, and no others."""
    path = _byte_level(directory / "training.json")
    made = tokenizers.Tokenizer.from_file(str(path))
    made.enable_truncation(2)
    made.enable_padding(length=8, pad_id=5)
    made.save(str(path))
    assert len(Tokenizer(path, NONE, 260).encode("xyz")) == 3


def test_text_that_the_library_gives_up_on(directory):
    """A split that would take exponential time is an error of that text only; the process goes on."""
    path = _byte_level(directory / "explodes.json")
    made = json.loads(path.read_text())
    made["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(made))
    tokenizer = Tokenizer(path, NONE, 260)
    with pytest.raises(RuntimeError, match="gave up on a text of 31 characters: Onig"):
        tokenizer.encode("a" * 30 + "!")
    assert tokenizer.encode("a")


def test_special_token_beyond_the_vocabulary(directory):
    """Text never becomes a special token, so one that the model has no embedding for is let be; any other is not."""
    path = _byte_level(directory / "beyond.json")
    made = tokenizers.Tokenizer.from_file(str(path))
    size = made.get_vocab_size()
    made.add_special_tokens(["<image>"])
    made.save(str(path))
    assert Tokenizer(path, NONE, size).encode("<image>")[0] < size
    with pytest.raises(ModelDirectoryError, match=f"but the manifest allows only 0..{size - 2}"):
        Tokenizer(path, NONE, size - 1)


def test_bos_goes_before_text_but_not_before_tokens(sentencepiece):
    """An added beginning-of-sequence token has no text; who sends tokens sends it themselves."""
    assert sentencepiece.prompt("a") == Prompt(token_ids=(1, 262), text="a", implied=1)
    assert sentencepiece.prompt_of_tokens([262]).token_ids == (262,)


def test_bos_is_only_added_where_the_model_wants_it(directory):
    """A model may have the token and not want it before prompts."""
    special = SpecialTokens(bos=0, add_bos=False, end=(0,), default_prompt=0)
    tokenizer = Tokenizer(_byte_level(directory / "no_bos.json"), special, 260)
    assert tokenizer.prompt("he") == Prompt(token_ids=(257,), text="he")


def test_empty_prompt_is_the_default_token(directory, sentencepiece):
    """It has no text."""
    special = SpecialTokens(bos=None, add_bos=False, end=(0,), default_prompt=0)
    tokenizer = Tokenizer(_byte_level(directory / "default.json"), special, 260)
    assert tokenizer.prompt("") == Prompt(token_ids=(0,), text="", implied=1)
    assert sentencepiece.prompt("").token_ids[0] == 1


def test_empty_prompt_without_default_token_is_refused(byte_level):
    """Such a model needs at least one token."""
    with pytest.raises(InvalidRequestError) as caught:
        byte_level.prompt("")
    assert caught.value.param == "prompt"


SPACED_A, A, B = 262, 260, 261
FILLED = {
    "psm": ("psm", 12, (1, 10, SPACED_A, 11, B, 12)),
    "spm": ("spm", 12, (1, 11, B, 10, SPACED_A, 12)),
    "spm without a middle": ("spm", None, (1, 11, B, 10, SPACED_A)),
}


def _fills(path, order="psm", middle=12, add_bos=True):
    special = SpecialTokens(
        bos=1,
        add_bos=add_bos,
        end=(2,),
        default_prompt=1,
        fill_in_the_middle=FillInTheMiddle(prefix=10, suffix=11, middle=middle, order=order),
    )
    return Tokenizer(_sentencepiece(path), special, 264)


@pytest.mark.parametrize("case", FILLED)
def test_fill_in_the_middle(directory, case):
    """Each mark precedes its part, after the beginning-of-sequence token; the suffix gets no extra space."""
    order, middle, ids = FILLED[case]
    tokenizer = _fills(directory / "fill.json", order, middle)
    filled = tokenizer.fill_in_the_middle(tokenizer.prompt("a"), "b")
    assert filled == Prompt(token_ids=ids, text="a", implied=1)


@pytest.mark.parametrize(
    ("suffix", "ids"), [("a", [A]), (" a", [SPACED_A]), ("", []), ("\na", [13, A]), ("ab", [A, B])]
)
def test_suffix_goes_on(directory, suffix, ids):
    """A suffix begins with what it begins with, a space only where it has one."""
    tokenizer = _fills(directory / "suffix.json")
    filled = tokenizer.fill_in_the_middle(tokenizer.prompt("b"), suffix)
    assert filled.token_ids[filled.token_ids.index(11) + 1 : -1] == tuple(ids)


def test_fill_in_the_middle_of_byte_level_text(directory):
    """Nothing is added to either part, and nothing before them where the model wants no beginning."""
    marks = FillInTheMiddle(prefix=250, suffix=251, middle=252)
    special = SpecialTokens(bos=0, add_bos=False, end=(0,), default_prompt=0, fill_in_the_middle=marks)
    tokenizer = Tokenizer(_byte_level(directory / "fill_bytes.json"), special, 260)
    filled = tokenizer.fill_in_the_middle(tokenizer.prompt("he"), "hehe")
    assert filled.token_ids == (250, 257, 251, 257, 257, 252)


def test_fill_behind_nothing(directory):
    """An empty prompt leaves the prefix empty; its replacement stays only if it begins every sequence."""
    tokenizer = _fills(directory / "empty.json")
    assert tokenizer.fill_in_the_middle(tokenizer.prompt(""), "b").token_ids == (1, 10, 11, B, 12)
    tokenizer = _fills(directory / "empty.json", add_bos=False)
    assert tokenizer.fill_in_the_middle(tokenizer.prompt(""), "b").token_ids == (10, 11, B, 12)


def test_fill_behind_tokens(directory):
    """Tokens are taken as they are; a beginning of the sequence among them stays the first."""
    tokenizer = _fills(directory / "tokens.json")
    assert tokenizer.fill_in_the_middle(tokenizer.prompt_of_tokens([A]), "b").token_ids == (10, A, 11, B, 12)
    filled = tokenizer.fill_in_the_middle(tokenizer.prompt_of_tokens([1, A]), "b")
    assert filled.token_ids == (1, 10, A, 11, B, 12)


def test_fill_in_the_middle_needs_its_tokens(byte_level):
    """Without them asking for it is a mistake of ours."""
    with pytest.raises(ValueError, match="fill-in-the-middle"):
        byte_level.fill_in_the_middle(Prompt((1,), "!"), "x")


def test_ids_without_a_token_stand_for_nothing(directory):
    """A vocabulary padded for the hardware has ids that no token uses."""
    tokenizer = Tokenizer(_byte_level(directory / "padded.json"), NONE, 300)
    assert tokenizer.token_bytes(299) == b""


def test_vocabulary_entry_outside_the_byte_alphabet(directory):
    """A token outside the byte alphabet decodes to its own text."""
    path = _byte_level(directory / "foreign.json")
    content = json.loads(path.read_text())
    content["model"]["vocab"]["a b€"] = 258
    path.write_text(json.dumps(content))
    assert Tokenizer(path, NONE, 260).token_text(258) == "a b€"


def test_damaged_file_is_named(directory):
    """A file that is not a tokenizer keeps the service from starting; the error names it."""
    path = directory / "damaged.json"
    path.write_text("{}")
    with pytest.raises(ModelDirectoryError, match=r"damaged\.json"):
        Tokenizer(path, NONE, 260)


def test_detokenizer_law():
    """Pieces joined are the decoding of all bytes; what is unfinished can be asked for."""
    detokenizer = Detokenizer()
    assert [detokenizer.push(part) for part in (b"a\xe2", b"\x82", b"\xacb", b"\xf0\x9f")] == ["a", "", "€b", ""]
    assert detokenizer.unfinished == b"\xf0\x9f"
