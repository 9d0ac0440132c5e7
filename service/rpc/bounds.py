"""The contract's own bounds: the `buf.validate` rules that stand in the proto, refused in the words of the real API."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import protovalidate
from buf.validate import validate_pb2
from completion.v1 import completion_pb2 as pb

from service.errors import InvalidRequestError
from service.rpc.checks import at_most, invalid, model_missing, out_of_range, shown

_VALIDATOR = protovalidate.Validator()
_REQUEST = pb.CreateCompletionRequest.DESCRIPTOR
_PROMPTS = {"text", "texts", "tokens", "token_batch"}
_SIZES = {
    "string.max_len": ("characters", "string_above_max_length"),
    "repeated.max_items": ("entries", "array_above_max_length"),
    "map.max_pairs": ("entries", "object_above_max_properties"),
}


def rules(message: Any, field: str) -> Any:
    """The rules of a field of a message: `buf.validate.FieldRules`."""
    return message.DESCRIPTOR.fields_by_name[field].GetOptions().Extensions[validate_pb2.field]


def check(request: pb.CreateCompletionRequest) -> None:
    """Refuses a request outside the bounds of its contract: InvalidRequestError for the first rule that it breaks."""
    violations = _VALIDATOR.collect_violations(request, fail_fast=True)
    if violations:
        path = violations[0].proto.field
        assert path is not None, "the contract has rules of fields alone"
        raise _refusal(path.elements, violations[0].proto.rule_id, violations[0].field_value, violations[0].rule_value)


def _refusal(path: Any, rule: str, value: Any, limit: Any) -> InvalidRequestError:
    """The error for a rule that the field at the end of a path breaks with a value."""
    first, last = path[0].field_name, path[-1]
    name = "prompt" if first in _PROMPTS else first
    if rule in _SIZES:
        what, code = _SIZES[rule]
        what = "prompts" if name == "prompt" else f"{what} per entry" if last.subscript else what
        return at_most(name, what, len(value), limit, code)
    if rule == "repeated.min_items":
        return invalid(name, "must not be empty.", "empty_array")
    if name == "model":
        return model_missing()
    if rule == "string.min_len":
        return invalid(name, f"{name} cannot contain an empty string.", "empty_string")
    if last.subscript and last.subscript.field == "string_key":
        name = f"{name}.{shown(last.subscript.value)}"
    return _number(name, value, getattr(_leaf(path), rule.split(".", maxsplit=1)[0]))


def _leaf(path: Any) -> Any:
    """The rules that hold for the value at a path: a field's own, or those of its items or values."""
    message: Any = _REQUEST
    for element in path[:-1]:
        message = message.fields_by_name[element.field_name].message_type
    last = path[-1]
    field_rules = message.fields_by_name[last.field_name].GetOptions().Extensions[validate_pb2.field]
    if not last.subscript:
        return field_rules
    return field_rules.repeated.items if last.subscript.field == "index" else field_rules.map.values


def _number(name: str, value: float, limits: Any) -> InvalidRequestError:
    """The error for a number outside limits: Int32Rules or FloatRules."""
    if not math.isfinite(value):
        text = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return invalid(name, f"must be a finite number, but got {text} instead.", "invalid_value")
    # A decimal is shown as the caller wrote it: floats arrive in single precision.
    number_type, text = ("integer", str(value)) if isinstance(value, int) else ("decimal", str(np.float32(value)))
    low, high = limits.WhichOneof("greater_than"), limits.WhichOneof("less_than")
    if high and value > getattr(limits, high):
        return out_of_range(name, number_type, "above maximum", f"<= {getattr(limits, high):g}", text)
    sign = ">" if low == "gt" else ">="
    return out_of_range(name, number_type, "below minimum", f"{sign} {getattr(limits, low):g}", text)
