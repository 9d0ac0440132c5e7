"""Which token ids have a meaning of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from model_export.errors import ExportError

END_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "</s>",
)


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer, the token that begins a text and whether it has to, and the tokens that end a completion.

    `marks` are the tokens of filling in the middle that the source declares, by what they stand before: `prefix`,
    `suffix`, `middle`.
    """

    tokenizer: Tokenizer
    bos: int | None
    add_bos: bool
    end: tuple[int, ...]
    marks: Mapping[str, int] = field(default_factory=dict)


def end_tokens(tokenizer: Tokenizer, declared: Iterable[int | None]) -> tuple[int, ...]:
    """The `declared` end tokens and every special token that is one by its name, in ascending order."""
    named = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.content in END_TOKENS}
    return tuple(sorted(named | {index for index in declared if index is not None}))


def check_vocabulary(name: str, vocabulary: Vocabulary, vocab_size: int) -> None:
    """Raises ExportError where a token that a text may give, or one with a meaning, is beyond the model's own.

    Special tokens beyond it are let be: text never becomes one.
    """
    tokenizer = vocabulary.tokenizer
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size and index not in special:
            raise ExportError(f"{name}: token {token[:80]!r} is {index}, expected one of 0..{vocab_size - 1}")
    for meaning, ids in (("begins a text", (vocabulary.bos,)), ("ends one", vocabulary.end)):
        if wrong := [index for index in ids if index is not None and not 0 <= index < vocab_size]:
            raise ExportError(f"{name}: the token that {meaning} is {wrong[0]}, expected one of 0..{vocab_size - 1}")
