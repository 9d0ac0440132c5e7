"""The tokens by which a model was trained to fill in the middle, by the names that vocabularies have for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from tokenizers import Tokenizer

from model_export.errors import ExportError
from service.manifest import FillInTheMiddle

Order = Literal["psm", "spm"]

# Before the prefix, before the suffix, before the middle.
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
# Models with this mark read the suffix first, and nothing stands between the prefix and what they write.
SUFFIX_FIRST = "[PREFIX]"

# What such models write where the middle ends.
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
    """The marks that are `declared` by part, else those that the vocabulary has by name; None where there are none."""
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
    """The same marks in the order that the user asks for. Raises ExportError where they cannot stand so."""
    if order == "auto":
        return marks
    if marks is None:
        raise ExportError(f"--fim-order {order} needs fill-in-the-middle tokens, and the tokenizer has none known here")
    if order == "psm" and marks.middle is None:
        raise ExportError("--fim-order psm needs a token before the middle; this model reads its suffix first (spm)")
    return marks.model_copy(update={"order": order})
