"""Which token ids have a meaning of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenizers import Tokenizer

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
