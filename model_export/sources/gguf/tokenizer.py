"""Rebuilds a tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.panics import reported_as
from model_export.sources.vocabulary import Vocabulary, end_tokens

CONTROL, USER_DEFINED = 3, 4
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# The keys of older files, then the current ones, which override them; and the part that each token precedes.
MARK_KEYS = {
    "prefix": "prefix",
    "suffix": "suffix",
    "middle": "middle",
    "fim_pre": "prefix",
    "fim_suf": "suffix",
    "fim_mid": "middle",
}

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PUNCTUATION, SPACES = r" ?[^\s\p{L}\p{N}]+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, line_ends: str = r"[\r\n]*") -> str:
    """A pattern of contractions, words, groups of `digits`, punctuation with the `line_ends` after it, and spaces."""
    return rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|{PUNCTUATION}{line_ends}|{SPACES}"


def _cased_words(digits: str, contractions: str) -> str:
    """A pattern of words, each capital beginning a new one, with `contractions`, groups of `digits`, and the rest."""
    before = r"[^\r\n\p{L}\p{N}]?"
    small, capital = f"{before}{UPPER}*{LOWER}+{contractions}", f"{before}{UPPER}+{LOWER}*{contractions}"
    return rf"{small}|{capital}|\p{{N}}{digits}|{PUNCTUATION}[\r\n/]*|{SPACES}"


SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "dbrx", "smaug-bpe"), _words("{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _words("")),
    "seed-coder": _words("", line_ends=""),
    "tekken": _cased_words("", ""),
    "gpt-4o": _cased_words("{1,3}", f"{CONTRACTIONS}?"),
}
WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "tekken")


@reported_as("its keys do not describe a tokenizer")
def vocabulary_from_metadata(metadata: Metadata) -> Vocabulary:
    """The vocabulary in the metadata. Raises ExportError for a tokenizer that is broken or not supported."""
    model = metadata.require("tokenizer.ggml.model")
    split = metadata.get("tokenizer.ggml.pre", "default")
    if model == "gpt2":
        tokenizer = _byte_level(metadata, split)
    elif model == "llama":
        tokenizer = _sentence_piece(metadata)
    else:
        raise ExportError(f"tokenizer model {model!r} is not supported; supported are gpt2 and llama")
    _add_special_tokens(tokenizer, metadata)
    ids: dict[str, Any] = {
        name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", *END_KEYS, *MARK_KEYS)
    }
    bos_by_default = model == "llama" or split in WHOLE_WORDS_FIRST
    return Vocabulary(
        tokenizer=tokenizer,
        bos=ids["bos"],
        add_bos=ids["bos"] is not None and metadata.get("tokenizer.ggml.add_bos_token", bos_by_default),
        end=end_tokens(tokenizer, [ids[name] for name in END_KEYS]),
        marks={part: ids[name] for name, part in MARK_KEYS.items() if ids[name] is not None},
    )


def _byte_level(metadata: Metadata, split: str) -> Tokenizer:
    tokens = metadata.require("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = pairs(metadata.require("tokenizer.ggml.merges"), tokens, vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=split in WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = _pre_tokenizer(split)
    tokenizer.decoder = decoders.ByteLevel()
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _pre_tokenizer(split: str) -> pre_tokenizers.PreTokenizer:
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split in ("gpt-2", "default"):
        return gpt2
    if split == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    if split not in SPLITS:
        known = ", ".join(["default", "gpt-2", "smollm", *SPLITS])
        raise ExportError(f"pre-tokenizer {split!r} is not supported; supported are {known}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLITS[split]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pairs(merges: Sequence[str], tokens: Sequence[str], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The two `tokens` that each merge joins. Raises ExportError where one of them or the result is not in `vocab`."""
    joined = []
    for index, merge in enumerate(merges):
        first, _, second = merge.partition(" ")
        for token in (first, second, first + second):
            if token not in vocab:
                problem = f"merge {index}, {abbreviated(merge)}, needs the token {abbreviated(token)}"
                raise ExportError(f"tokenizer.ggml.merges: {problem}, which the vocabulary does not have")
        joined.append((tokens[vocab[first]], tokens[vocab[second]]))  # the strings of the vocabulary, not copies
    return joined


def _sentence_piece(metadata: Metadata) -> Tokenizer:
    tokens = metadata.require("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = merges_by_score(tokens, metadata.require("tokenizer.ggml.scores").tolist())
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_by_score(tokens: Sequence[str], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best-scored first.

    SentencePiece joins those neighbours whose joint token has the highest score.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    joined: list[tuple[float, int, int]] = []
    for index, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                joined.append((-scores[index], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(joined)]


def _add_special_tokens(tokenizer: Tokenizer, metadata: Metadata) -> None:
    tokens = metadata.require("tokenizer.ggml.tokens")
    token_types = dict(zip(tokens, metadata.plain("tokenizer.ggml.token_type") or [], strict=False))
    # All tokens of a type in one call: each call goes over every token that was added before.
    for added_type, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [token for token, token_type in token_types.items() if token_type == added_type]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
