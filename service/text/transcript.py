"""The growing text of one choice: which part is final, and where a stop text ends it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from service.text.tokenizer import Detokenizer, readable


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became final, and its tokens as (text, offset in code points); `stopped` if a stop text ended it."""

    text: str
    tokens: tuple[tuple[str, int], ...]
    stopped: bool = False


@dataclass(slots=True)
class _Held:
    """A token that is held back, from `start` to `end` of the held text; `end` is None inside a character."""

    token: bytes
    start: int
    end: int | None


class StopMatcher:
    """Finds stop texts in a growing text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)

    def find(self, text: str) -> tuple[int, int] | None:
        """Start and end of the stop text that ends first, the longest if several end there; None if there is none.

        The result does not depend on how tokens divide the text.
        """
        matches = [(index + len(stop), index) for stop in self._stops if (index := text.find(stop)) >= 0]
        if not matches:
            return None
        end, start = min(matches)
        return start, end

    def held(self, text: str) -> int:
        """The number of characters at the end of `text` that could begin a stop text."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


class Transcript:
    """Turns tokens into final pieces of text.

    Laws: a piece holds whole tokens, except one that a stop text cuts; no piece holds part of a character, or text from
    the start of a stop text on (from its end on, if it stays in the text); the joined texts of the tokens equal the
    text, if all are complete characters. `stop_text` is the stop text that ended it.
    """

    def __init__(
        self, stops: Sequence[str] = (), start: int = 0, tail: bytes = b"", *, include_stop: bool = False
    ) -> None:
        """Continues a text of `start` code points and `tail`, the bytes of an unfinished character after them."""
        self._include_stop = include_stop
        self.stop_text: str | None = None
        self._detokenizer = Detokenizer()
        self._detokenizer.push(tail)
        self._stops = StopMatcher(stops)
        self._start = start
        self._text = ""
        self._tokens: deque[_Held] = deque()

    @property
    def held_back(self) -> str:
        """Text that is held back, because a stop text may begin in it or its last character is unfinished."""
        return self._text

    def push(self, token: bytes) -> Piece:
        """Adds the next token; its piece may be empty, and may hold earlier tokens."""
        start, unfinished = len(self._text), self._detokenizer.unfinished
        new = self._detokenizer.push(token)
        self._text += new
        if new:
            for held in self._tokens:
                held.end = start + 1 if held.end is None else held.end
            start += not new.encode().startswith(unfinished)  # else this token continues the character
        end = None if self._detokenizer.unfinished else len(self._text)
        self._tokens.append(_Held(token, start, end))
        stop = self._stops.find(self._text)
        if stop is not None:
            self.stop_text = self._text[slice(*stop)]
            return self._cut(stop[self._include_stop])
        return self._release(len(self._text) - self._stops.held(self._text))

    def finish(self) -> Piece:
        """Everything that is held back, without an unfinished character."""
        return self._end(list(self._tokens), len(self._text), stopped=False)

    def _release(self, safe: int) -> Piece:
        """Releases the tokens that end within the first `safe` characters."""
        shown: list[tuple[str, int]] = []
        length = 0
        while self._tokens and (end := self._tokens[0].end) is not None and end <= safe:
            held = self._tokens.popleft()
            shown.append((readable(held.token), self._start + held.start))
            length = end
        text, self._text = self._text[:length], self._text[length:]
        self._start += length
        for held in self._tokens:
            held.start -= length
            held.end = None if held.end is None else held.end - length
        return Piece(text, tuple(shown))

    def _cut(self, stop: int) -> Piece:
        """Releases the text up to `stop`, and ends."""
        kept = [held for held in self._tokens if held.start < stop]
        last = kept[-1] if kept else None
        if last is not None and (last.end is None or last.end > stop):
            last.token = self._text[max(last.start, 0) : stop].encode()
        return self._end(kept, stop, stopped=True)

    def _end(self, kept: list[_Held], length: int, *, stopped: bool) -> Piece:
        """The last piece: the tokens `kept`, and the first `length` characters of the held text."""
        tokens = tuple((readable(held.token), self._start + held.start) for held in kept)
        text, self._text = self._text[:length], ""
        self._tokens.clear()
        return Piece(text, tokens, stopped)
