"""Scores of tokens, and the form in which the prefix cache keeps them. Pure: it knows no logits."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

# Packed, with at most the two types below: the token's log probability, then those of the likeliest tokens, then the
# ids of these. Log probabilities are float32 numbers everywhere, so packing changes no bit.
_LOGPROB = "f"
_ID = "i"
_BYTES_PER_ENTRY = struct.calcsize(_LOGPROB + _ID)
# Of a packed score beside its entries, as an object in a list: an upper bound.
_BYTES = 64

Packed = bytes


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log probability, and the likeliest tokens, this one included, as (id, log probability), descending.

    `others` are the log probabilities of further tokens.
    """

    logprob: float
    top: tuple[tuple[int, float], ...]
    others: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request wants of its prompt: scores from token `first` on, with the `count` likeliest tokens of each.

    With `others` it also wants scores of further tokens, which are never kept.
    """

    first: int
    count: int
    others: bool = False

    def scored(self, kept: Sequence[Packed | None], length: int) -> int:
        """The end of the tokens from `first` on whose scores `kept` has; of the list the first `length` count."""
        size = _size(self.count)
        for at in range(self.first, min(length, len(kept))):
            score = kept[at]
            if self.others or score is None or len(score) < size:
                return at
        return max(self.first, min(length, len(kept)))


def pack(score: Score, count: int) -> Packed:
    """A score with its `count` likeliest tokens, or as many as there are."""
    top = score.top[:count]
    ids, logprobs = [index for index, _ in top], [logprob for _, logprob in top]
    return struct.pack(f"<{_LOGPROB}{len(top)}{_LOGPROB}{len(top)}{_ID}", score.logprob, *logprobs, *ids)


def unpack(packed: Packed, token: int, count: int) -> Score:
    """The score of `token` with the `count` likeliest tokens; `packed` must have as many."""
    entries = len(packed) // _BYTES_PER_ENTRY
    logprob, *numbers = struct.unpack(f"<{_LOGPROB}{entries}{_LOGPROB}{entries}{_ID}", packed)
    top = tuple(zip(numbers[entries : entries + count], numbers[:count], strict=True))
    return Score(logprob, top if token in dict(top) else (*top, (token, logprob)))


def covers(kept: Sequence[Packed | None], others: Sequence[Packed | None]) -> bool:
    """Whether `kept` has a score wherever `others` has one, with at least as many likeliest tokens."""
    pairs = zip_longest(kept[: len(others)], others)
    return all(other is None or (mine is not None and len(mine) >= len(other)) for mine, other in pairs)


def most_bytes(count: int) -> int:
    """The most bytes that a kept score takes with its `count` likeliest tokens."""
    return _BYTES + count * _BYTES_PER_ENTRY


def _size(count: int) -> int:
    """The bytes of a packed score with `count` likeliest tokens."""
    return struct.calcsize(_LOGPROB) + count * _BYTES_PER_ENTRY
