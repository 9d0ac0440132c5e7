"""Stand-ins whose answers a reader can compute by hand, and small real parts to go with them."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from service import hashes
from service.engine.cache import Copy
from service.manifest import (
    FileEntry,
    FillInTheMiddle,
    KVLayout,
    Manifest,
    Quantization,
    SpecialTokens,
)
from service.quality import Measures, Quality
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

# Tokens 0..25 are the letters, 26 ends a text, 27 begins one.
LETTERS = string.ascii_lowercase
END, BEGIN = 26, 27
VOCABULARY = 28
NO_SPECIAL = SpecialTokens(bos=None, add_bos=False, end=(END,), default_prompt=BEGIN)


def letters_tokenizer(directory: Path, special: SpecialTokens = NO_SPECIAL) -> Tokenizer:
    """A tokenizer of one token per letter: "a" is 0, "z" is 25."""
    vocabulary = {**{letter: index for index, letter in enumerate(LETTERS)}, "<end>": END, "<begin>": BEGIN}
    path = directory / "tokenizer.json"
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    path.write_text(json.dumps({"version": "1.0", "model": model, "decoder": {"type": "Fuse"}}))
    return Tokenizer(path, special, VOCABULARY)


def ids(text: str) -> list[int]:
    """The tokens of a text of letters."""
    return [LETTERS.index(letter) for letter in text]


def _alphabet() -> np.ndarray:
    """The logits after every token: the likeliest has 4, the second next 2, all others 0."""
    table = np.zeros((VOCABULARY, VOCABULARY), np.float32)
    for last in range(VOCABULARY):
        table[last, (last + 1) % len(LETTERS)] = 4
        table[last, (last + 2) % len(LETTERS)] = 2
    return table


ALPHABET = _alphabet()


class FakeModel:
    """The alphabet: after a token comes the next one, around the vocabulary of letters ("z" is followed by "a").

    Slots hold the tokens themselves, and the next token is read from the slot, so a wrong slot, length or copy shows.
    `histories` are the tokens before each computed row; `computed` counts the rows' tokens, `copied`
    the positions copied. The likeliest token has a logit of 4, the second next 2, all others 0. Steps that meet the
    token `fault` fail; after `broken` tokens logits are not numbers; once it is `gone` every step fails.
    """

    def __init__(self, slots: int = 4, context_length: int = 64) -> None:
        self.slots: list[list[int]] = [[] for _ in range(slots)]
        self.context_length = context_length
        self.histories: list[tuple[int, ...]] = []
        self.steps = 0
        self.computed = 0
        self.copied = 0
        self.returned = np.zeros(0, np.float32)
        self.fault: int | None = None
        self.broken: set[int] = set()
        self.gone = False

    def forward(
        self, first_slot: int, rows: Sequence[Sequence[int]], past: Sequence[int], logits_at: Sequence[tuple[int, int]]
    ) -> np.ndarray:
        self.steps += 1
        self.probe(first_slot)
        for index, (row, length) in enumerate(zip(rows, past, strict=True)):
            slot = self.slots[first_slot + index]
            assert length <= len(slot), "the positions before the row were never computed"
            assert length + len(row) <= self.context_length
            if self.fault in row:
                raise RuntimeError("the fake model failed as requested")
            if row:
                slot[length:] = row
                self.histories.append(tuple(slot))
                self.computed += len(row)
        self.returned.fill(np.nan)  # a result is valid until the next call
        after = [self.slots[first_slot + row][past[row] + position] for row, position in logits_at]
        self.returned = ALPHABET[after]
        for row, last in enumerate(after):
            if last in self.broken:
                self.returned[row, 5] = np.nan
        return self.returned

    def probe(self, slot: int) -> None:
        if self.gone:
            raise RuntimeError("the fake model is gone")

    def copy(self, copies: Sequence[Copy]) -> None:
        for item in copies:
            assert item.length <= len(self.slots[item.source]), "copies positions that were never computed"
            self.copied += item.length if item.source != item.target else 0
            self.slots[item.target] = self.slots[item.source][: item.length]
            if item.moves:
                self.slots[item.source] = []


def request(*prompts: str | Prompt, **changes: object) -> Request:
    """A greedy request for three letters after each prompt, with `changes`."""
    made = tuple(Prompt(tuple(ids(each)), each) if isinstance(each, str) else each for each in prompts or ("a",))
    n = changes.get("n", 1)
    values: dict[str, object] = {
        "id": "cmpl-0",
        "model": "alphabet",
        "created": 0,
        "identity": "caller",
        "prompts": made,
        "max_tokens": 3,
        "n": n,
        "best_of": n,
        "stream": True,
        "stop_token_ids": frozenset({END}),
        "sampling": SamplingParams(temperature=0),
    }
    return Request(**{**values, **changes})  # type: ignore[arg-type]


MEASURES = Measures(bytes=0, perplexity=1.0, read_per_second=1.0, generated_per_second=1.0)
QUALITY = Quality(
    kl=0.0,
    max_logit_error=0.0,
    tokens=1,
    decode_kl=0.0,
    mean_logit_error=0.0,
    source=MEASURES,
    export=MEASURES,
)


def manifest(**changes: object) -> Manifest:
    """The description of the alphabet model, with `changes`."""
    values: dict[str, object] = {
        "format_version": 2,
        "id": "alphabet",
        "aliases": ("abc",),
        "created": 1_700_000_000,
        "owned_by": "tests",
        "architecture": "fake",
        "context_length": 64,
        "vocab_size": VOCABULARY,
        "special_tokens": NO_SPECIAL,
        "kv": KVLayout(layers=1, kv_heads=1, head_dim=1, dtype="float32"),
        "quantization": Quantization(weights="float32", activations="float32", source="float32", pads_lone_row=True),
        "quality": QUALITY,
        "files": {},
    }
    return Manifest.model_validate({**values, **changes})


def file_entry(size: int) -> FileEntry:
    """The entry of a file of `size` bytes that does not exist."""
    return FileEntry(bytes=size, sha256=("0" * 64,) * hashes.count(size))


FILL = FillInTheMiddle(prefix=23, suffix=24, middle=25)
