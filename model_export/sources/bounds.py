"""Numbers that a source gives, checked before anything is computed, allocated or repeated by them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model_export.errors import ExportError


@dataclass(frozen=True)
class Whole:
    """A whole number within `low`..`high`."""

    low: int
    high: int

    def holds(self, value: object) -> bool:
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"a whole number within {self.low}..{self.high}"


@dataclass(frozen=True)
class Real:
    """A number within `low`..`high`."""

    low: float
    high: float

    def holds(self, value: object) -> bool:
        return type(value) in (int, float) and self.low <= value <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        return f"a number within {self.low:g}..{self.high:g}"


@dataclass(frozen=True)
class Instance:
    """A value of a Python type, which users know by `name`."""

    type: type
    name: str

    def holds(self, value: object) -> bool:
        return isinstance(value, self.type)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Listed:
    """A list of values of one kind."""

    each: Whole | Real | Instance

    def holds(self, value: object) -> bool:
        return isinstance(value, list) and all(map(self.each.holds, value))

    def __str__(self) -> str:
        return f"a list, each of {self.each}"


# What a value has to be.
Kind = Whole | Real | Instance | Listed

# Several times what the largest models have, and little enough that checking a source by them costs little.
LAYERS = Whole(1, 1024)
HIDDEN = Whole(1, 1 << 17)
INTERMEDIATE = Whole(1, 1 << 20)
HEADS = Whole(1, 4096)
HEAD_DIM = Whole(2, 4096)
VOCABULARY = Whole(1, 1 << 22)
CONTEXT = Whole(2, 1 << 22)
WINDOW = Whole(0, 1 << 31)
# Numbers in a table of rotations: as many as four million positions of a head of 128 take.
ROTATION = 1 << 28
EPSILON = Real(1e-20, 1.0)
ROTARY_BASE = Real(1.0, 1e15)
SCALING = Real(1e-3, 1e6)
TEXT = Instance(str, "a text")
FLAG = Instance(bool, "true or false")


def check(where: str, value: object, kind: Kind) -> None:
    """Raises ExportError unless `value`, which stands at `where`, is of `kind`."""
    if not kind.holds(value):
        raise ExportError(f"{where} is {shown(value)}, expected {kind}")


def check_heads(where: str, hidden: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raises ExportError unless queries share keys evenly and a head can be rotated by pairs."""
    if heads % kv_heads:
        raise ExportError(f"{where}: {heads} heads cannot share {kv_heads} heads of keys evenly")
    if head_dim is None and hidden % heads:
        raise ExportError(f"{where}: {heads} heads do not divide the hidden size {hidden} evenly")
    size = hidden // heads if head_dim is None else head_dim
    if size < HEAD_DIM.low or size % 2:
        raise ExportError(f"{where}: the head size is {size}, expected an even number")


def check_rotation(where: str, context: int | None, head_dim: int) -> None:
    """Raises ExportError where the tables of how each position turns a head would be too large to make."""
    if context is not None and context * (head_dim // 2) > ROTATION:
        size = f"{context} positions of a head of {head_dim} numbers"
        raise ExportError(f"{where}: the context is {size}, expected at most {ROTATION // (head_dim // 2)} positions")


def shown(value: object) -> str:
    """A value as it may stand in a sentence."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
