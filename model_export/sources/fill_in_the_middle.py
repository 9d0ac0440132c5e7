"""The tokens that a model was trained with to fill in the middle, found by their names in the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tokenizers import Tokenizer

from model_export.errors import ExportError
from service.manifest import FillInTheMiddle

Order = Literal["psm", "spm"]

# The names of the tokens before the prefix, before the suffix and before the middle.
NAMES = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    ("[PREFIX]", "[SUFFIX]", "[MIDDLE]"),
)
# Models with this token read the suffix first, and have no token between the prefix and the middle.
SUFFIX_FIRST = "[PREFIX]"

# The names of tokens that such models generate at the end of a middle.
END_NAMES = (
    "<|fim_pad|>",
    "<fim_pad>",
    "<fim-pad>",
    "▁<EOT>",
    "<EOT>",
    "<|file_sep|>",
    "<file_sep>",
    "<|repo_name|>",
    "<repo_name>",
)


def find_marks(tokenizer: Tokenizer, declared: Mapping[str, int]) -> FillInTheMiddle | None:
    """The tokens `declared` for each part, or else those that the vocabulary has by name; None where it has none."""
    if declared.keys() >= {"prefix", "suffix"}:
        return _marks(tokenizer, declared["prefix"], declared["suffix"], declared.get("middle"))
    for names in NAMES:
        prefix, suffix, middle = (tokenizer.token_to_id(name) for name in names)
        if prefix is not None and suffix is not None:
            return _marks(tokenizer, prefix, suffix, middle)
    return None


def _marks(tokenizer: Tokenizer, prefix: int, suffix: int, middle: int | None) -> FillInTheMiddle | None:
    if tokenizer.id_to_token(prefix) == SUFFIX_FIRST:
        return FillInTheMiddle(prefix=prefix, suffix=suffix, middle=None, order="spm")
    return None if middle is None else FillInTheMiddle(prefix=prefix, suffix=suffix, middle=middle, order="psm")


def end_of_middle(tokenizer: Tokenizer) -> set[int]:
    """The tokens of the vocabulary that end a middle."""
    ids = (tokenizer.token_to_id(name) for name in END_NAMES)
    return {index for index in ids if index is not None}


def reorder(marks: FillInTheMiddle | None, order: Order | Literal["auto"]) -> FillInTheMiddle | None:
    """The same tokens in the order that the user asks for. Raises ExportError where that order is impossible."""
    if order == "auto":
        return marks
    if marks is None:
        raise ExportError(f"--fim-order {order} needs fill-in-the-middle tokens, and the tokenizer has no known ones")
    if order == "psm" and marks.middle is None:
        raise ExportError("--fim-order psm needs a token before the middle; this model reads its suffix first (spm)")
    return marks.model_copy(update={"order": order})
