"""Encodes text as token ids, and decodes token ids to bytes."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers

from service.errors import InvalidRequestError, ModelDirectoryError
from service.manifest import SpecialTokens
from service.text.decoding import Decoding, UnsupportedDecoderError
from service.types import Prompt

# A text that tokenizers do not merge with the text after it; `_encode_further` checks this.
_START = "\0"


class Tokenizer:
    """A model's vocabulary, both ways.

    Encoding treats the text of control tokens as plain text. Decoding is exact: every token id has fixed bytes, and a
    text is the joined bytes of its tokens, decoded as UTF-8.
    """

    def __init__(self, path: Path, special: SpecialTokens, vocab_size: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelDirectoryError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._special = special
        self.vocab_size = vocab_size
        self._check_ids(path)
        try:
            self._decoding = Decoding(self._tokenizer, vocab_size)
        except UnsupportedDecoderError as error:
            raise ModelDirectoryError(f"{path}: {error}") from error

    def _check_ids(self, path: Path) -> None:
        """Raises ModelDirectoryError if text could become a token id beyond the vocabulary of the model."""
        if outside := token_outside(self._tokenizer, self.vocab_size):
            token, index = outside
            message = f"{path}: token {token!r} is {index}, but the manifest allows only"
            raise ModelDirectoryError(f"{message} 0..{self.vocab_size - 1}")

    def encode(self, text: str) -> list[int]:
        """The token ids of `text`, without added tokens. Raises RuntimeError if the library fails."""
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (Exception, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library's panics are not Exceptions; unchanged, one would end the worker
            raise RuntimeError(f"the tokenizer gave up on a text of {len(text)} characters: {error}") from error
        return ids

    def prompt(self, text: str) -> Prompt:
        """The prompt of `text`. Raises InvalidRequestError if it is empty and the model has no token for that."""
        start = [self._special.bos] if self._special.add_bos and self._special.bos is not None else []
        ids = start + self.encode(text)
        if not ids:
            if self._special.default_prompt is None:
                raise InvalidRequestError("Invalid 'prompt': this model needs at least one token.", param="prompt")
            start = ids = [self._special.default_prompt]
        return Prompt(token_ids=tuple(ids), text=text, implied=len(start))

    def prompt_of_tokens(self, ids: Iterable[int]) -> Prompt:
        """The prompt of these token ids, each within the vocabulary."""
        token_ids = tuple(ids)
        detokenizer = Detokenizer()
        text = "".join(map(detokenizer.push, self.text_bytes(token_ids)))
        return Prompt(token_ids=token_ids, text=text, tail=detokenizer.unfinished)

    def fill_in_the_middle(self, prompt: Prompt, suffix: str) -> Prompt:
        """The prompt whose completion fills the gap between `prompt` and `suffix`.

        If `prompt` starts with the beginning-of-sequence token, so does the result. Raises ValueError if the model has
        no fill-in-the-middle tokens.
        """
        marks = self._special.fill_in_the_middle
        if marks is None:
            raise ValueError("the model has no fill-in-the-middle tokens")
        begun = prompt.token_ids[0] == self._special.bos and (self._special.add_bos or not prompt.implied)
        start = prompt.token_ids[:1] if begun else ()
        before = (marks.prefix, *prompt.token_ids[max(prompt.implied, len(start)) :])
        after = (marks.suffix, *self._encode_further(suffix))
        middle = () if marks.middle is None else (marks.middle,)
        parts = (*before, *after) if marks.order == "psm" else (*after, *before)
        return dataclasses.replace(prompt, token_ids=(*start, *parts, *middle), implied=len(start), tail=b"")

    def _encode_further(self, text: str) -> list[int]:
        """The token ids of a text in the middle of another: without the space that some tokenizers add at the start."""
        if not self._decoding.loses_first_space:
            return self.encode(text)
        start, both = self.encode(_START), self.encode(_START + text)
        return both[len(start) :] if both[: len(start)] == start else self.encode(text)

    def text_bytes(self, ids: Iterable[int], implied: int = 0) -> Iterator[bytes]:
        """The bytes that each token adds to a text from its start; none for the first `implied` tokens."""
        ids = list(ids)
        yield from [b""] * min(implied, len(ids))
        yield from self._decoding.of_text(ids[implied:])

    def token_bytes(self, index: int) -> bytes:
        """The bytes of a token."""
        return self._decoding.of_token(index)

    def token_text(self, index: int) -> str:
        r"""The text of a token, or `bytes:\xNN...` if it is not complete UTF-8."""
        return readable(self._decoding.of_token(index))


def token_outside(tokenizer: tokenizers.Tokenizer, vocab_size: int) -> tuple[str, int] | None:
    """The first 80 characters and the id of a token that text can become but that the model has no embedding for.

    Special tokens may have higher ids: text never becomes one. None where there is no such token.
    """
    special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index >= vocab_size and index not in special:
            return token[:80], index
    return None


def readable(token: bytes) -> str:
    r"""Bytes as text, or as `bytes:\xNN...` if they are not complete UTF-8."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


class Detokenizer:
    """Decodes one sequence token by token, in constant time each.

    Law: the joined pieces equal the decoding of the joined bytes, without an unfinished character at the end.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: bytes) -> str:
        """The characters that `token` completes."""
        return self._decoder.decode(token)

    @property
    def unfinished(self) -> bytes:
        """The bytes of a character that the last token left unfinished."""
        return self._decoder.getstate()[0]
