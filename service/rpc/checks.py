"""Range checks with the wording of the real API: what, where, the allowed range, and what was given."""

from __future__ import annotations

import math

import numpy as np

from service.errors import InvalidRequestError


def integer(name: str, value: int, low: int | None = None, high: int | None = None) -> int:
    """`value`, if it is within `low`..`high`."""
    _bounds(name, "integer", value, given=str(value), low=low, high=high)
    return value


def decimal(name: str, value: float, low: float, high: float) -> float:
    """`value`, if it is a finite number within `low`..`high`."""
    if not math.isfinite(value):
        given = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        message = f"Invalid '{name}': must be a finite number, but got {given} instead."
        raise InvalidRequestError(message, param=name, code="invalid_value")
    _bounds(name, "decimal", value, given=shortest(value), low=low, high=high)
    return value


def shortest(value: float) -> str:
    """A number as the caller wrote it: floats arrive in single precision."""
    return str(np.float32(value))


def _bounds(name: str, kind: str, value: float, *, given: str, low: float | None, high: float | None) -> None:
    if low is not None and value < low:
        problem, expected, code = "below minimum", f">= {low}", "below_min"
    elif high is not None and value > high:
        problem, expected, code = "above maximum", f"<= {high}", "above_max"
    else:
        return
    message = f"Invalid '{name}': {kind} {problem} value. Expected a value {expected}, but got {given} instead."
    raise InvalidRequestError(message, param=name, code=f"{kind}_{code}_value")


def at_most(name: str, what: str, count: int, limit: int, code: str) -> None:
    """Refuses more than `limit` of `what`."""
    if count > limit:
        message = f"Invalid '{name}': at most {limit} {what}, but got {count} instead."
        raise InvalidRequestError(message, param=name, code=code)


def invalid(name: str, problem: str, code: str | None = None) -> InvalidRequestError:
    """The refusal of parameter `name`."""
    return InvalidRequestError(f"Invalid '{name}': {problem}", param=name, code=code)


def shown(text: str, limit: int = 64) -> str:
    """A caller's text as an error message may repeat it: short, and without control characters."""
    cut = text if len(text) <= limit else text[:limit] + "..."
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in cut)
