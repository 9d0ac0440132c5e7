"""A table of bad input, and of valid input that looks bad: data for test_bad_input.py.

`by` is the component that answers:

    EDGE   Envoy refuses, with the service's envelope. REST only.
    SVC    the service refuses, over REST, and over gRPC if a typed message can express the request.
    OK     the service answers, over REST and gRPC.
"""

from __future__ import annotations

import enum
import gzip
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.stack import AUTHORIZED, MODEL

GOOD = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
JSON = {**AUTHORIZED, "content-type": "application/json"}
VOCABULARY = 49152
CONTEXT = 8192
NAN = "NaN"


class Absent(enum.Enum):
    """Marks a field that a row leaves out; its name is the same in every process that collects the tests."""

    LEFT_OUT = enum.auto()


LEFT_OUT = Absent.LEFT_OUT

Holds = Callable[[dict[str, Any]], bool]


@dataclass(frozen=True)
class Ask:
    """A REST request: GOOD with other `fields`, or with another `body`."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)
    method: str = "POST"
    path: str = "/v1/completions"

    @property
    def merged(self) -> dict[str, Any]:
        return {name: value for name, value in {**GOOD, **self.fields}.items() if value is not LEFT_OUT}

    @property
    def content(self) -> bytes:
        return json.dumps(self.merged).encode() if self.body is None else self.body


@dataclass(frozen=True)
class Row:
    """One line of the table: the request, the component that answers (`by`), the status, and the error's code, param and text.

    `holds` checks the JSON of a good answer. `typed` is False if a typed message cannot express the request.
    """

    ask: Ask
    by: str
    status: int = 200
    code: str | None = None
    param: str | None = None
    says: str = ""
    holds: Holds = lambda answer: True
    typed: bool = True


def edge(ask: Ask, status: int, says: str = "") -> Row:
    return Row(ask, "EDGE", status, says=says, typed=False)


def svc(fields: dict[str, Any], status: int, code: str | None, param: str | None, says: str) -> Row:
    return Row(Ask(fields), "SVC", status, code, param, says)


def good(fields: dict[str, Any], holds: Holds = lambda answer: True, *, typed: bool = True) -> Row:
    return Row(Ask(fields), "OK", holds=holds, typed=typed)


def raw(text: str | bytes) -> Ask:
    """A body, used without any change; %s is the model."""
    return Ask(body=text if isinstance(text, bytes) else (text.replace("%s", MODEL)).encode())


def having(member: str) -> Ask:
    """A valid body with one more member, used without any change."""
    return Ask(body=(json.dumps(GOOD)[:-1] + ", " + member + "}").encode())


def sent(path: str = "/v1/completions", method: str = "POST", **headers: str) -> Ask:
    """A good request to another path, by another method or with other headers (underscores for dashes)."""
    renamed = {name.replace("_", "-"): value for name, value in headers.items()}
    return Ask(path=path, method=method, headers={**JSON, **renamed}, body=None if method == "POST" else b"")


def text(answer: dict[str, Any]) -> str:
    found: str = answer["choices"][0]["text"]
    return found


def paris(answer: dict[str, Any]) -> bool:
    """The greedy answer to GOOD."""
    return text(answer) == " Paris"


def tokens(count: int) -> Holds:
    return lambda answer: bool(answer["usage"]["completion_tokens"] == count)


def from_the_end_token(answer: dict[str, Any]) -> bool:
    return bool(answer["usage"]["prompt_tokens"] == 1)


# One row, one line.
# fmt: off

ROOT = "Root element must be a message"
MODEL_MISSING = (400, None, "model", "you must provide a model parameter")
FORMS = "expected a string, an array of strings, an array of tokens or array of token arrays"
PROMPT_TYPE = (400, "invalid_type", "prompt")
EMPTY = (400, "empty_array", "prompt", "must not be empty")
UNKNOWN_ID = (400, "invalid_value", "prompt")
TOO_LONG = (400, "context_length_exceeded", "prompt")
STOPS = "Invalid 'stop': array too long. Expected an array with maximum length 4, but got an array"
BIAS_KEY = (400, "invalid_value", "logit_bias")
LOW, HIGH = "integer_below_min_value", "integer_above_max_value"
DECIMAL_LOW, DECIMAL_HIGH = "decimal_below_min_value", "decimal_above_max_value"
FINITE = "must be a finite number, but got"

BODIES = [
    *(Row(raw(body), "SVC", *MODEL_MISSING, typed=False) for body in ("", "{}")),
    *(edge(raw(body), 400, ROOT) for body in ("[]", '"x"', "null", "5")),
    *(edge(raw(body), 400, "Unexpected end of string") for body in ('{"model":', '{"model":"%s"', '{"a":[1,')),
    edge(raw('{"model":"%s'), 400, "Closing quote expected"),
    *(edge(raw(json.dumps(GOOD) + more), 400, "Parsing terminated before end of input") for more in (" x", "{}")),
    Row(raw('{"model":"%s","prompt":"a","max_tokens":1,}'), "OK", holds=tokens(1)),
    Row(raw("{'model':'%s','prompt':'a','max_tokens':1}"), "OK", holds=tokens(1)),
    Row(raw('{model:"%s",prompt:"a",max_tokens:1}'), "OK", holds=tokens(1)),
    *(edge(raw(comment + json.dumps(GOOD)), 400) for comment in ("// a\n", "/* a */")),
    edge(raw(b"\xef\xbb\xbf" + json.dumps(GOOD).encode()), 400),
    edge(raw(json.dumps(GOOD).encode("utf-16")), 400),
    *(edge(raw(b'{"model":"' + bad + b'"}'), 400, "non UTF-8") for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80")),
    *(edge(having(f'"user":"{lone}"'), 400) for lone in ("\\ud800", "\\udc00", "a\\ud83d b")),
    *(good({"prompt": prompt, "max_tokens": 8, "stream": stream}, typed=not stream) for prompt in ("\U0001f600", "שלום עולם", "👩‍👩‍👧 family", "\U0001f600" * 20) for stream in (False, True)),
    Row(having('"suffix":"", "prompt":"a\\u0000b"'), "OK"),
    Row(having('"prompt":"a\0b"'), "OK"),
    svc({"model": "gpt\0"}, 404, "model_not_found", None, "The model `gpt\\x00` does not exist"),
    svc({"user": "me\0"}, 400, "invalid_value", "user", "must not contain control characters"),
    Row(raw('{"model":"x","model":"%s","prompt":"b","prompt":"a","max_tokens":9,"max_tokens":1}'), "OK", holds=tokens(1)),
    Row(having('"foo": 1, "bar": {"model": "x"}'), "OK", holds=paris),
    Row(raw('{"model":"%s","prompt":"a","maxTokens":1}'), "OK", holds=tokens(1)),
    edge(having('"maxTokens": 2'), 400, "'max_tokens' is given twice"),
    edge(raw('{"maxTokens" : 2, "model":"%s","prompt":"a","max_tokens":1}'), 400, "'max_tokens' is given twice"),
    *(edge(having(f'"prompt": {"[" * depth}1{"]" * depth}'), 400, "Message too deep") for depth in (101, 100_000)),
    edge(raw(b" " * (2 << 20) + json.dumps(GOOD).encode()), 413, "up to 2 MiB"),
    edge(sent(x_large="x" * (40 << 10)), 431, "up to 64 with up to 32 KiB together"),
    edge(Ask(headers={**JSON, **{f"x-{index}": "1" for index in range(70)}}), 431, "up to 64 with up to 32 KiB together"),
    edge(Ask(headers={**JSON, "x-client-request-id": "x" * 513}), 400, "at most 512 characters, all of them ASCII"),
    edge(Ask(headers={**JSON, "x-client-request-id": "é"}), 400, "at most 512 characters, all of them ASCII"),
    edge(Ask(headers={**JSON, "x_y": "1"}), 400, "underscore in its name"),
    edge(sent("/v1%2Fcompletions"), 400),
    *(Row(sent(path), "OK", holds=paris, typed=False) for path in ("//v1/completions", "/v1/../v1/completions")),
    Row(sent("/v1/completions/"), "OK", holds=paris, typed=False),
    *(edge(sent(path), 404, f"Unknown URL (POST {path}). There are POST /v1/completions, GET /v1/models, ") for path in ("/v1/chat/completions", "/completions", "/v1/v1/completions", "/v1/embeddings", "/v1/engines/X/completions", "/v1/completions:stream")),
    edge(sent("/v2/models?a=b", "GET"), 404, "Unknown URL (GET /v2/models). There are"),
    edge(sent(f"/v2/{'x' * 2000}", "GET"), 404, f"Unknown URL (GET /v2/{'x' * 252}). There are"),
    edge(sent('/v2/"<', "GET"), 404, "Unknown URL (GET /v2/%22%3C)"),
    Row(sent("/v1/models/nobody%2Fnothing", "GET"), "SVC", 404, "model_not_found", None, "`nobody/nothing`", typed=False),
    edge(sent("/v1/models/%00", "GET"), 400, "valid path"),
    *(edge(sent(method=method), 405, "POST") for method in ("GET", "PUT", "DELETE")),
    *(edge(sent(path, method), 405, "GET, HEAD") for path in ("/v1/models", "/v1/models/x", "/health", "/playground", "/") for method in ("DELETE", "PUT", "POST")),
    *(Row(sent(path), "OK", holds=paris, typed=False) for path in ("/v1/completions?", "/v1/completions/?")),
    *(edge(sent(path, method), 400, "Query") for path, method in (("/v1/completions?x=1", "POST"), ("/v1/models?x=1", "GET"))),
    edge(sent("/v1/completions?max_tokens=5"), 400, "Query"),
    *(edge(sent(content_type=kind), 415, "application/json") for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=a", "Multipart/Mixed")),
    edge(Ask(body=gzip.compress(json.dumps(GOOD).encode()), headers={**JSON, "content-encoding": "gzip"}), 415),
    edge(Ask(body=gzip.compress(bytes(2 << 20)), headers={**JSON, "content-encoding": "gzip"}), 415),
    *(Row(Ask(headers=headers), "OK", holds=paris) for headers in (AUTHORIZED, {**AUTHORIZED, "content-type": "text/plain"})),
    edge(sent("/completion.v1.CompletionService/CreateCompletion"), 404, "Unknown URL"),
]

KEYS = [
    *(Row(Ask(headers=headers), "EDGE", 401, "invalid_api_key", None, "provide", typed=False) for headers in ({}, {"authorization": "test-key"}, {"authorization": "Basic test-key"}, {"authorization": "Bearer"})),
    *(Row(Ask(headers={"authorization": f"Bearer {key}"}), "SVC", 401, "invalid_api_key", None, "Incorrect", typed=False) for key in ("test-kez", "test-key1", "test-ke", "x" * 100, "test-key,Bearer test-key", "a b", "\xd0\xba\xd0\xbb\xd1\x8e\xd1\x87")),
    Row(Ask(headers={"authorization": "Bearer limited-key"}), "SVC", 404, "model_not_found", None, f"The model `{MODEL}` does not exist or you do not have access to it."),
    *(svc({"model": model}, *MODEL_MISSING) for model in (LEFT_OUT, "", None)),
    *(edge(having(f'"model": {value}'), 400) for value in ("5", "true", "{}", "[]")),
    svc({"model": "x"}, 404, "model_not_found", None, "The model `x` does not exist or you do not have access to it."),
    svc({"model": "../../etc/passwd"}, 404, "model_not_found", None, "`../../etc/passwd`"),
    svc({"model": "m" * 10_000}, 404, "model_not_found", None, "`" + "m" * 64 + "...`"),
    svc({"model": "\U0001f600\n"}, 404, "model_not_found", None, "`\U0001f600\\n`"),
]

PROMPTS = [
    *(good({"prompt": prompt}, from_the_end_token) for prompt in (LEFT_OUT, None)),
    good({"prompt": ""}, from_the_end_token),
    svc({"prompt": []}, *EMPTY),
    *(svc({"prompt": prompt}, *EMPTY) for prompt in ([[]], [[1], []])),
    good({"prompt": ["a", ""]}, lambda answer: len(answer["choices"]) == 2),
    *(svc({"prompt": prompt}, *PROMPT_TYPE, FORMS) for prompt in ([1, "a", [2]], ["a", None], ["a", 1])),
    *(svc({"prompt": prompt}, *PROMPT_TYPE, FORMS) for prompt in (True, {}, {"a": 1}, 5)),
    *(svc({"prompt": prompt}, *PROMPT_TYPE, "must be integers") for prompt in ([1.5], [True], [[1, "a"]])),
    svc({"prompt": [1e300]}, *UNKNOWN_ID, f"is out of vocabulary (0..{VOCABULARY - 1})"),
    *(
        svc({"prompt": [token]}, *UNKNOWN_ID, f"Token id {shown} is out of vocabulary (0..{VOCABULARY - 1})")
        for token, shown in ((-1, "-1"), (VOCABULARY, str(VOCABULARY)), (5279552648203111001, "5279552648203111424"))  # a JSON number
    ),
    svc({"prompt": ["a"] * 129}, 400, "array_above_max_length", "prompt", "at most 128 prompts, but got 129"),
    svc({"prompt": ["a"] * 64, "n": 4}, 400, "invalid_value", "n", "prompts*best_of must be <= 128"),
    svc({"prompt": [5] * 10, "max_tokens": CONTEXT}, *TOO_LONG, "8192 tokens, however you requested 8202 tokens (10 in"),
    svc({"max_tokens": 2**31 - 1}, *TOO_LONG, "however you requested 2147483652 tokens"),
    svc({"prompt": [5] * CONTEXT, "max_tokens": LEFT_OUT}, *TOO_LONG, "however you requested 8208 tokens (8192 in"),
    svc({"prompt": "a" * 2_000_000}, *TOO_LONG, "2000000 characters, more than the 65536 that could fit"),
    good({"prompt": "<|im_end|>"}, lambda answer: answer["usage"]["prompt_tokens"] > 1),
]

NUMBERS = [
    good({"max_tokens": 0}, lambda a: (text(a), a["choices"][0]["finish_reason"]) == ("", "length") and a["usage"]["completion_tokens"] == 0),
    good({"max_tokens": 0, "echo": True, "logprobs": 1}, lambda a: a["choices"][0]["logprobs"]["token_logprobs"][0] is None and text(a) == GOOD["prompt"]),
    svc({"max_tokens": -1}, 400, LOW, "max_tokens", "integer below minimum value. Expected a value >= 0, but got -1 instead."),
    *(edge(having(f'"max_tokens": {value}'), 400) for value in ("1.5", "true", "[]", "{}", '""', "2147483648", "1e10")),
    *(Row(raw('{"model":"%s","prompt":"a","ignore_eos":true,"max_tokens":' + value + "}"), "OK", holds=tokens(int(float(value.strip('"'))))) for value in ('"16"', "16.0", "1e1")),
    good({"max_tokens": None, "ignore_eos": True}, tokens(16)),
    *(edge(raw('{"model":"%s","prompt":"a","temperature":' + value + "}"), 400) for value in ("NaN", "1e400", "1e39", "true")),
    *(svc({"temperature": value}, 400, "invalid_value", "temperature", f"{FINITE} {value}") for value in (NAN, "Infinity", "-Infinity")),
    svc({"temperature": -0.1}, 400, DECIMAL_LOW, "temperature", "Expected a value >= 0, but got -0.1 instead."),
    svc({"temperature": 2.1}, 400, DECIMAL_HIGH, "temperature", "Expected a value <= 2, but got 2.1 instead."),
    *(good({"temperature": value}, paris) for value in (0, -0.0)),
    good({"temperature": 1e-8}, paris),
    *(good({"top_p": value}) for value in (0, 1.0)),
    good({"top_p": 0, "temperature": 2}, paris),
    svc({"top_p": 1.01}, 400, DECIMAL_HIGH, "top_p", "<= 1, but got 1.01"),
    svc({"top_p": -0.1}, 400, DECIMAL_LOW, "top_p", ">= 0, but got -0.1"),
    svc({"top_p": NAN}, 400, "invalid_value", "top_p", FINITE),
    *(svc({"n": value}, 400, LOW, "n", f">= 1, but got {value}") for value in (0, -1)),
    *(svc({"n": value}, 400, HIGH, "n", f"<= 128, but got {value}") for value in (129, 10**9)),
    svc({"n": 3, "best_of": 2}, 400, "invalid_value", "best_of", "best_of must be greater than or equal to n"),
    svc({"best_of": 21}, 400, HIGH, "best_of", "<= 20, but got 21"),
    svc({"best_of": 0}, 400, LOW, "best_of", ">= 1, but got 0"),
    svc({"best_of": 2, "stream": True}, 400, "invalid_value", "best_of", "Results cannot be streamed"),
    good({"n": 3}, lambda answer: [choice["text"] for choice in answer["choices"]] == [" Paris"] * 3),
    svc({"logprobs": -1}, 400, LOW, "logprobs", ">= 0, but got -1"),
    *(svc({"logprobs": value}, 400, HIGH, "logprobs", f"<= 5, but got {value}") for value in (6, 10**6)),
    edge(having('"logprobs": true'), 400, "logprobs"),
    good({"logprobs": 0}, lambda answer: list(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == [" Paris"]),
    *(svc({"logit_bias": {key: 1}}, *BIAS_KEY, f"key '{key}' is not a token id within 0..49151") for key in ("abc", "-5", "1.5", "00005", "49152", "")),
    edge(having('"logit_bias": {"5": "x"}'), 400),
    svc({"logit_bias": {"5": NAN}}, 400, "invalid_value", "logit_bias.5", FINITE),
    svc({"logit_bias": {"5": 101}}, 400, DECIMAL_HIGH, "logit_bias.5", "<= 100, but got 101"),
    svc({"logit_bias": {"x" * 10_000: 101}}, 400, DECIMAL_HIGH, f"logit_bias.{'x' * 64}...", "<= 100, but got 101"),
    svc({"logit_bias": {"5": -101}}, 400, DECIMAL_LOW, "logit_bias.5", ">= -100, but got -101"),
    good({"logit_bias": {"5": None}}, paris, typed=False),
    *(edge(having(f'"logit_bias": {value}'), 400) for value in ('{"5": 1, "5": 2}', "[1]", "5")),
    svc({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, 400, "object_above_max_properties", "logit_bias", "at most 1024 entries, but got 1025"),
    *(svc({"stop": stop}, 400, "empty_string", "stop", "stop cannot contain an empty string") for stop in ("", ["a", ""])),
    *(svc({"stop": ["a"] * count}, 400, "array_above_max_length", "stop", f"{STOPS} with length {count} instead.") for count in (5, 14, 100_000)),
    svc({"stop": ["a", "é" * 257]}, 400, "string_above_max_length", "stop", "at most 256 characters per entry, but got 257"),
    *(Row(having(f'"stop": {stop}'), "SVC", 400, "invalid_type", "stop", "expected a string or an array of strings", typed=False) for stop in ("5", '{"a": 1}', '[["a"]]', '["a", null]', "[5]", "true")),
    *(good({"stop": stop}, paris) for stop in (None, [])),
    *(good({"stop": stop, "max_tokens": 4}, lambda answer: text(answer) == " Pa") for stop in ("ris", ["is", "ri"], ["ri", "is"], ["zzz", "ris.", "ri"])),
    good({"stop": " Paris", "logprobs": 2, "max_tokens": 4}, lambda a: text(a) == "" and a["choices"][0]["logprobs"]["tokens"] == []),
    *(good({"seed": seed, "temperature": 1}) for seed in (-1, 2**63 - 1, -(2**63))),
    *(edge(having(f'"seed": {seed}'), 400, "seed") for seed in (str(2**63), "1.5")),
    *(svc({name: value}, 400, code, name, says) for name in ("frequency_penalty", "presence_penalty") for value, code, says in ((2.01, DECIMAL_HIGH, "<= 2, but got 2.01"), (-2.01, DECIMAL_LOW, ">= -2, but got -2.01"), (NAN, "invalid_value", FINITE))),
]

COMBINATIONS = [
    svc({"echo": True, "suffix": "b"}, 400, "invalid_value", "suffix", "cannot be combined"),
    svc({"suffix": "b"}, 400, "unsupported_parameter", "suffix", "not supported with this model"),
    svc({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options", "only allowed when 'stream' is true"),
    Row(having('"stream": true, "stream_options": {"include_usage":true,"continuous_usage_stats":true,"foo":1}'), "OK"),
    edge(having('"stream": 1'), 400, "stream"),
    Row(having('"stream": "true"'), "OK"),
    svc({"user": "u" * 10_000}, 400, "string_above_max_length", "user", "at most 256 characters, but got 10000"),
    svc({"top_k": -2}, 400, LOW, "top_k", ">= -1, but got -2"),
    good({"top_k": 10**9, "temperature": 1}),
    svc({"min_p": 1.5}, 400, DECIMAL_HIGH, "min_p", "<= 1, but got 1.5"),
    svc({"min_p": -0.5}, 400, DECIMAL_LOW, "min_p", ">= 0, but got -0.5"),
    svc({"min_p": NAN}, 400, "invalid_value", "min_p", FINITE),
    svc({"repetition_penalty": 0}, 400, DECIMAL_LOW, "repetition_penalty", "Expected a value > 0, but got 0"),
    svc({"repetition_penalty": 2.5}, 400, DECIMAL_HIGH, "repetition_penalty", "<= 2, but got 2.5"),
    svc({"repetition_penalty": NAN}, 400, "invalid_value", "repetition_penalty", FINITE),
    svc({"min_tokens": 2}, 400, HIGH, "min_tokens", "<= 1, but got 2"),
    svc({"min_tokens": -1}, 400, LOW, "min_tokens", ">= 0, but got -1"),
    edge(having('"ignore_eos": 5'), 400, "ignore_eos"),
    svc({"stop_token_ids": [VOCABULARY]}, 400, HIGH, "stop_token_ids", f"<= {VOCABULARY - 1}"),
    svc({"stop_token_ids": [1] * 129}, 400, "array_above_max_length", "stop_token_ids", "at most 128 entries, but got 129"),
    *(Row(sent(grpc_timeout=value), "OK", holds=paris, typed=False) for value in ("junk", "1n", "99999999999999H")),
]

ROWS = [*BODIES, *KEYS, *PROMPTS, *NUMBERS, *COMBINATIONS]
