"""envoy/json.lua beside Python's own JSON parser: what is JSON, what is not, and what the transcoder gets."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from bench.bodies import FORMS, LARGEST, ask, filled, lua_envoy
from tests.support.stack import ROOT

READ = """
local json = dofile("envoy/json.lua")
local contract = dofile("envoy/requests.lua")
local function quoted(text)
  return text and '"' .. text:gsub('[%c"\\\\\\127-\\255]', function(byte)
    return string.format("\\\\u%04x", byte:byte())
  end) .. '"' or "null"
end
function envoy_on_request(handle)
  local body = handle:body()
  local text = body and body:getBytes(0, body:length()) or ""
  local found = json.read(text, contract.messages, "CreateCompletionRequest")
  local fault = found.fault or {}
  local unknown = {}
  for _, name in ipairs(found.unknown) do
    table.insert(unknown, quoted(name))
  end
  handle:respond({ [":status"] = "200" }, string.format(
    '{"message":%s,"param":%s,"code":%s,"unreadable":%s,"unknown":[%s],"body":%s,"stream":%s}',
    quoted(fault.message), quoted(fault.param), quoted(fault.code), tostring(fault.unreadable == true),
    table.concat(unknown, ","), quoted(found.body), quoted(found.given.stream)))
end
"""

Read = Callable[[bytes], dict[str, Any]]


@pytest.fixture(scope="module")
def read() -> Iterator[Read]:
    with lua_envoy(READ) as url:

        def run(body: bytes) -> dict[str, Any]:
            # Bytes come as the characters of their numbers.
            found = json.loads(ask(url, body))
            return {key: raw(value) for key, value in found.items()}

        yield run


def raw(value: Any) -> Any:
    if isinstance(value, list):
        return [raw(each) for each in value]
    return value.encode("latin-1").decode() if isinstance(value, str) else value


class NotJSONError(Exception):
    """A body that is not what RFC 8259 calls JSON, or that is nested too deep."""


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise NotJSONError("a key twice")
    return dict(pairs)


def refuse(literal: str) -> None:
    raise NotJSONError(literal)


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def by_python(body: bytes) -> Any:
    """The value of a body by Python's parser, made as strict as the RFC; raises NotJSONError."""
    try:
        text = body.decode()
        value = json.loads(text, object_pairs_hook=without_repeats, parse_constant=refuse)
        json.dumps(value, ensure_ascii=False).encode()  # no half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise NotJSONError(str(error)) from None
    return value


CHARACTERS = st.characters(exclude_categories=["Cs"]) | st.sampled_from(
    '"\\/{}[]:,eE+-.0"\x00\t\n\ud7ff\ue000\U0010ffff'
)
TEXT = st.text(CHARACTERS, max_size=12)
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0, -0.0, 1e308, 5e-324])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["prompt", "stop", "max_tokens", "temperature", "stream_options", "logit_bias", "bad_words"])
OBJECTS = st.dictionaries(NAMES | TEXT, VALUES, max_size=5)
SPACES = st.sampled_from(["", "", " ", "\n", "\t\r\n "])
PIECES = st.sampled_from(
    [
        *(piece.encode() for piece in ('"', "\\", "\\u", "\\ud800", "\\x", "tru", "'", "//", "NaN", *"{}[],:-0e.")),
        *(b"\xff", b"\xe2", b"\x00", b"\x1f", b"\xc2\x80", b"\xed\xa0\x80", b"\xf0\x9f\x98\x80", b"\xef\xbb\xbf"),
    ]
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """A JSON object, with spaces and with or without escapes, and most of the time damaged in some places."""
    separators = (draw(SPACES) + "," + draw(SPACES), draw(SPACES) + ":" + draw(SPACES))
    text = json.dumps(draw(OBJECTS), ensure_ascii=draw(st.booleans()), separators=separators)
    body = (draw(SPACES) + text + draw(SPACES)).encode()
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 4)))
        body = body[:start] + draw(PIECES | st.just(body[start:end] * 2) | st.just(b"")) + body[end:]
    return body


@settings(max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(bodies())
@example(b'{"prompt": "\\ud83d\\ude00 \\u0000"}')
@example(b'{"a": 1e1000}')
def test_what_is_json(read: Read, body: bytes) -> None:
    """It finds the bodies unreadable that are no JSON by Python's parser, and no others."""
    found = read(body)
    try:
        value = by_python(body)
    except NotJSONError:
        assert found["unreadable"] or not body, found
        assert re.search(r" at line \d+, column \d+\.$", found["message"] or "") or not body
        return
    assert not found["unreadable"], found
    if isinstance(value, dict):
        names = {name for name in value if "." not in name}
        assert {name for name in found["unknown"] if "." not in name} <= {shown(name) for name in names}
    else:
        assert found["code"] == "invalid_type"


def shown(name: str) -> str:
    return re.sub("[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", name)


INTEGERS = st.integers(-(10**22), 10**22) | st.integers(-(2**31) - 2, 2**31 + 2) | st.integers(-(2**63) - 2, 2**63 + 2)


@st.composite
def numerals(draw: st.DrawFn) -> str:
    """A number as JSON may write it, often an integer with a fraction or an exponent."""
    digits = str(draw(INTEGERS))
    fraction = draw(st.sampled_from(["", "", ".0", ".50", ".000", ".25"]))
    exponent = draw(st.sampled_from(["", "", "e0", "E+1", "e-1", "e2", "e-2", "e400", "e-400", "e99999999999"]))
    return digits + fraction + exponent


@settings(max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(numerals())
def test_integers(read: Read, numeral: str) -> None:
    """A number is an integer if its value is one, and then keeps every digit, within its type's range."""
    sign, digits, fraction, exponent = re.fullmatch(r"(-?)(\d+)(?:\.(\d+))?(?:[eE]([+-]?\d+))?", numeral).groups("")
    places = int(exponent or 0) - len(fraction)
    mantissa = int(sign + digits + fraction)
    for name, bits in (("seed", 64), ("max_tokens", 32)):
        found = read(f'{{"{name}": {numeral}}}'.encode())
        if mantissa == 0:
            value: float = 0
        elif places > 100:
            value = math.copysign(math.inf, mantissa)
        elif places < -100 or mantissa * 10 ** max(places, 0) % 10 ** max(-places, 0):
            assert (found["param"], found["code"]) == (name, "invalid_type")
            continue
        else:
            value = mantissa * 10 ** max(places, 0) // 10 ** max(-places, 0)
        if value >= 2 ** (bits - 1):
            assert found["code"] == "integer_above_max_value"
        elif value < -(2 ** (bits - 1)):
            assert found["code"] == "integer_below_min_value"
        else:
            assert found["code"] is None
            assert json.loads(found["body"] or f'{{"{name}": {numeral}}}') == {name: value}


SCHEMAS = st.dictionaries(TEXT, VALUES, min_size=1, max_size=4)


@settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS, st.booleans())
def test_json_schemas_are_sent_as_text(read: Read, schema: dict[str, Any], ascii_only: bool) -> None:
    """A schema reaches the service as the text that the caller wrote, in the order that the caller wrote."""
    text = json.dumps(schema, ensure_ascii=ascii_only)
    body = f'{{"structured_outputs": {{"json": {text}}}, "response_format": {{"json_schema": {{"schema": {text}}}}}}}'
    found = read(body.encode())
    assert (found["message"], found["unknown"]) == (None, [])
    sent = json.loads(found["body"])
    assert sent["structured_outputs"]["json"] == text
    assert sent["response_format"]["json_schema"]["schema"] == text


def test_choices_are_sent_in_their_message(read: Read) -> None:
    """An array where the contract has a message with one repeated field."""
    found = read('{"structured_outputs": {"choice": ["a", "é"]}, "max_tokens": 1.0}'.encode())
    assert found["body"] == '{"structured_outputs": {"choice": {"texts":["a", "é"]}}, "max_tokens": 1}'


@pytest.mark.parametrize("value", ["true", "false", "null", "1", '"true"', None])
def test_whether_to_stream(read: Read, value: str | None) -> None:
    """As the body says, wherever else the word stands."""
    member = "" if value is None else f'"stream": {value}, '
    found = read(f'{{{member}"prompt": "\\"stream\\": true", "stream_options": {{}}}}'.encode())
    assert (found["stream"] == "true") is (value == "true")


@pytest.mark.parametrize("form", FORMS)
def test_two_megabytes(read: Read, form: str) -> None:
    """Of every form are read, and the last byte counts."""
    body = filled(FORMS[form], LARGEST)
    assert LARGEST - 200 < len(body) <= LARGEST
    assert read(body)["message"] is None
    assert read(body[:-1])["unreadable"]
    assert "at line 1, column" in read(body + b"}")["message"]


@pytest.mark.parametrize(
    "piece",
    ['{"a":1},', "[],", '"",', "[[[[1]]]],", "true,", "-1e-9,", '"\\u00e9",'],
)
def test_hostile_bodies_end(read: Read, piece: str) -> None:
    """Two megabytes of the smallest values, in arrays and as members, within the bound of a hang."""
    many = piece * (LARGEST // len(piece) - 30)
    for body in (f'{{"prompt": [{many}1]}}', f'{{"stop_token_ids": [{many}1]}}', f'{{"foo": [{many}1]}}'):
        assert not read(body.encode())["unreadable"]
    keys = ",".join(f'"{number:x}":1' for number in range(150_000))
    for name in ("logit_bias", "prompt", "foo"):
        assert not read(f'{{"{name}": {{{keys}}}}}'.encode())["unreadable"]
    assert len(read(f"{{{keys}}}".encode())["unknown"]) == 150_000


def test_the_table_of_names_is_the_contract(read: Read) -> None:
    """Every field of the request is known by its name, and by no other."""
    view = (ROOT / "envoy" / "requests.lua").read_text()
    names = re.findall(r'^      \["(\w+)"\]', view.partition("CreateCompletionRequest")[2].partition("    },")[0], re.M)
    assert {"prompt", "stop", "max_tokens", "on_deadline"} <= set(names)
    body = dict.fromkeys(names)
    assert read(json.dumps(body).encode())["unknown"] == []
    camel = {re.sub("_(.)", lambda match: match[1].upper(), name) for name in names} - set(names)
    assert set(read(json.dumps(dict.fromkeys(camel)).encode())["unknown"]) == camel
