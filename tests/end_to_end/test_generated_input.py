"""Generated bodies against the real stack: whatever comes in, no failure of the service's own, and no hang.

Bodies are drawn from docs/openapi.yaml: parameters within their ranges, at and beyond the ends, and of other types;
then some of the text itself is damaged. 500 of them in every run, 10,000 with `-m slow`.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.rpc.parse import NOT_SUPPORTED_YET
from tests.support.stack import AUTHORIZED, MODEL, ROOT, Answer, Stack

DOCUMENT = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())
SCHEMAS = DOCUMENT["components"]["schemas"]
BODY = SCHEMAS["CreateCompletionRequest"]
JSON = {**AUTHORIZED, "content-type": "application/json"}

CONNECTIONS = 4

EXTREMES = [
    0,
    -1,
    1,
    2**31 - 1,
    2**31,
    -(2**31),
    2**53 + 1,
    2**63 - 1,
    2**63,
    -(2**64),
    1e308,
    -1e-308,
    5e-324,
    1.5,
    -0.0,
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.sampled_from(EXTREMES) | st.floats() | TEXT | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)


def valid(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a schema describes, its ends likelier than what lies between."""
    if "$ref" in schema:
        return valid(SCHEMAS[schema["$ref"].rsplit("/", 1)[-1]])
    if "oneOf" in schema:
        return st.one_of(*map(valid, schema["oneOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return st.one_of(*(KINDS[kind](schema) for kind in kinds))


def numbers(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    inside = st.floats(low, high, exclude_min="exclusiveMinimum" in schema, width=32)
    return inside | st.sampled_from([end for end in (schema.get("minimum"), high) if end is not None])


def integers(schema: dict[str, Any]) -> st.SearchStrategy[int]:
    low, high = schema.get("minimum"), schema.get("maximum")
    return st.integers(low, high) | st.sampled_from([end for end in (low, high) if end is not None] or [0])


def objects(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    if "properties" in schema:
        return st.fixed_dictionaries({}, optional={name: valid(each) for name, each in schema["properties"].items()})
    if "propertyNames" not in schema:
        return st.dictionaries(TEXT, ANYTHING, max_size=2)
    names = st.from_regex(schema["propertyNames"]["pattern"], fullmatch=True)
    return st.dictionaries(names, valid(schema["additionalProperties"]), max_size=4)


KINDS = {
    "null": lambda schema: st.none(),
    "boolean": lambda schema: st.booleans(),
    "integer": integers,
    "number": numbers,
    "string": lambda schema: st.text(
        min_size=schema.get("minLength", 0), max_size=min(40, schema.get("maxLength", 40))
    ),
    "array": lambda schema: st.lists(valid(schema["items"]), min_size=schema.get("minItems", 0), max_size=4),
    "object": objects,
}

SERVED = sorted(set(BODY["properties"]) - NOT_SUPPORTED_YET)
# Values of the model's own vocabulary and context, which the document cannot know; those that are valid but would take
# long are left to the benchmark.
SHORT = {
    "model": st.just(MODEL),
    "max_tokens": st.integers(0, 3),
    "n": st.integers(1, 3),
    "best_of": st.integers(1, 4),
    "stop_token_ids": st.lists(st.integers(0, 49151), max_size=4),
    "logit_bias": st.dictionaries(st.integers(0, 49151).map(str), st.floats(-100, 100, width=32), max_size=4),
}


def beyond(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values just outside a schema's ends, too many of them, or of any other type."""
    ends = [
        schema[word] + step for word, step in (("minimum", -1), ("maximum", 1), ("maximum", 0.001)) if word in schema
    ]
    ends += ["x" * (schema["maxLength"] + 1)] if "maxLength" in schema else []
    ends += [[1] * (schema["maxItems"] + 1)] if "maxItems" in schema else []
    return st.one_of(ANYTHING, *map(st.just, ends))


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A body: mostly right parameters, some wrong ones, and sometimes damaged text."""
    properties = BODY["properties"]
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 1, "prompt": "a"}
    for name in draw(st.lists(st.sampled_from(SERVED), unique=True, max_size=5)):
        body[name] = draw(SHORT[name] if name in SHORT else valid(properties[name]))
    for name in draw(st.just([]) | st.lists(st.sampled_from(sorted(properties)), unique=True, max_size=2)):
        body[name] = draw(beyond(properties[name]))
    if draw(st.booleans()) and body.get("stream") is None and "stream_options" in body:
        body["stream"] = True
    if draw(st.integers(0, 9)) == 0:
        body[draw(TEXT)] = draw(ANYTHING)
    text = json.dumps(body, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(damaged(text)) if draw(st.integers(0, 4)) == 0 else text


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """A text with some bytes replaced, taken out or repeated."""
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, min(len(text), start + 8)))
    return text[:start] + draw(st.binary(max_size=4) | st.just(text[start:end] * 2)) + text[end:]


def send(stack: Stack, body: bytes) -> tuple[bytes, Answer]:
    return body, stack.request("POST", "/v1/completions", body, JSON)


def check(body: bytes, answer: Answer) -> None:
    assert answer.status in {200, 400, 404}, (body, answer)
    if answer.status != 200:
        assert answer.headers["content-type"] == "application/json", (body, answer)
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}, (body, answer)
    elif answer.headers["content-type"] == "text/event-stream":
        assert answer.events[-1] == "[DONE]", (body, answer)
    else:
        assert answer.json["choices"], (body, answer)


@pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_generated_bodies(stack: Stack, count: int) -> None:
    """Each body is answered or refused, in form; then the next good request succeeds."""
    statuses: list[int] = []

    @settings(
        max_examples=count // CONNECTIONS,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(st.lists(bodies(), min_size=CONNECTIONS, max_size=CONNECTIONS))
    def run(batch: list[bytes]) -> None:
        for body, answer in pool.map(lambda body: send(stack, body), batch):
            check(body, answer)
            statuses.append(answer.status)

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        run()
    assert len(statuses) >= count
    # The bodies are worth sending only if many get past the door, and many do not.
    assert 0.2 < statuses.count(200) / len(statuses) < 0.8
    assert stack.complete(prompt="Hello,", max_tokens=1).status == 200
