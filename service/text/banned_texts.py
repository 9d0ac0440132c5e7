"""Finds the tokens that would complete a banned text, however the text before and the vocabulary divide it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from service.text.spellings import Spellings

Ids = npt.NDArray[np.int64]


class BannedTexts:
    """The banned texts of one request.

    Law: a text whose tokens were never among `completing` contains none of them. It holds for texts, not only for
    bytes: UTF-8 finds no character within others, and no banned text has U+FFFD, which replaces invalid bytes.
    """

    def __init__(self, texts: Iterable[str], spellings: Spellings, silent: Iterable[int]) -> None:
        """The `silent` tokens add nothing to a text, so they are never banned."""
        banned = {text.encode() for text in texts}
        self._spellings = spellings
        self._silent = frozenset(silent)
        self._always = self._but_silent(index for text in banned for index in spellings.containing(text))
        # What remains of the banned texts, by what of them has been written.
        self._rests: dict[bytes, list[bytes]] = {}
        for text in banned:
            for length in range(1, len(text)):
                self._rests.setdefault(text[:length], []).append(text[length:])
        self._completing: dict[bytes, Ids] = {}
        self.reach = max(1, max(map(len, banned)) - 1)

    def completing(self, text: bytes) -> Ids:
        """The ids of the tokens that would complete a banned text at the end of `text`."""
        ends = (text[-length:] for length in range(1, min(self.reach, len(text)) + 1))
        begun = [end for end in ends if end in self._rests]
        return np.concatenate([self._always, *map(self._complete, begun)])

    def _complete(self, begun: bytes) -> Ids:
        """The ids of the tokens that complete a banned text of which `begun` was written."""
        ids = self._completing.get(begun)
        if ids is None:
            rests = self._rests[begun]
            ids = self._but_silent(index for rest in rests for index in self._spellings.starting_with(rest))
            self._completing[begun] = ids
        return ids

    def _but_silent(self, ids: Iterable[int]) -> Ids:
        return np.array(sorted(set(ids) - self._silent), np.int64)
