"""Encodes text as token ids: with its control tokens read, or as text that never becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import tokenizers

from service.errors import InvalidRequestError, ModelDirectoryError

# A text that tokenizers do not merge with the text after it; `_further` checks this.
_START = "\0"

Span = tuple[int, int]


class Encoder:
    """The two ways to read a text, over one vocabulary.

    A control token is an added token that its file calls special. `control` and `added` (which contains them) are the
    names of the model's tokens by id. `restarts`: after an added token a text begins anew, with the space that the
    tokenizer puts before texts.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, content: Mapping[str, Any], vocab_size: int) -> None:
        """Takes a tokenizer over, and the `content` of its file. Raises ModelDirectoryError if it is inconsistent."""
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokens = {i: token for i, token in tokenizer.get_added_tokens_decoder().items() if i < vocab_size}
        self.added = {index: token.content for index, token in tokens.items()}
        self.control = {index: token.content for index, token in tokens.items() if token.special}
        self._ids = {name: index for index, name in self.control.items()}
        self._unknown = _unknown(content.get("model") or {})
        self._adds_space = any(map(_adds_space, _steps(content)))
        self._plain = tokenizer
        self._reading = _twin(tokenizer, [tokens[index] for index in sorted(tokens)])
        if self._reading.get_added_tokens_decoder().keys() != tokens.keys():
            raise ModelDirectoryError(
                f"the ids of the added tokens leave gaps below {vocab_size}: {sorted(tokens)[:8]}"
            )
        self.restarts = self._restarts()

    def control_token(self, name: str) -> int | None:
        """The id of the control token of this name."""
        return self._ids.get(name)

    def read(self, text: str) -> list[int]:
        """The ids of a text whose control tokens are read. Raises RuntimeError if the library fails."""
        ids: list[int] = _encode(self._reading, text).ids
        return ids

    def plain(self, text: str, *, further: bool = False) -> list[int]:
        """The ids of a text without a control token, whatever it contains.

        `further`: it goes on after another text, so it gets no space before it. Raises RuntimeError if the library
        fails, and InvalidRequestError if a character is a control token and nothing else.
        """
        ids, spans = self._further(text) if further else self._whole(text)
        if self.control.keys().isdisjoint(ids):
            return ids
        # Pieces that are merged into a control token are kept apart by a cut between their characters.
        cuts = [0, *self._cuts(text, ids, spans), len(text)]
        if len(cuts) == 2:
            return ids
        parts = (self.plain(text[start:end], further=further or start > 0) for start, end in pairwise(cuts))
        return [index for part in parts for index in part]

    def _cuts(self, text: str, ids: list[int], spans: list[Span]) -> list[int]:
        """Where to cut a text so that it gives none of its control tokens: after the first character of each."""
        cuts = []
        for index, (start, end) in zip(ids, spans, strict=True):
            name = self.control.get(index)
            if name is None or (name == self._unknown and text[start:end] != name):
                continue
            if end - start < 2:
                problem = f"{text[start:end]!r} is a control token of this model, and cannot be plain text."
                raise InvalidRequestError(f"Invalid 'prompt': {problem}", param="prompt", code="invalid_value")
            cuts.append(start + 1)
        return cuts

    def _whole(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = _encode(self._plain, text)
        return encoding.ids, encoding.offsets

    def _further(self, text: str) -> tuple[list[int], list[Span]]:
        """The ids of a text in the middle of another: without the space that some tokenizers add at the start."""
        if self._adds_space:
            start, (both, spans) = self._whole(_START)[0], self._whole(_START + text)
            if both[: len(start)] == start:
                return both[len(start) :], [(max(0, begin - 1), end - 1) for begin, end in spans[len(start) :]]
        return self._whole(text)

    def _restarts(self) -> bool:
        for index, name in self.added.items():
            ids = self.read(f"{name}a")
            if ids[:1] == [index] and len(ids) > 1:
                return ids[1:] == self.plain("a")
        return True


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=False)
    except (Exception, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are not Exceptions; unchanged, one would end the worker
        raise RuntimeError(f"the tokenizer gave up on a text of {len(text)} characters: {error}") from error


def _twin(tokenizer: tokenizers.Tokenizer, added: list[tokenizers.AddedToken]) -> tokenizers.Tokenizer:
    """A tokenizer that reads control tokens: it shares the vocabulary, the largest part, with its twin."""
    twin = tokenizers.Tokenizer(tokenizer.model)
    for step in ("normalizer", "pre_tokenizer"):
        if (value := getattr(tokenizer, step)) is not None:
            setattr(twin, step, value)
    twin.add_tokens(added)
    return twin


def _unknown(model: Mapping[str, Any]) -> str | None:
    """The name of the token for characters that the vocabulary lacks."""
    if (index := model.get("unk_id")) is not None:
        name: str = model["vocab"][index][0]
        return name
    return model.get("unk_token")


def _steps(content: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of normalizer and pre-tokenizer, which may each be a sequence of them."""
    steps: list[Mapping[str, Any]] = []
    for part in (content.get("normalizer") or {}, content.get("pre_tokenizer") or {}):
        steps += part.get("normalizers") or part.get("pretokenizers") or [part]
    return steps


def _adds_space(step: Mapping[str, Any]) -> bool:
    """Whether a step puts a space before a text."""
    if step.get("type") == "Metaspace":
        return step.get("prepend_scheme") != "never"
    return step.get("type") == "Prepend" or (step.get("type") == "ByteLevel" and bool(step.get("add_prefix_space")))
