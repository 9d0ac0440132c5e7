"""The rules in the proto are what the service refuses by: each bound is allowed, and what lies beyond is not."""

from __future__ import annotations

import cProfile
import math
import pstats
from typing import Any

import pytest
from completion.v1 import completion_pb2 as pb

from service.errors import InvalidRequestError
from service.rpc import bounds

REQUEST = pb.CreateCompletionRequest.DESCRIPTOR


def numbers():
    """(field, bound, allowed, refused, sign) for every number with a bound in the proto."""
    for field in REQUEST.fields:
        kind = bounds.rules(pb.CreateCompletionRequest, field.name).WhichOneof("type")
        if kind not in {"int32", "float"}:
            continue
        limits = getattr(bounds.rules(pb.CreateCompletionRequest, field.name), kind)
        step = 1 if kind == "int32" else 0.25
        for name, sign in (("gte", -1), ("lte", 1), ("gt", -1)):
            if limits.HasField(name):
                bound = getattr(limits, name)
                allowed, refused = (bound - sign * step, bound) if name == "gt" else (bound, bound + sign * step)
                yield pytest.param(field.name, bound, allowed, refused, sign, id=f"{field.name} {name}")


def refusal(**fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        bounds.check(pb.CreateCompletionRequest(model="m", **fields))
    return caught.value


@pytest.mark.parametrize(("name", "bound", "allowed", "refused", "sign"), list(numbers()))
def test_every_number(name, bound, allowed, refused, sign):
    """The bound is where the proto has it, and the refusal names it."""
    bounds.check(pb.CreateCompletionRequest(model="m", **{name: allowed}))
    error = refusal(**{name: refused})
    assert error.param == name
    assert error.code.endswith("above_max_value" if sign > 0 else "below_min_value")
    assert f" {bound:g}, but got {refused:g}" in error.message


@pytest.mark.parametrize("name", [field.name for field in REQUEST.fields if field.type == field.TYPE_FLOAT])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_float_is_finite(name, value):
    """No float may be infinite or not a number."""
    assert "must be a finite number" in refusal(**{name: value}).message


def test_every_integer_and_float_but_the_seed_has_a_rule():
    """A new number cannot be forgotten."""
    kinds = {REQUEST.fields_by_name["n"].type, REQUEST.fields_by_name["min_p"].type}
    bounded = {field.name for field in REQUEST.fields if field.type in kinds}
    assert {
        name for name in bounded if bounds.rules(pb.CreateCompletionRequest, name).WhichOneof("type") is None
    } == set()


def test_cost():
    """Checking a large request looks at no token, and once at each bias."""

    def calls(tokens: int, biases: int) -> int:
        """The calls of functions that it takes."""
        request = pb.CreateCompletionRequest(
            model="m",
            tokens=pb.Tokens(ids=range(tokens)),
            logit_bias={str(index): 1 for index in range(biases)},
            stop=["a"] * 4,
            temperature=1,
        )
        profile = cProfile.Profile()
        profile.runcall(bounds.check, request)
        return pstats.Stats(profile).total_calls

    calls(1, 1)  # what is made once
    assert calls(8000, 1) == calls(1, 1)
    assert calls(1, 1024) <= calls(1, 1) + 1023
