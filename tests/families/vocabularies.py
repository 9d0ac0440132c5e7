"""Tiny tokenizers of the kinds that models come with."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

# Some rows of the embedding have no token, as in many real models.
VOCAB = 304
TOKENS = 300

BOS, EOS = "<s>", "</s>"
KINDS = ("byte-level", "prepend", "metaspace", "bare")


def tokenizer(kind: str, add_bos: bool) -> Tokenizer:
    """A tokenizer of the kind, whose post-processor puts the beginning-of-sequence token first with `add_bos`.

    `byte-level` is GPT-2's kind; the others have SentencePiece's pieces with bytes for what is missing: `prepend` and
    `metaspace` put a space before a text, as a normalizer and as a pre-tokenizer; `bare` puts none.
    """
    made = _byte_level() if kind == "byte-level" else _sentence_piece(kind)
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    if add_bos:
        special = [(BOS, made.token_to_id(BOS))]
        made.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=special
        )
    return made


def _byte_level() -> Tokenizer:
    merges = [("t", "h"), ("Ġ", "th"), ("th", "e"), ("i", "n"), ("Ġ", "a"), ("e", "r"), ("o", "u")]
    tokens = [BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    made = Tokenizer(models.BPE(_numbered(tokens), merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def _sentence_piece(kind: str) -> Tokenizer:
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("i", "n"), ("▁", "a"), ("e", "r"), ("o", "u")]
    letters = [*"▁abcdefghijklmnopqrstuvwxyzTAS.,"]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *map("".join, merges), *letters]
    made = Tokenizer(models.BPE(_numbered(tokens), merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens([AddedToken("<unk>", special=True, normalized=False)])
    if kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        spaces = normalizers.Replace(" ", "▁")
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if kind == "prepend" else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence(steps if kind == "bare" else [*steps, decoders.Strip(" ", 1, 0)])
    return made


def _numbered(tokens: list[str]) -> dict[str, int]:
    """The ids of the tokens, and of others that no text has, for a model to choose."""
    others = [f"@{number}" for number in range(TOKENS - len(tokens))]
    return {token: index for index, token in enumerate([*tokens, *others])}
