"""Encodes text as token ids, and decodes token ids to bytes."""

from __future__ import annotations

import codecs
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from service.errors import InvalidRequestError, ModelDirectoryError
from service.manifest import SpecialTokens
from service.text.decoding import Decoding, UnsupportedDecoderError
from service.text.encoder import Encoder
from service.text.spellings import Spellings
from service.types import Prompt


class Tokenizer:
    """A model's vocabulary, both ways.

    Text becomes a control token only where it is read with control tokens. Decoding is exact: every token id has fixed
    bytes, except that the start of a text may lose spaces, and a text is the joined bytes of its tokens, decoded as
    UTF-8.
    """

    def __init__(self, path: Path, special: SpecialTokens, vocab_size: int) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelDirectoryError(f"{path} is not a tokenizer file: {error}") from error
        self._special = special
        self.vocab_size = vocab_size
        self._check_ids(path)
        self._encoder = Encoder(self._tokenizer, json.loads(path.read_text(encoding="utf-8")), vocab_size)
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

    @property
    def control_tokens(self) -> Mapping[int, str]:
        """The names of the control tokens, by id."""
        return self._encoder.control

    def control_token(self, name: str) -> int | None:
        """The id of the control token of this name; None if there is none."""
        return self._encoder.control_token(name)

    def encode(self, text: str) -> list[int]:
        """The token ids of `text` without control tokens. Raises RuntimeError if the library fails."""
        return self._encoder.plain(text)

    def tokens(
        self, parts: Sequence[str | Sequence[int]], *, parse_special: bool, add_special: bool
    ) -> tuple[list[int], int]:
        """The token ids of texts and of ids between them, and how many of them are implied: 1 with an added BOS.

        Texts that follow one another are one text. `parse_special` reads control tokens in them; `add_special` puts
        the beginning-of-sequence token before them, if the model wants it and they do not begin with it.
        """
        ids: list[int] = []
        for part in _joined(parts):
            if not isinstance(part, str):
                ids += part
            elif parse_special:
                ids += self._encoder.read(part)
            else:
                ids += self._encoder.plain(part, further=bool(ids) and not self._encoder.restarts)
        bos = self._special.bos
        if bos is None or not (add_special and self._special.add_bos) or ids[:1] == [bos]:
            return ids, 0
        return [bos, *ids], 1

    def prompt(self, text: str, *, parse_special: bool = False, add_special: bool = True) -> Prompt:
        """The prompt of `text`; `tokens` explains the parameters.

        Raises InvalidRequestError if it is empty and the model has no token for that.
        """
        ids, implied = self.tokens([text], parse_special=parse_special, add_special=add_special)
        return self._prompt(ids, implied, text)

    def prompt_of_parts(self, parts: Sequence[str | Sequence[int]], *, add_special: bool) -> Prompt:
        """The prompt of texts without control tokens and of ids between them."""
        ids, implied = self.tokens(parts, parse_special=False, add_special=add_special)
        if all(isinstance(part, str) for part in parts):
            return self._prompt(ids, implied, "".join(map(str, parts)))
        return self.prompt_of_tokens(ids, implied)

    def _prompt(self, ids: Sequence[int], implied: int, text: str) -> Prompt:
        if not ids:
            if self._special.default_prompt is None:
                raise InvalidRequestError("Invalid 'prompt': this model needs at least one token.", param="prompt")
            ids, implied = [self._special.default_prompt], 1
        return Prompt(token_ids=tuple(ids), text=text, implied=implied)

    def prompt_of_tokens(self, ids: Iterable[int], implied: int = 0) -> Prompt:
        """The prompt of these token ids, each within the vocabulary; the first `implied` of them have no text."""
        token_ids = tuple(ids)
        detokenizer = Detokenizer()
        text = "".join(map(detokenizer.push, self.text_bytes(token_ids, implied)))
        return Prompt(token_ids=token_ids, text=text, implied=implied, tail=detokenizer.unfinished)

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
        after = (marks.suffix, *self._encoder.plain(suffix, further=True))
        middle = () if marks.middle is None else (marks.middle,)
        parts = (*before, *after) if marks.order == "psm" else (*after, *before)
        return dataclasses.replace(prompt, token_ids=(*start, *parts, *middle), implied=len(start), tail=b"")

    def text_bytes(self, ids: Iterable[int], implied: int = 0) -> Iterator[bytes]:
        """The bytes that each token adds to a text from its start; none for the first `implied` tokens."""
        ids = list(ids)
        yield from [b""] * min(implied, len(ids))
        yield from self._decoding.of_text(ids[implied:])

    @cached_property
    def spellings(self) -> Spellings:
        """The tokens by their bytes. The first use takes about 0.1 s."""
        return Spellings([self._decoding.of_token(index) for index in range(self.vocab_size)])

    def token_bytes(self, index: int, *, skip_special: bool = False) -> bytes:
        """The bytes of a token; a control token has its name's, or with `skip_special` none."""
        return b"" if skip_special and index in self._encoder.control else self._decoding.of_token(index)

    def token_text(self, index: int) -> str:
        r"""The text of a token, or `bytes:\xNN...` if it is not complete UTF-8."""
        return readable(self._decoding.of_token(index))


def _joined(parts: Sequence[str | Sequence[int]]) -> Iterator[str | Sequence[int]]:
    """The parts, those texts joined that follow one another."""
    texts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        if texts:
            yield "".join(texts)
            texts = []
        yield part
    if texts:
        yield "".join(texts)


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
