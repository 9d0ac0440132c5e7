"""Kinds of values that a source gives, checked before anything is computed, allocated or repeated by them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, GetCoreSchemaHandler, Strict, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, core_schema

from model_export.errors import ExportError


@dataclass(frozen=True)
class Expected:
    """Marks a pydantic type whose errors all say `expected` and then `what`."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), "expected", custom_error_message=self.what)


@dataclass(frozen=True)
class Whole:
    """Marks a whole number within `low`..`high`."""

    low: int
    high: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.int_schema(strict=True, ge=self.low, le=self.high)
        return core_schema.custom_error_schema(number, "expected", custom_error_message=str(self))

    def __str__(self) -> str:
        return f"a whole number within {self.low}..{self.high}"


@dataclass(frozen=True)
class Real:
    """Marks a number within `low`..`high`."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        number = core_schema.float_schema(strict=True, ge=self.low, le=self.high, allow_inf_nan=False)
        return core_schema.custom_error_schema(number, "expected", custom_error_message=str(self))

    def __str__(self) -> str:
        return f"a number within {self.low:g}..{self.high:g}"


MOST_LAYERS, MOST_TOKENS = 1024, 1 << 22
LEAST_HEAD = 2
SCALE = Real(1e-3, 1e6)

# Several times what the largest models have, and little enough that checking a source by them costs little.
Layers = Annotated[int, Whole(1, MOST_LAYERS)]
Hidden = Annotated[int, Whole(1, 1 << 17)]
Intermediate = Annotated[int, Whole(1, 1 << 20)]
Heads = Annotated[int, Whole(1, 4096)]
HeadDim = Annotated[int, Whole(LEAST_HEAD, 4096)]
VocabSize = Annotated[int, Whole(1, MOST_TOKENS)]
Context = Annotated[int, Whole(2, 1 << 22)]
Window = Annotated[int, Whole(0, 1 << 31)]
Epsilon = Annotated[float, Real(1e-20, 1.0)]
RotaryBase = Annotated[float, Real(1.0, 1e15)]
Share = Annotated[float, Real(0.0, 1.0)]
Scale = Annotated[float, SCALE]
Scales = Annotated[list[Scale], Strict(), Expected(f"a list, each of {SCALE}")]
Text = Annotated[str, Strict(), Expected("a text")]
Texts = Annotated[list[Text], Strict(), Expected("a list, each of a text")]
Flag = Annotated[bool, Strict(), Expected("true or false")]

# Numbers in a table of rotations: as many as four million positions of a head of 128 take.
ROTATION = 1 << 28

Model = TypeVar("Model", bound=BaseModel)


def check(where: str, value: object, kind: Any) -> None:
    """Raises ExportError unless `value`, which stands at `where`, is of the type `kind`."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ExportError(f"{where} is {shown(value)}, expected {error.errors()[0]['msg']}") from None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def parse(model: type[Model], where: str, entries: Mapping[str, Any]) -> Model:
    """The `entries` of the file at `where`. Raises ExportError for the first that is missing or not in bounds."""
    try:
        return model.model_validate(entries)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    name = ".".join(str(part) for part in error["loc"] if part != INNER)
    if error["type"] == "missing":
        raise ExportError(f"{where} has no {name}")
    raise ExportError(f"{where}: {name} is {shown(error['input'])}, expected {error['msg']}")


# A field that gathers entries of other names, which is no part of the path to them.
INNER = "by_kind"


def check_heads(where: str, hidden: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raises ExportError unless queries share keys evenly and a head can be rotated by pairs."""
    if heads % kv_heads:
        raise ExportError(f"{where}: {heads} heads cannot share {kv_heads} heads of keys evenly")
    if head_dim is None and hidden % heads:
        raise ExportError(f"{where}: {heads} heads do not divide the hidden size {hidden} evenly")
    size = hidden // heads if head_dim is None else head_dim
    if size < LEAST_HEAD or size % 2:
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
