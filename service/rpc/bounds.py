"""The contract's own bounds: the `buf.validate` rules that stand in the proto, refused in the words of the real API."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import protovalidate
from buf.validate import validate_pb2
from google.protobuf.message import Message

from service.errors import InvalidRequestError
from service.rpc.checks import at_most, invalid, missing, model_missing, not_supported_value, out_of_range, shown

_VALIDATOR = protovalidate.Validator()
_PROMPTS = {"text", "texts", "tokens", "token_batch", "parts"}
# Parts of a path that JSON does not have: the oneof, and the array in a message of its own.
_UNNAMED = {"constraint", "texts"}
_SIZES = {
    "string.max_len": ("characters", "string_above_max_length"),
    "string.max_bytes": ("bytes", "string_above_max_length"),
    "repeated.max_items": ("entries", "array_above_max_length"),
    "map.max_pairs": ("entries", "object_above_max_properties"),
}
_CHOICES = {"enum.defined_only", "enum.not_in", "string.const", "bool.const"}


def rules(message: Any, field: str) -> Any:
    """The rules of a field of a message: `buf.validate.FieldRules`."""
    return message.DESCRIPTOR.fields_by_name[field].GetOptions().Extensions[validate_pb2.field]


def check(request: Message) -> None:
    """Refuses a request outside the bounds of its contract: InvalidRequestError for the first rule that it breaks."""
    violations = _VALIDATOR.collect_violations(request, fail_fast=True)
    if violations:
        path = violations[0].proto.field
        assert path is not None, "the contract has rules of fields alone"
        owner = _owner(request.DESCRIPTOR, path.elements)
        rule, value, limit = violations[0].proto.rule_id, violations[0].field_value, violations[0].rule_value
        raise _refusal(owner, path.elements, rule, value, limit)


def _refusal(owner: Any, path: Any, rule: str, value: Any, limit: Any) -> InvalidRequestError:
    """The error for a rule that the field at the end of a path, in a message of type `owner`, breaks with a value."""
    last, name = path[-1], _name(path)
    if rule in _SIZES:
        what, code = _SIZES[rule]
        what = "prompts" if name == "prompt" else f"{what} per entry" if last.subscript else what
        return at_most(name, what, len(value.encode() if what == "bytes" else value), limit, code)
    if rule in _CHOICES:
        enum = owner.fields_by_name[last.field_name].enum_type
        return not_supported_value(name, value, [each.name for each in enum.values if each.number] if enum else [limit])
    kind, _, bound = rule.partition(".")
    if kind in {"int32", "float"}:
        limits = getattr(_rules_at(owner, last), kind)
        if bound == "not_in":
            return invalid(name, f"expected a value >= {limits.gte} other than {value}.", "invalid_value")
        return _number(name, value, limits)
    return _absent(owner, last.field_name, name, rule)


def _absent(owner: Any, field: str, name: str, rule: str) -> InvalidRequestError:
    """The error for a field, or a oneof, of `owner` that is missing or empty."""
    if name == "model":
        return model_missing()
    if rule == "repeated.min_items":
        return invalid(name, "must not be empty.", "empty_array")
    if rule == "string.min_len":
        return invalid(name, f"{name} cannot contain an empty string.", "empty_string")
    if field in owner.fields_by_name:
        return missing(name)
    names = ", ".join(each.name for each in owner.oneofs_by_name[field].fields)
    return invalid(name, f"exactly one of {names} is required.", "invalid_value")


def _name(path: Any) -> str:
    """What a refusal calls the field at the end of a path: in an array it has the array's name."""
    names = [element.field_name for element in path]
    if names[0] in _PROMPTS:
        if names[0] == "parts" and len(path) > 1 and path[1].subscript:
            return f"prompt[{path[1].subscript.value}]" + (".tokens" if "tokens" in names else "")
        return "prompt"
    if path[-1].subscript and path[-1].subscript.field == "string_key":
        names.append(shown(path[-1].subscript.value))
    return ".".join(name for name in names if name not in _UNNAMED)


def _owner(message: Any, path: Any) -> Any:
    """The descriptor of the message within `message` that has the field at the end of a path."""
    for element in path[:-1]:
        message = message.fields_by_name[element.field_name].message_type
    return message


def _rules_at(owner: Any, element: Any) -> Any:
    """The rules that hold for the value at an element of a path: a field's own, or those of its items or values."""
    field_rules = owner.fields_by_name[element.field_name].GetOptions().Extensions[validate_pb2.field]
    if not element.subscript:
        return field_rules
    return field_rules.repeated.items if element.subscript.field == "index" else field_rules.map.values


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
