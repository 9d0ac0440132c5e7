"""Finds tokens by their bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate


class Spellings:
    """Finds the tokens of a vocabulary by their bytes; `tokens[i]` are the bytes of token i."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._ids = sorted(range(len(tokens)), key=tokens.__getitem__)
        self._tokens = [tokens[index] for index in self._ids]
        self._joined = b"".join(self._tokens)
        self._ends = list(accumulate(map(len, self._tokens)))

    def starting_with(self, start: bytes) -> list[int]:
        """The ids of the tokens that start with `start`."""
        low = bisect_left(self._tokens, start)
        high = bisect_right(self._tokens, start, lo=low, key=lambda token: token[: len(start)])
        return self._ids[low:high]

    def containing(self, text: bytes) -> list[int]:
        """The ids of the tokens that contain `text`, which must not be empty."""
        found = []
        at = self._joined.find(text)
        while at >= 0:
            index = bisect_right(self._ends, at)  # of the token that has this byte
            end = self._ends[index]
            within = at + len(text) <= end
            if within:
                found.append(self._ids[index])
            at = self._joined.find(text, end if within else at + 1)
        return found
