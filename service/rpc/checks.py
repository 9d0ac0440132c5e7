"""Range checks with the wording of the real API: what, where, the allowed range, and what was given."""

from __future__ import annotations

from collections.abc import Sequence

from service.errors import InvalidRequestError

# Names that one message lists.
_SHOWN_NAMES = 8

# What messages call the kinds of google.protobuf.Value.
JSON_TYPES = {
    None: "nothing",
    "null_value": "null",
    "bool_value": "a boolean",
    "number_value": "a number",
    "string_value": "a string",
    "list_value": "an array",
    "struct_value": "an object",
}


def check_maximum(name: str, value: int, high: int) -> None:
    """Raises InvalidRequestError if an integer is above `high`; the contract's own rules have the lower bound."""
    if value > high:
        raise out_of_range(name, "integer", "above maximum", f"<= {high}", str(value))


def out_of_range(name: str, number_type: str, problem: str, expected: str, value: str) -> InvalidRequestError:
    """The refusal of a number: `number_type` is integer or decimal, `problem` "below minimum" or "above maximum"."""
    message = f"Invalid '{name}': {number_type} {problem} value. Expected a value {expected}, but got {value} instead."
    code = f"{number_type}_{'below_min' if problem == 'below minimum' else 'above_max'}_value"
    return InvalidRequestError(message, param=name, code=code)


def model_missing() -> InvalidRequestError:
    """The refusal of a request without a model."""
    return InvalidRequestError("you must provide a model parameter", param="model")


def missing(name: str) -> InvalidRequestError:
    """The refusal of a message without a field that it needs."""
    return InvalidRequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")


def not_supported_value(name: str, value: object, allowed: Sequence[object]) -> InvalidRequestError:
    """The refusal of a value that is none of those allowed."""
    given, *supported = (str(each).lower() if isinstance(each, bool) else str(each) for each in (value, *allowed))
    names = ", ".join(f"'{each}'" for each in supported)
    message = f"Invalid value: '{shown(given)}'. Supported values are: {names}."
    return InvalidRequestError(message, param=name, code="invalid_value")


def unknown(names: Sequence[str], why: str = "") -> InvalidRequestError:
    """The refusal of parameters that the contract does not have; `why` is a further sentence."""
    words = "argument" if len(names) == 1 else "arguments"
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    message = f"Unrecognized request {words} supplied: {', '.join(names[:_SHOWN_NAMES])}{more}{why}"
    return InvalidRequestError(message, param=names[0], code="unknown_parameter")


def unsupported(name: str, why: str) -> InvalidRequestError:
    """The refusal of a parameter that the model or the service cannot honour."""
    message = f"Unsupported parameter: '{name}' is not supported {why}."
    return InvalidRequestError(message, param=name, code="unsupported_parameter")


def wrong_type(name: str, expected: str, given: str) -> InvalidRequestError:
    """The refusal of a JSON value of another type than the parameter's."""
    message = f"Invalid type for '{name}': expected {expected}, but got {given} instead."
    return InvalidRequestError(message, param=name, code="invalid_type")


def at_most(name: str, what: str, count: int, limit: int, code: str) -> InvalidRequestError:
    """The refusal of more than `limit` of `what`."""
    return invalid(name, f"at most {limit} {what}, but got {count} instead.", code)


def invalid(name: str, problem: str, code: str | None = None) -> InvalidRequestError:
    """The refusal of parameter `name`."""
    return InvalidRequestError(f"Invalid '{name}': {problem}", param=name, code=code)


def shown(text: str, limit: int = 64) -> str:
    """A caller's text as an error message may repeat it: short, and without control characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in cut)
