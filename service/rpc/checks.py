"""Range checks with the wording of the real API: what, where, the allowed range, and what was given."""

from __future__ import annotations

import math

import numpy as np

from service.errors import InvalidRequestError


def integer(name: str, value: int, low: int, high: int) -> int:
    """`value`, if it is within `low`..`high`."""
    if value < low:
        raise out_of_range(name, "integer", "below minimum", f">= {low}", str(value))
    if value > high:
        raise out_of_range(name, "integer", "above maximum", f"<= {high}", str(value))
    return value


def out_of_range(name: str, number_type: str, problem: str, expected: str, value: str) -> InvalidRequestError:
    """The refusal of a number: `number_type` is integer or decimal, `problem` "below minimum" or "above maximum"."""
    message = f"Invalid '{name}': {number_type} {problem} value. Expected a value {expected}, but got {value} instead."
    code = f"{number_type}_{'below_min' if problem == 'below minimum' else 'above_max'}_value"
    return InvalidRequestError(message, param=name, code=code)


def not_finite(name: str, value: float) -> InvalidRequestError:
    """The refusal of NaN and infinities."""
    shown_value = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return invalid(name, f"must be a finite number, but got {shown_value} instead.", "invalid_value")


def shortest(value: float) -> str:
    """A number as the caller wrote it: floats arrive in single precision."""
    return str(np.float32(value))


def model_missing() -> InvalidRequestError:
    """The refusal of a request without a model."""
    return InvalidRequestError("you must provide a model parameter", param="model")


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
