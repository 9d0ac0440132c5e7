"""Rebuilds a tokenizer from the metadata of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from types import MappingProxyType

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from model_export.errors import ExportError
from model_export.sources.field_types import abbreviated
from model_export.sources.fill_in_the_middle import NAMES
from model_export.sources.gguf.metadata import Metadata
from model_export.sources.gguf.pre_tokenizers import KEY, PRE_TOKENIZERS, PreTokenizer, pre_tokenizer_name
from model_export.sources.panics import reported_as
from model_export.sources.vocabulary import Vocabulary, check_chat_template, ends_of_generation
from service.text.decoding import BYTE_CHARACTERS, byte_level

# Values of tokenizer.ggml.token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
CHAT_TEMPLATE = "tokenizer.chat_template"
# The tokens that llama.cpp assumes in a SentencePiece file without their keys.
SENTENCE_PIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}
ENDS = ("eos", "eot", "eom")
# The keys of tokens that end what fills a gap, and the names of these tokens where a file does not have the key.
GAP_ENDS: Mapping[str, tuple[str, ...]] = {
    "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
    "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
    "fim_sep": ("<|file_sep|>",),
}
# The keys of older files, then the current ones, which override them; and the part that each token precedes.
MARK_KEYS = {
    "prefix": "prefix",
    "suffix": "suffix",
    "middle": "middle",
    "fim_pre": "prefix",
    "fim_suf": "suffix",
    "fim_mid": "middle",
}
# The most tokens that get a decoder of their own: each is tried on every token of the vocabulary.
MOST_RESPELLED = 32


@reported_as("its keys do not describe a tokenizer")
def vocabulary_from_metadata(metadata: Metadata) -> Vocabulary:
    """The vocabulary in the metadata. Raises ExportError for a tokenizer that is broken or not supported."""
    model, tokens = metadata.require("tokenizer.ggml.model"), metadata.require("tokenizer.ggml.tokens")
    ids: dict[str, int] = {
        name: metadata[f"tokenizer.ggml.{name}_token_id"]
        for name in ("bos", "unknown", *ENDS, *GAP_ENDS, *MARK_KEYS)
        if f"tokenizer.ggml.{name}_token_id" in metadata
    }
    if model == "llama":
        ids = {name: index for name, index in SENTENCE_PIECE_IDS.items() if index < len(tokens)} | ids
    ends = _ends(tokens, ids)
    types = _types(metadata, ends)
    if model == "gpt2":
        way = PRE_TOKENIZERS[pre_tokenizer_name(metadata.get(KEY), tokens)]
        tokenizer, begins = _byte_level(metadata, way, types), way.begins
    elif model == "llama":
        tokenizer, begins = _sentence_piece(metadata, types, ids.get("unknown")), True
    else:
        raise ExportError(f"tokenizer.ggml.model is {model!r}, which is not supported; supported are gpt2 and llama")
    _add_special_tokens(tokenizer, types)
    return Vocabulary(
        tokenizer=tokenizer,
        bos=ids.get("bos"),
        add_bos="bos" in ids and metadata.get("tokenizer.ggml.add_bos_token", begins),
        end=tuple(sorted(ends)),
        marks={part: ids[name] for name, part in MARK_KEYS.items() if name in ids},
        eos=ids.get("eos"),
        chat_template=check_chat_template(CHAT_TEMPLATE, metadata.get(CHAT_TEMPLATE)),
    )


def _ends(tokens: Sequence[str], ids: Mapping[str, int]) -> set[int]:
    """The tokens that end a completion: by their keys, whose `ids` these are, and by their names."""
    numbers = {token: index for index, token in enumerate(tokens)}
    unsaid = [name for key, names in GAP_ENDS.items() if key not in ids for name in names]
    declared = {ids[key] for key in (*ENDS, *GAP_ENDS) if key in ids}
    return ends_of_generation(numbers, declared | {numbers[name] for name in unsaid if name in numbers})


def _types(metadata: Metadata, ends: Collection[int]) -> dict[str, int]:
    """The type of each token. Control tokens, known by their names or as `ends`, are typed as text in many files."""
    tokens = metadata.require("tokenizer.ggml.tokens")
    stored = metadata.plain("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    types = dict(zip(tokens, stored, strict=True))
    control = [*(tokens[index] for index in ends), *chain(*NAMES), *chain(*GAP_ENDS.values())]
    return types | dict.fromkeys((token for token in control if token in types), CONTROL)


def _byte_level(metadata: Metadata, way: PreTokenizer, types: Mapping[str, int]) -> Tokenizer:
    tokens = metadata.require("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = pairs(metadata.require("tokenizer.ggml.merges"), tokens, vocab)
    merged = {token for merge in merges for token in (*merge, "".join(merge))}
    used = {token: index for token, index in vocab.items() if types[token] != UNUSED or token in merged}
    tokenizer = Tokenizer(models.BPE(vocab=used, merges=merges, ignore_merges=way.whole_words))
    tokenizer.pre_tokenizer = way.build()
    tokenizer.decoder = _byte_decoder(types)
    if metadata.get(KEY) == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _byte_decoder(types: Mapping[str, int]) -> decoders.Decoder:
    """The decoder of bytes, before which tokens of whole characters are spelled in bytes.

    Without that, a token that was added in plain letters, all of which also stand for bytes, would lose its accents.
    """
    whole = [token for token, kind in types.items() if kind in (CONTROL, USER_DEFINED) and _looks_like_bytes(token)]
    spelled = [
        decoders.Replace(Regex(rf"\A{re.escape(token)}\z"), byte_level(token)) for token in whole[:MOST_RESPELLED]
    ]
    return decoders.Sequence([*spelled, decoders.ByteLevel()]) if spelled else decoders.ByteLevel()


def _looks_like_bytes(token: str) -> bool:
    return not token.isascii() and set(token) <= BYTE_CHARACTERS


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


def _sentence_piece(metadata: Metadata, types: Mapping[str, int], unknown: int | None) -> Tokenizer:
    tokens = metadata.require("tokenizer.ggml.tokens")
    vocab = {token: index for index, token in enumerate(tokens) if types[token] != UNUSED}
    merges = merges_by_score(tokens, metadata.require("tokenizer.ggml.scores").tolist(), types)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges,
            unk_token=None if unknown is None else tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def merges_by_score(
    tokens: Sequence[str], scores: Sequence[float], types: Mapping[str, int] = MappingProxyType({})
) -> list[tuple[str, str]]:
    """Every way to join two tokens into a third, the best-scored first; only `types` of text are joined.

    SentencePiece joins those neighbours whose joint token has the highest score.
    """
    ids = {token: index for index, token in enumerate(tokens) if types.get(token, NORMAL) in (NORMAL, USER_DEFINED)}
    joined: list[tuple[float, int, int]] = []
    for token, index in ids.items():
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                joined.append((-scores[index], left, right))
    return [(tokens[left], tokens[right]) for _, left, right in sorted(joined)]


def _add_special_tokens(tokenizer: Tokenizer, types: Mapping[str, int]) -> None:
    # All tokens of a type in one call: each call goes over every token that was added before.
    for added_types, special in (((CONTROL, UNKNOWN), True), ((USER_DEFINED,), False)):
        added = [token for token, token_type in types.items() if token_type in added_types]
        tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in added])
