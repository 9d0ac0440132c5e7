"""Tiny tokenizers of every kind that models come with, each with control tokens and added tokens."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

CONTROL = ["<s>", "</s>", "<|im_end|>", "<start_of_turn>"]
# Tokens that are added to a vocabulary, as models have them: runs of spaces in both spellings, marks, other scripts.
ADDED = ["▁▁", "▁▁▁▁", "  ", "\n\n", "\t", "<｜end▁of▁sentence｜>", "▁<PRE>", "日本", "🚢", "é", "<0x0A>", "ção", "Ġx"]
PIECES = [
    "▁",
    "▁the",
    "▁a",
    "s>",
    "th",
    "de",
    "f",
    "(",
    ")",
    ":",
    "return",
    "▁=",
    "é",
    "本",
    "▁🚢",
    "'s",
    "x▁y",
    "a",
    "b",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _numbered(tokens: list[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}


def _with_added(made: Tokenizer, special: bool = True) -> Tokenizer:
    made.add_tokens([AddedToken(token, special=special, normalized=False) for token in CONTROL])
    made.add_tokens([AddedToken(token, normalized=index % 2 == 0) for index, token in enumerate(ADDED)])
    return made


def byte_level() -> Tokenizer:
    """GPT-2's kind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("Ġ", "th"), ("Ġth", "e"), ("Ġ", "Ġ"), ("Ã", "©"), ("â", "Ĥ"), ("âĤ", "¬")]
    made = Tokenizer(models.BPE(_numbered([*alphabet, *map("".join, merges), "a b€"]), merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return _with_added(made)


def _pieces(byte_fallback: bool = True) -> Tokenizer:
    tokens = ["<unk>", *(BYTES if byte_fallback else ["<0x0A>", "<0xE2>"]), *PIECES]
    made = Tokenizer(models.BPE(_numbered(tokens), [], unk_token="<unk>", byte_fallback=byte_fallback))
    made.normalizer = normalizers.Replace(" ", "▁")
    return made


def _sequence(made: Tokenizer, *steps: decoders.Decoder) -> Tokenizer:
    made.decoder = decoders.Sequence(list(steps))
    return _with_added(made)


SPACES, STRIP = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)


def llama() -> Tokenizer:
    """Llama's and Mistral's kind: a space is put before a text and taken away again."""
    made = _pieces()
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _sequence(made, SPACES, decoders.ByteFallback(), decoders.Fuse(), STRIP)


def gemma() -> Tokenizer:
    """Gemma's kind: no space is put before a text."""
    return _sequence(_pieces(), SPACES, decoders.ByteFallback(), decoders.Fuse())


def unigram_like() -> Tokenizer:
    """T5's kind: marked spaces without byte fallback."""
    made = _pieces(byte_fallback=False)
    made.decoder = decoders.Metaspace()
    return _with_added(made)


def metaspace_never() -> Tokenizer:
    """Marked spaces that are never put before a text."""
    made = _pieces(byte_fallback=False)
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    return _with_added(made)


def without_decoder() -> Tokenizer:
    """Whole words, which are joined by spaces."""
    return _with_added(_pieces(byte_fallback=False), special=False)


def renamed() -> Tokenizer:
    """Single tokens with a text of their own, before bytes are decoded."""
    made = byte_level()
    exact = decoders.Replace(Regex(r"\A(?:é|ção)\z"), "Ã©Ã§")
    made.decoder = decoders.Sequence([exact, decoders.ByteLevel()])
    return made


def two_stripped() -> Tokenizer:
    """Two spaces are taken from the start of a text, and one from each token."""
    return _sequence(_pieces(), SPACES, STRIP, decoders.Fuse(), decoders.Strip(" ", 2, 0))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    made.__name__: made
    for made in (
        *(byte_level, llama, gemma, unigram_like, metaspace_never, without_decoder),
        *(renamed, two_stripped),
    )
}
