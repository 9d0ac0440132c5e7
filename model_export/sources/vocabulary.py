"""The tokenizer of a source and its special tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from model_export.errors import ExportError
from service.text.tokenizer import token_outside

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
    """The tokenizer and the special tokens.

    `bos` is the token that begins a text; `add_bos`: every text begins with it. `end` are the tokens that end a
    completion. `marks` are the fill-in-the-middle tokens that the source declares, by the part that each one precedes:
    `prefix`, `suffix`, `middle`.
    """

    tokenizer: Tokenizer
    bos: int | None
    add_bos: bool
    end: tuple[int, ...]
    marks: Mapping[str, int] = field(default_factory=dict)


def end_tokens(tokenizer: Tokenizer, declared: Iterable[int | None]) -> tuple[int, ...]:
    """The `declared` end tokens and every special token with the name of one, in ascending order."""
    named = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.content in END_TOKENS}
    return tuple(sorted(named | {index for index in declared if index is not None}))


def check_vocabulary(name: str, vocabulary: Vocabulary, vocab_size: int) -> None:
    """Raises ExportError where a token that text can become, or that begins or ends texts, is not in the vocabulary.

    `vocab_size` is that of the model.
    """
    if outside := token_outside(vocabulary.tokenizer, vocab_size):
        token, index = outside
        raise ExportError(f"{name}: token {token!r} is {index}, expected one of 0..{vocab_size - 1}")
    for meaning, ids in (("begins a text", (vocabulary.bos,)), ("ends one", vocabulary.end)):
        if wrong := [index for index in ids if index is not None and not 0 <= index < vocab_size]:
            raise ExportError(f"{name}: the token that {meaning} is {wrong[0]}, expected one of 0..{vocab_size - 1}")
