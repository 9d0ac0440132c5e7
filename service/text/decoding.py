"""What each token adds to a text: the decoder of a tokenizer file, applied to one token at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import tokenizers

# The decoder reads two digits as Rust does, which allows a sign.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
# GPT-2's table for byte-level vocabularies: printable characters stand for their bytes, others for the rest.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REST = sorted(set(range(256)) - set(_PRINTABLE))
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(_REST)}
BYTE_CHARACTERS = frozenset(_BYTE_OF_CHARACTER)
_CHARACTER_OF_BYTE = {byte: character for character, byte in _BYTE_OF_CHARACTER.items()}

SUPPORTED = ("ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "Sequence")

Step = Callable[[str], str | bytes]


class UnsupportedDecoderError(ValueError):
    """The decoder cannot be applied to one token at a time; the message is one sentence."""


@dataclass
class _Chain:
    """The steps of a decoder: those for any token, those for the first one, and what the start of a text loses."""

    steps: list[Step] = field(default_factory=list)
    first_steps: list[Step] = field(default_factory=list)
    # Pairs of a character and how many copies of it are removed from the start of a text, one pair after the other.
    stripped: list[tuple[bytes, int]] = field(default_factory=list)
    fused: bool = False
    in_bytes: bool = False

    def add(self, step: Step, first: Step | None = None) -> None:
        self.steps.append(step)
        self.first_steps.append(first or step)


class Decoding:
    """The bytes of every token of a tokenizer, for ids below `size`; an id without a token has none.

    Law: the bytes that `of_text` gives for ids, joined and decoded as UTF-8 with replacement characters, are what the
    library's own decoder makes of the same ids, control tokens included. Only where a run of byte tokens (`<0xNN>`) is
    not UTF-8 the library replaces every byte of the run, and here complete characters within it stay.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int) -> None:
        """Raises UnsupportedDecoderError for a decoder with steps that need more than one token."""
        chain = _chain(tokenizer)
        self._bytes = [b""] * size
        self._first: dict[int, bytes] = {}
        self._stripped = chain.stripped
        for index in range(size):
            if (token := tokenizer.id_to_token(index)) is None:
                continue
            self._bytes[index] = _apply(chain.steps, token)
            if chain.first_steps != chain.steps and (first := _apply(chain.first_steps, token)) != self._bytes[index]:
                self._first[index] = first

    def of_token(self, index: int) -> bytes:
        """The bytes of a token that is not the first of a text."""
        return self._bytes[index]

    def of_text(self, ids: Iterable[int]) -> Iterator[bytes]:
        """The bytes that each token adds to a text from its start."""
        stripped, begun = list(self._stripped), False
        for index in ids:
            token = self._bytes[index] if begun else self._first.get(index, self._bytes[index])
            begun = begun or self._bytes[index] != b""  # ids without a token do not count
            yield _without_start(token, stripped) if stripped else token


def _without_start(token: bytes, stripped: list[tuple[bytes, int]]) -> bytes:
    """`token` without what the start of a text loses; `stripped` keeps what the tokens after it may still lose."""
    while token and stripped:
        character, count = stripped[0]
        if count and token.startswith(character):
            token, stripped[0] = token[len(character) :], (character, count - 1)
        else:
            del stripped[0]
    return token


def byte_level(text: str) -> str:
    """The spelling of `text` in a byte-level vocabulary."""
    return "".join(_CHARACTER_OF_BYTE[byte] for byte in text.encode())


def _apply(steps: list[Step], token: str) -> bytes:
    value: str | bytes = token
    for step in steps:
        if isinstance(value, bytes):
            break
        value = step(value)
    return value.encode() if isinstance(value, str) else value


def _chain(tokenizer: tokenizers.Tokenizer) -> _Chain:
    chain = _Chain()
    if tokenizer.decoder is None:  # tokens are joined by spaces
        chain.add(lambda token: f" {token}", lambda token: token)
        return chain
    for part in _parts(json.loads(tokenizer.decoder.__getstate__())):
        _add(chain, part)
    return chain


def _parts(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The decoders of nested sequences, in their order."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for part in decoder["decoders"]:
        yield from _parts(part)


def _add(chain: _Chain, part: dict[str, Any]) -> None:
    name = part["type"]
    if name not in SUPPORTED:
        known = ", ".join(SUPPORTED)
        raise UnsupportedDecoderError(f"decoder {name} needs more than one token at a time; supported are {known}")
    if name == "Fuse":
        chain.fused = True
        return
    if name == "Strip" and chain.fused:
        if part["stop"]:
            raise UnsupportedDecoderError(f"decoder Strip removes {part['stop']} characters at the end, supported is 0")
        chain.stripped.append((part["content"].encode(), part["start"]))
        return
    if chain.fused or chain.in_bytes:
        raise UnsupportedDecoderError(f"decoder {name} follows one that joins tokens; only Fuse and Strip may do so")
    match name:
        case "ByteFallback":
            chain.in_bytes = True
            chain.add(_byte_fallback)
        case "ByteLevel":
            chain.fused = True
            chain.add(_byte_level)
        case "Metaspace":
            mark, never = part["replacement"], part["prepend_scheme"] == "never"
            chain.add(lambda token: token.replace(mark, " "), None if never else lambda token: token.replace(mark, ""))
        case "Replace":
            chain.add(_replace(part))
        case "Strip":
            strip = tokenizers.decoders.Strip(part["content"], part["start"], part["stop"])
            chain.add(lambda token: strip.decode([token]))


def _replace(part: dict[str, Any]) -> Step:
    pattern, content = part["pattern"], part["content"]
    if text := pattern.get("String"):
        return lambda token: token.replace(text, content)
    rule = tokenizers.Regex(pattern["Regex"]) if "Regex" in pattern else ""
    decoder = tokenizers.decoders.Replace(rule, content)
    return lambda token: decoder.decode([token])


def _byte_fallback(token: str) -> str | bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token


def _byte_level(token: str) -> str | bytes:
    if not set(token) <= BYTE_CHARACTERS:
        return token
    return bytes(_BYTE_OF_CHARACTER[character] for character in token)
