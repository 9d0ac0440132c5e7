"""Types of the fields of a source's configuration, each with its range. They are checked before any use."""

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
    """Marks a pydantic type whose every error message is `what`, the words after "expected"."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.custom_error_schema(handler(source), "expected", custom_error_message=self.what)


@dataclass(frozen=True)
class Within:
    """Marks a number within `low`..`high`: a whole number if these are whole, or else a finite one."""

    low: float
    high: float

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema: Any = core_schema.int_schema if source is int else core_schema.float_schema
        number = schema(strict=True, ge=self.low, le=self.high)
        return core_schema.custom_error_schema(number, "expected", custom_error_message=str(self))

    def __str__(self) -> str:
        if isinstance(self.low, int):
            return f"a whole number within {self.low}..{self.high}"
        return f"a number within {self.low:g}..{self.high:g}"


MOST_LAYERS, MOST_TOKENS = 1024, 1 << 22
SMALLEST_HEAD = 2
# The head sizes that GroupQueryAttention supports, with and without rotation, are multiples of these.
ROTATED_HEAD, PLAIN_HEAD = 16, 8
SCALE = Within(1e-3, 1e6)

# The bounds are several times the sizes of the largest models, and small enough that checks within them cost little.
Layers = Annotated[int, Within(1, MOST_LAYERS)]
Hidden = Annotated[int, Within(1, 1 << 17)]
Intermediate = Annotated[int, Within(1, 1 << 20)]
Heads = Annotated[int, Within(1, 4096)]
HeadDim = Annotated[int, Within(SMALLEST_HEAD, 4096)]
VocabSize = Annotated[int, Within(1, MOST_TOKENS)]
Context = Annotated[int, Within(2, 1 << 22)]
Window = Annotated[int, Within(0, 1 << 31)]
Epsilon = Annotated[float, Within(1e-20, 1.0)]
RotaryBase = Annotated[float, Within(1.0, 1e15)]
Share = Annotated[float, Within(0.0, 1.0)]
Scale = Annotated[float, SCALE]
Scales = Annotated[list[Scale], Strict(), Expected(f"a list, each entry {SCALE}")]
Text = Annotated[str, Strict(), Expected("a text")]
Texts = Annotated[list[Text], Strict(), Expected("a list of texts")]
Flag = Annotated[bool, Strict(), Expected("true or false")]

# The largest table of rotations, in numbers: four million positions of a head of 128.
LARGEST_ROTATION_TABLE = 1 << 28

Model = TypeVar("Model", bound=BaseModel)


def check_type(where: str, value: object, field_type: Any) -> None:
    """Raises ExportError unless `value`, found at `where` in the source, has the type `field_type`."""
    try:
        _adapter(field_type).validate_python(value)
    except ValidationError as error:
        raise ExportError(f"{where} is {abbreviated(value)}, expected {error.errors()[0]['msg']}") from None


@cache
def _adapter(field_type: Any) -> TypeAdapter[Any]:
    return TypeAdapter(field_type)


def parse(model: type[Model], where: str, entries: Mapping[str, Any]) -> Model:
    """The `entries` of the file `where` as a `model`. Raises ExportError for one that is missing or out of range."""
    try:
        return model.model_validate(entries)
    except ValidationError as invalid:
        error = invalid.errors(include_url=False)[0]
    name = ".".join(str(part) for part in error["loc"] if part != BY_LAYER_TYPE)
    if error["type"] == "missing":
        raise ExportError(f"{where} has no {name}")
    raise ExportError(f"{where}: {name} is {abbreviated(error['input'])}, expected {error['msg']}")


# A field that collects objects whose names are not known beforehand; paths in error messages leave it out.
BY_LAYER_TYPE = "by_layer_type"


def check_heads(where: str, hidden: int, heads: int, kv_heads: int, head_dim: int | None) -> None:
    """Raises ExportError unless the heads share the KV heads, and without a head size the hidden size, evenly."""
    if heads % kv_heads:
        raise ExportError(f"{where}: {heads} heads cannot share {kv_heads} heads of keys evenly")
    if head_dim is None and hidden % heads:
        raise ExportError(f"{where}: {heads} heads do not divide the hidden size {hidden} evenly")


def check_head_size(where: str, head_dim: int, *, rotated: bool = True) -> None:
    """Raises ExportError for a head size that onnxruntime's attention does not support."""
    multiple = ROTATED_HEAD if rotated else PLAIN_HEAD
    if head_dim % multiple or head_dim == 0:
        raise ExportError(f"{where}: the head size is {head_dim}, supported are multiples of {multiple}")


def check_rotation(where: str, context: int | None, head_dim: int) -> None:
    """Raises ExportError where the tables of cosines and sines for each position would be too large."""
    if context is not None and context * (head_dim // 2) > LARGEST_ROTATION_TABLE:
        size, most = f"{context} positions of a head of {head_dim} numbers", LARGEST_ROTATION_TABLE // (head_dim // 2)
        raise ExportError(f"{where}: the context is {size}, expected at most {most} positions")


def abbreviated(value: object) -> str:
    """A value for an error message, cut off after 80 characters."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = " ".join(repr(value).split())  # arrays have several lines
    return text if len(text) <= 80 else f"{text[:80]}..."
