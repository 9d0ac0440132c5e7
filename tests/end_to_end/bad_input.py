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

    `holds` checks the JSON of a good answer. `typed` is False if a typed message cannot express the request, `rest` is
    False if JSON cannot.
    """

    ask: Ask
    by: str
    status: int = 200
    code: str | None = None
    param: str | None = None
    says: str = ""
    holds: Holds = lambda answer: True
    typed: bool = True
    rest: bool = True


# The codes of Envoy's own refusals.
CODES = {
    404: "unknown_url",
    405: "method_not_allowed",
    413: "body_too_large",
    415: "unsupported_media_type",
    431: "headers_too_large",
}


def edge(ask: Ask, status: int, says: str = "", code: str | None = None) -> Row:
    return Row(ask, "EDGE", status, code or CODES.get(status), says=says, typed=False)


def refused(member: str, code: str | None, param: str | None, says: str) -> Row:
    """A valid body with one more member, for which Envoy refuses it."""
    return Row(having(member), "EDGE", 400, code, param, says, typed=False)


def unreadable(body: str | bytes, says: str, param: str | None = None) -> Row:
    """A body that is no JSON."""
    message = "We could not parse the JSON body of your request: " + says
    return Row(raw(body), "EDGE", 400, None, param, message, typed=False)


def mistyped(param: str, value: str, expected: str, given: str) -> Row:
    """A value of the wrong type, at a path of the body."""
    *outer, name = param.split(".")
    member = f'"{name}": {value}'
    for each in reversed(outer):
        member = f'"{each}": {{{member}}}'
    says = f"Invalid type for '{param}': expected {expected}, but got {given} instead."
    return refused(member, "invalid_type", param, says)


def unknown(member: str, names: str, instead: str = "") -> Row:
    """A body with names that the contract does not have."""
    words = "arguments" if "," in names else "argument"
    says = f"Unrecognized request {words} supplied: {names}{instead}"
    return refused(member, "unknown_parameter", names.split(",", maxsplit=1)[0], says)


def typed(fields: dict[str, Any], code: str, param: str, says: str) -> Row:
    """A message that JSON cannot express."""
    return Row(Ask(fields), "SVC", 400, code, param, says, rest=False)


def svc(fields: dict[str, Any], status: int, code: str | None, param: str | None, says: str) -> Row:
    return Row(Ask(fields), "SVC", status, code, param, says)


def good(fields: dict[str, Any], holds: Holds = lambda answer: True, *, typed: bool = True) -> Row:
    return Row(Ask(fields), "OK", holds=holds, typed=typed)


def raw(text: str | bytes) -> Ask:
    """A body, used without any change; %s is the model."""
    return Ask(body=text if isinstance(text, bytes) else (text.replace("%s", MODEL)).encode())


def having(member: str) -> Ask:
    """A valid body with one more member, or with another value of a member, used without any change."""
    rest = {name: value for name, value in GOOD.items() if f'"{name}":' not in member}
    return Ask(body=(json.dumps(rest)[:-1] + ", " + member + "}").encode())


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

OBJECT = "Invalid body: expected a JSON object"
MODEL_MISSING = (400, None, "model", "you must provide a model parameter")
FORMS = "Invalid type for 'prompt': expected a string, an array of strings, an array of tokens or array of token arrays"
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
    *(Row(raw(body), "EDGE", 400, "invalid_type", None, OBJECT, typed=False) for body in ("[]", '"x"', "null", "5", " true ")),
    *(unreadable(body, f"expected {what}, but found the end at line 1, column {column}.") for body, what, column in (('{"model":', "a value", 10), ('{"model":"x"', "a comma or }", 13), ('{"a":[1,', "a value", 9), ('{"model":"x', "a closing quote", 12), ("  ", "a value", 3))),
    *(unreadable(json.dumps(GOOD) + more, "expected the end of the body, but found") for more in (" x", "{}", ",", "\0")),
    unreadable('{"model":"%s",\n "max_tokens":1,}', "expected a key in double quotes, but found '}' at line 2, column 17."),
    unreadable("{'model':'%s'}", "expected a key in double quotes, but found ''' at line 1, column 2."),
    unreadable('{model:"%s"}', "expected a key in double quotes, but found 'm' at line 1, column 2."),
    unreadable('{"model":\'%s\'}', "expected a value, but found ''' at line 1, column 10."),
    *(unreadable(comment + json.dumps(GOOD), "expected a value, but found '/' at line 1, column 1.") for comment in ("// a\n", "/* a */")),
    unreadable('{"model":"%s" /* a */}', "expected a comma or }, but found '/'"),
    unreadable(b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "expected a value, but found '\ufeff' at line 1, column 1."),
    unreadable(json.dumps(GOOD).encode("utf-16"), "expected a value, but found invalid UTF-8 at line 1, column 1."),
    *(unreadable(b'{"model":"' + bad + b'"}', "invalid UTF-8 at line 1, column 11.") for bad in (b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf4\x90\x80\x80", b"\x80", b"\xe2\x82")),
    *(unreadable(f'{{"user":"{lone}"}}', "half of a surrogate pair at line 1, column") for lone in ("\\ud800", "\\udc00", "a\\ud83d b", "\\ud800\\ud800", "\\ud800\\u0041")),
    *(unreadable(f'{{"prompt":"C:{escape}"}}', "expected one of \"\\/bfnrtu after a backslash, but found") for escape in ("\\d", "\\0", "\\x41", "\\'", "\\U0041")),
    *(unreadable(f'{{"prompt":"\\u{digits}"}}', "expected a hexadecimal digit, but found") for digits in ("12", "00g0", "")),
    *(unreadable(f'{{"prompt":"a{control}b"}}', "a control character that is not escaped at line 1, column 13.") for control in "\0\t\n\x1f"),
    *(unreadable('{"max_tokens": ' + number, says) for number, says in (("01}", "a number with a leading zero"), ("-01}", "a number with a leading zero"), ("+1}", "expected a value"), (".5}", "expected a value"), ("1.}", "expected a digit"), ("1e}", "expected a digit"), ("-}", "expected a digit"), ("0x1}", "expected a comma or }"), ("1_0}", "expected a comma or }"), ("Infinity}", "expected a value"), ("tru}", "expected a value"), ("nulls}", "expected a comma or }"), ("True}", "expected a value"), ("}", "expected a value"))),
    *(good({"prompt": prompt, "max_tokens": 8, "stream": stream}, typed=not stream) for prompt in ("\U0001f600", "שלום עולם", "👩‍👩‍👧 family", "\U0001f600" * 20) for stream in (False, True)),
    good({"prompt": "a\0b"}),
    svc({"model": "gpt\0"}, 404, "model_not_found", None, "The model `gpt\\x00` does not exist"),
    svc({"user": "me\0"}, 400, "invalid_value", "user", "must not contain control characters"),
    *(unreadable('{"model":"%s",' + body, f"the key '{key}' is given twice, again at line 1, column", param) for body, key, param in (('"model":"x"}', "model", "model"), ('"max_tokens":1,"max\\u005ftokens":2}', "max_tokens", "max_tokens"), ('"foo":{"a":{"b":1,"b":2}}}', "b", "b"), ('"stream_options":{"include_usage":true,"include_usage":true}}', "include_usage", "stream_options.include_usage"), ('"logit_bias":{"5":1,"\\u0035":2}}', "5", "logit_bias.5"), ('"prompt":[{"a":1,"a":2}]}', "a", "a"))),
    unknown('"foo": 1, "bar": {"model": "x"}', "foo, bar"),
    *(unknown(f'"{name}": 1', name) for name in ("foo", "maxTokens", "Max_tokens", "max_tokens ", "json_prompt", "json_stop", "text", "tokens", "parts", "é")),
    unknown('"foo\\u0022\\n": 1', 'foo"\\x0a'),
    unknown('"x' + "y" * 5000 + '": 1', "x" + "y" * 63 + "..."),
    unknown(", ".join(f'"a{index}": 1' for index in range(1000)), "a0, a1, a2, a3, a4, a5, a6, a7 and 992 more"),
    unknown('"max_tokens": 1, "maxTokens": 2'.replace('"max_tokens": 1, ', ""), "maxTokens"),
    unknown('"stream": true, "stream_options": {"include_usage": true, "includeUsage": 1, "foo": {}}', "stream_options.includeUsage, stream_options.foo"),
    unknown('"response_format": {"type": "json_schema", "json_schema": {"schema": {"foo": 1}, "foo": 1}}', "response_format.json_schema.foo"),
    *(unknown(f'"{name}": {value}', name, f". {instead}") for name, value, instead in (("guided_json", "{}", "Use 'structured_outputs' with 'json'."), ("guided_regex", '"a"', "Use 'structured_outputs' with 'regex'."), ("guided_choice", "[]", "Use 'structured_outputs' with 'choice'."), ("guided_grammar", '"a"', "Use 'structured_outputs' with 'grammar'."), ("max_completion_tokens", "1", "Use 'max_tokens'."), ("n_predict", "1", "Use 'max_tokens'."), ("repeat_penalty", "1", "Use 'repetition_penalty'."))),
    Row(raw('{"model":"%s","messages":[{"role":"user","content":"Hi"}]}'), "EDGE", 400, "unknown_parameter", "messages", "Unrecognized request argument supplied: messages. This is the completions API: use 'prompt'.", typed=False),
    *(unreadable(f'{{"{name}": {opening * depth}1{closing * depth}}}', "arrays and objects more than 32 deep at line 1, column") for name in ("prompt", "foo", "stop") for opening, closing in (("[", "]"), ('{"a":', "}")) for depth in (33, 101, 100_000)),
    Row(having('"prompt": ' + "[" * 32 + "1" + "]" * 32), "SVC", 400, "invalid_type", "prompt", "Invalid type for 'prompt'", typed=False),
    unreadable('{"response_format": {"type": "json_schema", "json_schema": {"schema": ' + '{"a":' * 101, "arrays and objects more than 100 deep"),
    edge(raw(b" " * (2 << 20) + json.dumps(GOOD).encode()), 413, "The body is too large. It may have up to 2 MiB (2097152 bytes)."),
    edge(sent(x_large="x" * (40 << 10)), 431, "up to 64 with up to 32 KiB together"),
    edge(Ask(headers={**JSON, **{f"x-{index}": "1" for index in range(70)}}), 431, "up to 64 with up to 32 KiB together"),
    edge(Ask(headers={**JSON, "x-client-request-id": "x" * 513}), 400, "at most 512 characters, all of them ASCII", "invalid_header"),
    edge(Ask(headers={**JSON, "x-client-request-id": "é"}), 400, "at most 512 characters, all of them ASCII", "invalid_header"),
    edge(Ask(headers={**JSON, "x_y": "1"}), 400, "underscore in its name", "invalid_header"),
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
    edge(Ask(body=gzip.compress(json.dumps(GOOD).encode()), headers={**JSON, "content-encoding": "gzip"}), 415, "Compressed bodies are not accepted. You sent gzip."),
    edge(Ask(body=gzip.compress(bytes(2 << 20)), headers={**JSON, "content-encoding": "gzip"}), 415),
    *(Row(Ask(headers=headers), "OK", holds=paris) for headers in (AUTHORIZED, {**AUTHORIZED, "content-type": "text/plain"})),
    edge(sent("/completion.v1.CompletionService/CreateCompletion"), 404, "Unknown URL"),
]

KEYS = [
    *(Row(Ask(headers=headers), "EDGE", 401, "invalid_api_key", None, "provide", typed=False) for headers in ({}, {"authorization": "test-key"}, {"authorization": "Basic test-key"}, {"authorization": "Bearer"})),
    *(Row(Ask(headers={"authorization": f"Bearer {key}"}), "SVC", 401, "invalid_api_key", None, "Incorrect", typed=False) for key in ("test-kez", "test-key1", "test-ke", "x" * 100, "test-key,Bearer test-key", "a b", "\xd0\xba\xd0\xbb\xd1\x8e\xd1\x87")),
    Row(Ask(headers={"authorization": "Bearer limited-key"}), "SVC", 404, "model_not_found", None, f"The model `{MODEL}` does not exist or you do not have access to it."),
    *(svc({"model": model}, *MODEL_MISSING) for model in (LEFT_OUT, "", None)),
    *(mistyped("model", value, "a string", given) for value, given in (("5", "an integer"), ("true", "a boolean"), ("{}", "an object"), ("[]", "an array"), ("1.5", "a decimal number"))),
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
    *(svc({"prompt": prompt}, *PROMPT_TYPE, f"{FORMS}, but got a mixture instead.") for prompt in ([1, "a", [2]], ["a", None], ["a", 1])),
    *(svc({"prompt": prompt}, *PROMPT_TYPE, f"{FORMS}, but got {given} instead.") for prompt, given in ((True, "a boolean"), ({}, "an object"), ({"a": 1}, "an object"), (5, "a number"))),
    *(svc({"prompt": prompt}, *PROMPT_TYPE, f"Invalid type for 'prompt': expected an integer as token id, but got {given} instead.") for prompt, given in (([1.5], "a decimal number"), ([True], "a boolean"), ([[1, "a"]], "a string"))),
    refused('"prompt": [1e400]', "invalid_value", "prompt", "the number 1e400 is too large"),
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
    good({"prompt": "<|im_end|>"}, from_the_end_token),
    good({"prompt": "<|im_end|>", "parse_special": False}, lambda answer: answer["usage"]["prompt_tokens"] > 1),
]

NUMBERS = [
    good({"max_tokens": 0}, lambda a: (text(a), a["choices"][0]["finish_reason"]) == ("", "length") and a["usage"]["completion_tokens"] == 0),
    good({"max_tokens": 0, "echo": True, "logprobs": 1}, lambda a: a["choices"][0]["logprobs"]["token_logprobs"][0] is None and text(a) == GOOD["prompt"]),
    svc({"max_tokens": -1}, 400, LOW, "max_tokens", "integer below minimum value. Expected a value >= 0, but got -1 instead."),
    *(mistyped("max_tokens", value, "an integer", given) for value, given in (("1.5", "a decimal number"), ("1e-1", "a decimal number"), ("true", "a boolean"), ("[]", "an array"), ("{}", "an object"), ('""', "a string"), ('"16"', "a string"))),
    *(refused(f'"max_tokens": {value}', HIGH, "max_tokens", f"Expected a value <= 2147483647, but got {value} instead.") for value in ("2147483648", "1e10", "1e99999", "100000000000")),
    refused('"n": 1e10', HIGH, "n", "Expected a value <= 128, but got 1e10 instead."),
    refused('"max_tokens": -3e9', LOW, "max_tokens", "Expected a value >= 0, but got -3e9 instead."),
    *(Row(raw('{"model":"%s","prompt":"a","ignore_eos":true,"max_tokens":' + value + "}"), "OK", holds=tokens(int(float(value)))) for value in ("16.0", "1e1", "160e-1", "1.6E+1", "0e9", "-0", "-0.0")),
    good({"max_tokens": None, "ignore_eos": True}, tokens(16)),
    *(unreadable('{"model":"%s","temperature":' + value + "}", "expected a value") for value in ("NaN", "Infinity", "-Infinity")[:2]),
    unreadable('{"temperature":-Infinity}', "expected a digit"),
    *(refused(f'"temperature": {value}', DECIMAL_HIGH, "temperature", f"Expected a value <= 2, but got {value} instead.") for value in ("1e400", "1e39")),
    refused('"repetition_penalty": -1e39', DECIMAL_LOW, "repetition_penalty", "Expected a value > 0, but got -1e39 instead."),
    *(mistyped("temperature", value, "a decimal", given) for value, given in (("true", "a boolean"), ('"NaN"', "a string"), ('"Infinity"', "a string"), ('"1"', "a string"), ("[1]", "an array"))),
    *(typed({"temperature": value}, "invalid_value", "temperature", f"{FINITE} {value}") for value in (NAN, "Infinity", "-Infinity")),
    svc({"temperature": -0.1}, 400, DECIMAL_LOW, "temperature", "Expected a value >= 0, but got -0.1 instead."),
    svc({"temperature": 2.1}, 400, DECIMAL_HIGH, "temperature", "Expected a value <= 2, but got 2.1 instead."),
    *(good({"temperature": value}, paris) for value in (0, -0.0)),
    good({"temperature": 1e-8}, paris),
    *(good({"top_p": value}) for value in (0, 1.0)),
    good({"top_p": 0, "temperature": 2}, paris),
    svc({"top_p": 1.01}, 400, DECIMAL_HIGH, "top_p", "<= 1, but got 1.01"),
    svc({"top_p": -0.1}, 400, DECIMAL_LOW, "top_p", ">= 0, but got -0.1"),
    typed({"top_p": NAN}, "invalid_value", "top_p", FINITE),
    *(svc({"n": value}, 400, LOW, "n", f">= 1, but got {value}") for value in (0, -1)),
    *(svc({"n": value}, 400, HIGH, "n", f"<= 128, but got {value}") for value in (129, 10**9)),
    svc({"n": 3, "best_of": 2}, 400, "invalid_value", "best_of", "best_of must be greater than or equal to n"),
    svc({"best_of": 21}, 400, HIGH, "best_of", "<= 20, but got 21"),
    svc({"best_of": 0}, 400, LOW, "best_of", ">= 1, but got 0"),
    svc({"best_of": 2, "stream": True}, 400, "invalid_value", "best_of", "Results cannot be streamed"),
    good({"n": 3}, lambda answer: [choice["text"] for choice in answer["choices"]] == [" Paris"] * 3),
    svc({"logprobs": -1}, 400, LOW, "logprobs", ">= 0, but got -1"),
    *(svc({"logprobs": value}, 400, HIGH, "logprobs", f"<= {bound}, but got {value}") for value, bound in ((6, 5), (101, 100), (10**6, 100))),
    mistyped("logprobs", "true", "an integer", "a boolean"),
    good({"logprobs": 0}, lambda answer: list(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == [" Paris"]),
    *(svc({"logit_bias": {key: 1}}, *BIAS_KEY, f"key '{key}' is not a token id within 0..49151") for key in ("abc", "-5", "1.5", "00005", "49152", "")),
    *(mistyped("logit_bias.5", value, "a decimal", given) for value, given in (('"x"', "a string"), ('"NaN"', "a string"), ("null", "null"), ("[]", "an array"))),
    typed({"logit_bias": {"5": NAN}}, "invalid_value", "logit_bias.5", FINITE),
    svc({"logit_bias": {"5": 101}}, 400, DECIMAL_HIGH, "logit_bias.5", "<= 100, but got 101"),
    svc({"logit_bias": {"x" * 10_000: 101}}, 400, DECIMAL_HIGH, f"logit_bias.{'x' * 64}...", "<= 100, but got 101"),
    svc({"logit_bias": {"5": -101}}, 400, DECIMAL_LOW, "logit_bias.5", ">= -100, but got -101"),
    *(mistyped("logit_bias", value, "an object", given) for value, given in (("[1]", "an array"), ("5", "an integer"))),
    svc({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, 400, "object_above_max_properties", "logit_bias", "at most 1024 entries, but got 1025"),
    *(svc({"stop": stop}, 400, "empty_string", "stop", "stop cannot contain an empty string") for stop in ("", ["a", ""])),
    *(svc({"stop": ["a"] * count}, 400, "array_above_max_length", "stop", f"{STOPS} with length {count} instead.") for count in (5, 14, 100_000)),
    svc({"stop": ["a", "é" * 257]}, 400, "string_above_max_length", "stop", "at most 256 characters per entry, but got 257"),
    *(Row(having(f'"stop": {stop}'), "SVC", 400, "invalid_type", "stop", f"Invalid type for 'stop': expected a string or an array of strings, but got {given} instead.", typed=False) for stop, given in (("5", "a number"), ('{"a": 1}', "an object"), ('[["a"]]', "an array in the array"), ('["a", null]', "null in the array"), ("[5]", "a number in the array"), ("true", "a boolean"))),
    *(good({"stop": stop}, paris) for stop in (None, [])),
    *(good({"stop": stop, "max_tokens": 4}, lambda answer: text(answer) == " Pa") for stop in ("ris", ["is", "ri"], ["ri", "is"], ["zzz", "ris.", "ri"])),
    good({"stop": " Paris", "logprobs": 2, "max_tokens": 4}, lambda a: text(a) == "" and a["choices"][0]["logprobs"]["tokens"] == []),
    *(good({"seed": seed, "temperature": 1}) for seed in (-1, 2**63 - 1, -(2**63))),
    *(refused(f'"seed": {seed}', HIGH, "seed", f"Expected a value <= 9223372036854775807, but got {seed} instead.") for seed in (str(2**63), "1e19")),
    refused('"seed": -9223372036854775809', LOW, "seed", "Expected a value >= -9223372036854775808, but got -9223372036854775809 instead."),
    mistyped("seed", "1.5", "an integer", "a decimal number"),
    *(svc({name: value}, 400, code, name, says) for name in ("frequency_penalty", "presence_penalty") for value, code, says in ((2.01, DECIMAL_HIGH, "<= 2, but got 2.01"), (-2.01, DECIMAL_LOW, ">= -2, but got -2.01"))),
    *(typed({name: NAN}, "invalid_value", name, FINITE) for name in ("frequency_penalty", "presence_penalty")),
]

COMBINATIONS = [
    svc({"echo": True, "suffix": "b"}, 400, "invalid_value", "suffix", "cannot be combined"),
    svc({"suffix": "b"}, 400, "unsupported_parameter", "suffix", "not supported with this model"),
    svc({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options", "only allowed when 'stream' is true"),
    Row(having('"stream": true, "stream_options": {"include_usage":true,"continuous_usage_stats":true}'), "OK"),
    *(mistyped(name, value, "a boolean", given) for name in ("stream", "echo", "ignore_eos", "stream_options.include_usage") for value, given in (("1", "an integer"), ('"true"', "a string"), ('"yes"', "a string"))),
    mistyped("stream_options", "[]", "an object", "an array"),
    mistyped("user", "123", "a string", "an integer"),
    mistyped("stop_token_ids", "5", "an array", "an integer"),
    *(refused(f'"stop_token_ids": [1, {value}]', "invalid_type", "stop_token_ids[1]", f"Invalid type for 'stop_token_ids[1]': expected an integer, but got {given} instead.") for value, given in (("null", "null"), ("1.5", "a decimal number"), ("[1]", "an array"))),
    svc({"user": "u" * 10_000}, 400, "string_above_max_length", "user", "at most 256 characters, but got 10000"),
    svc({"top_k": -2}, 400, LOW, "top_k", ">= -1, but got -2"),
    good({"top_k": 10**9, "temperature": 1}),
    svc({"min_p": 1.5}, 400, DECIMAL_HIGH, "min_p", "<= 1, but got 1.5"),
    svc({"min_p": -0.5}, 400, DECIMAL_LOW, "min_p", ">= 0, but got -0.5"),
    typed({"min_p": NAN}, "invalid_value", "min_p", FINITE),
    svc({"repetition_penalty": 0}, 400, DECIMAL_LOW, "repetition_penalty", "Expected a value > 0, but got 0"),
    svc({"repetition_penalty": 2.5}, 400, DECIMAL_HIGH, "repetition_penalty", "<= 2, but got 2.5"),
    typed({"repetition_penalty": NAN}, "invalid_value", "repetition_penalty", FINITE),
    svc({"min_tokens": 2}, 400, HIGH, "min_tokens", "<= 1, but got 2"),
    svc({"min_tokens": -1}, 400, LOW, "min_tokens", ">= 0, but got -1"),
    svc({"stop_token_ids": [VOCABULARY]}, 400, HIGH, "stop_token_ids", f"<= {VOCABULARY - 1}"),
    svc({"stop_token_ids": [1] * 129}, 400, "array_above_max_length", "stop_token_ids", "at most 128 entries, but got 129"),
    *(Row(sent(grpc_timeout=value), "OK", holds=paris, typed=False) for value in ("junk", "1n", "99999999999999H")),
]

# A valid value of each parameter that is not supported yet.
NOT_YET = {
    "response_format": {"type": "text"},
    "structured_outputs": {"regex": "a"},
    "output_message": "acme.v1.Order",
    "prediction": {"type": "content", "content": "a"},
    "resume": {"token_ids": [1], "system_fingerprint": "fp"},
    "on_deadline": "PARTIAL",
}
# Parameters of the same form, which have the same wrong values.
BOOLEANS = ("parse_special", "add_special_tokens", "skip_special_tokens", "include_stop_str_in_output", "return_token_ids", "return_timings", "stream_options.include_obfuscation", "response_format.json_schema.strict", "structured_outputs.json_object")
INTEGERS = ("truncate_prompt_tokens", "logprobs_from", "priority")
ARRAYS = ("allowed_token_ids", "logprob_token_ids", "resume.token_ids", "bad_words", "structured_outputs.choice")
STRINGS = ("output_message", "prediction.content", "prediction.type", "resume.system_fingerprint", "response_format.type", "response_format.json_schema.name", "structured_outputs.regex", "structured_outputs.grammar", "on_deadline")
OBJECTS = ("response_format", "response_format.json_schema", "response_format.json_schema.schema", "structured_outputs", "structured_outputs.json", "prediction", "resume")
FORMAT = "response_format.type"
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}

FORMS_OF_OUTPUT = [
    *(Row(Ask({name: value}), "SVC", 400, "unsupported_parameter", name, f"Unsupported parameter: '{name}' is not supported yet.", typed=name not in {"on_deadline", "response_format"}) for name, value in NOT_YET.items()),
    *(Row(Ask({"response_format": value}), "SVC", 400, "unsupported_parameter", "response_format", "not supported yet", typed=False) for value in (SCHEMA, {"type": "json_object"})),
    *(Row(Ask({"structured_outputs": value}), "SVC", 400, "unsupported_parameter", "structured_outputs", "not supported yet", typed=False) for value in ({"choice": ["a", "b"]}, {"json": {"type": "object"}}, {"json": "{}"}, {"json_object": True})),
    *(good({name: None}, paris, typed=False) for name in NOT_YET),
    *(mistyped(name, value, "a boolean", given) for name in BOOLEANS for value, given in (("1", "an integer"), ('"true"', "a string"), ("[]", "an array"))),
    *(mistyped(name, value, "an integer", given) for name in INTEGERS for value, given in (('"1"', "a string"), ("0.5", "a decimal number"), ("true", "a boolean"))),
    *(mistyped(name, value, "an array", given) for name in ARRAYS for value, given in (("1", "an integer"), ('"a"', "a string"), ("{}", "an object"))),
    *(mistyped(name, value, "a string", given) for name in STRINGS for value, given in (("1", "an integer"), ("{}", "an object"), ("false", "a boolean"))),
    *(mistyped(name, value, "an object", given) for name in OBJECTS for value, given in (("1", "an integer"), ("[]", "an array"), ("true", "a boolean"))),
    *(refused(f'"{name}": []', "empty_array", name, "must not be empty") for name in ("allowed_token_ids",)),
    refused('"structured_outputs": {"choice": []}', "empty_array", "structured_outputs.choice", "must not be empty"),
    *(refused(f'"response_format": {{"type": "{value}"}}', "invalid_value", FORMAT, f"Invalid value: '{value}'. Supported values are: 'text', 'json_object', 'json_schema'.") for value in ("xml", "", "TEXT", "RESPONSE_FORMAT_TYPE_TEXT")),
    *(refused(f'"on_deadline": "{value}"', "invalid_value", "on_deadline", f"Invalid value: '{value}'. Supported values are: 'FAIL', 'PARTIAL'.") for value in ("fail", "ON_DEADLINE_FAIL")),
    *(refused(f'"structured_outputs": {members}', "invalid_value", "structured_outputs", f"only one of {pair} may be given") for members, pair in (('{"regex": "a", "grammar": "b"}', "regex and grammar"), ('{"choice": ["a"], "json": {}}', "choice and json"))),
    svc({"response_format": {}}, 400, "missing_required_parameter", FORMAT, f"Missing required parameter: '{FORMAT}'."),
    svc({"structured_outputs": {}}, 400, "invalid_value", "structured_outputs", "exactly one of json, json_object, regex, choice, grammar is required"),
    svc({"structured_outputs": {"json_object": False}}, 400, "invalid_value", "structured_outputs.json_object", "Invalid value: 'false'. Supported values are: 'true'."),
    svc({"structured_outputs": {"regex": "é" * 131_073}}, 400, "string_above_max_length", "structured_outputs.regex", "at most 262144 bytes, but got 262146"),
    svc({"output_message": ""}, 400, "empty_string", "output_message", "cannot contain an empty string"),
    svc({"output_message": "a" * 513}, 400, "string_above_max_length", "output_message", "at most 512 characters, but got 513"),
    svc({"prediction": {}}, 400, "missing_required_parameter", "prediction.content", "Missing required parameter: 'prediction.content'."),
    svc({"prediction": {"type": "text", "content": "a"}}, 400, "invalid_value", "prediction.type", "Invalid value: 'text'. Supported values are: 'content'."),
    svc({"resume": {}}, 400, "missing_required_parameter", "resume.system_fingerprint", "Missing required parameter"),
    svc({"resume": {"token_ids": [-1], "system_fingerprint": "a"}}, 400, LOW, "resume.token_ids", ">= 0, but got -1"),
    svc({"truncate_prompt_tokens": 0}, 400, "invalid_value", "truncate_prompt_tokens", "expected a value >= -1 other than 0"),
    svc({"truncate_prompt_tokens": -2}, 400, LOW, "truncate_prompt_tokens", ">= -1, but got -2"),
    svc({"logprobs_from": -1}, 400, LOW, "logprobs_from", ">= 0, but got -1"),
    *(svc({"priority": value}, 400, code, "priority", says) for value, code, says in ((-101, LOW, ">= -100, but got -101"), (101, HIGH, "<= 100, but got 101"))),
    svc({"bad_words": ["a"] * 129}, 400, "array_above_max_length", "bad_words", "at most 128 entries, but got 129"),
    svc({"bad_words": ["a" * 65]}, 400, "string_above_max_length", "bad_words", "at most 64 characters per entry, but got 65"),
    svc({"bad_words": [""]}, 400, "empty_string", "bad_words", "cannot contain an empty string"),
    svc({"allowed_token_ids": [1] * 1025}, 400, "array_above_max_length", "allowed_token_ids", "at most 1024 entries, but got 1025"),
    svc({"logprob_token_ids": [1] * 129}, 400, "array_above_max_length", "logprob_token_ids", "at most 128 entries, but got 129"),
    *(svc({name: [VOCABULARY]}, 400, HIGH, name, f"<= {VOCABULARY - 1}, but got {VOCABULARY}") for name in ("allowed_token_ids", "logprob_token_ids")),
    *(svc({name: [-1]}, 400, LOW, name, ">= 0, but got -1") for name in ("allowed_token_ids", "logprob_token_ids")),
    svc({"truncate_prompt_tokens": CONTEXT + 1}, 400, HIGH, "truncate_prompt_tokens", f"<= {CONTEXT}, but got {CONTEXT + 1}"),
    svc({"truncate_prompt_tokens": -1, "max_tokens": CONTEXT}, 400, "context_length_exceeded", "prompt", f"however you requested {CONTEXT + 1} tokens (1 in your prompt"),
    svc({"bad_words": ["a\ufffd"]}, 400, "invalid_value", "bad_words", "no entry may contain U+FFFD"),
    *(svc({"logprobs_from": 1, **more}, 400, "invalid_value", "logprobs_from", "only allowed with 'echo' and 'logprobs'") for more in ({}, {"echo": True}, {"logprobs": 1})),
    svc({"logprobs_from": 6, "echo": True, "logprobs": 1}, 400, HIGH, "logprobs_from", "<= 5, but got 6"),
    Row(Ask({"stream_options": {"include_obfuscation": True}}), "SVC", 400, "invalid_value", "stream_options", "only allowed when 'stream' is true"),
    *(good({name: None}, paris, typed=False) for name in ("truncate_prompt_tokens", "bad_words", "allowed_token_ids", "logprob_token_ids", "logprobs_from", "priority", "include_stop_str_in_output", "return_token_ids", "return_timings")),
    *(good({name: value}, paris) for name, value in (("truncate_prompt_tokens", CONTEXT), ("truncate_prompt_tokens", -1), ("bad_words", []), ("logprob_token_ids", []), ("priority", -100), ("priority", 100), ("return_token_ids", False))),
    good({"bad_words": [" Paris", "a" * 64]}, lambda answer: text(answer) != " Paris"),
    good({"allowed_token_ids": [0, VOCABULARY - 1], "max_tokens": 3}),
    good({"logprob_token_ids": [0, VOCABULARY - 1, 0]}, lambda answer: list(answer["choices"][0]["logprobs"]["token_id_logprobs"][0]) == ["0", str(VOCABULARY - 1)], typed=False),
]

ROWS = [*BODIES, *KEYS, *PROMPTS, *NUMBERS, *COMBINATIONS, *FORMS_OF_OUTPUT]
