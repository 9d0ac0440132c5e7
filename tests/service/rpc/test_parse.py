"""Parsing: every field's default, presence and bounds."""

from __future__ import annotations

import json
import re

import pytest
from completion.v1 import completion_pb2 as pb
from google.protobuf import json_format, struct_pb2

from service.errors import InvalidRequestError
from service.rpc.parse import Limits, parse
from service.types import Prompt, SamplingParams
from tests.support.fakes import BEGIN, END, FILL, NO_SPECIAL, VOCABULARY, ids, letters_tokenizer, manifest

LIMITS = Limits(context_length=64, stops=4)
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def parsed(letters):
    """Parses a request made of the given fields."""

    def run(message=None, *, streaming=False, **fields):
        message = message or pb.CreateCompletionRequest(model="alphabet", **fields)
        return parse(message, manifest(), letters, LIMITS, identity="me", streaming=streaming)

    return run


def value(content):
    """A JSON value as REST callers send it."""
    return json_format.Parse(json.dumps(content), struct_pb2.Value())


# hardening row(s) -> fields, param, code, a part of the message
REFUSED = {
    "empty array": ({"json_prompt": value([])}, "prompt", "empty_array", "must not be empty"),
    "empty token array": ({"json_prompt": value([[]])}, "prompt", "empty_array", "must not be empty"),
    "typed: no tokens": ({"tokens": pb.Tokens()}, "prompt", "empty_array", "must not be empty"),
    "typed: no texts": ({"texts": pb.TextBatch()}, "prompt", "empty_array", "must not be empty"),
    "typed: one without tokens": (
        {"token_batch": pb.TokenBatch(prompts=[pb.Tokens(ids=[1]), pb.Tokens()])},
        "prompt",
        "empty_array",
        "must not be empty",
    ),
    "mixed prompt": ({"json_prompt": value([1, "a", [2]])}, "prompt", "invalid_type", "array of token arrays"),
    "null in prompt": ({"json_prompt": value(["a", None])}, "prompt", "invalid_type", "array of token arrays"),
    "prompt is a bool": ({"json_prompt": value(True)}, "prompt", "invalid_type", "expected a string"),
    "prompt is a number": ({"json_prompt": value(5)}, "prompt", "invalid_type", "expected a string"),
    "prompt is an object": ({"json_prompt": value({"a": 1})}, "prompt", "invalid_type", "expected a string"),
    "fractional token": ({"json_prompt": value([1.5])}, "prompt", "invalid_type", "expected an integer as token id"),
    "true as token": ({"json_prompt": value([True])}, "prompt", "invalid_type", "expected an integer as token id"),
    "text among tokens": (
        {"json_prompt": value([[1, "a"]])},
        "prompt",
        "invalid_type",
        "expected an integer as token id",
    ),
    "huge token": ({"json_prompt": value([1e300])}, "prompt", "invalid_value", "out of vocabulary (0..27)"),
    "negative token": ({"json_prompt": value([-1])}, "prompt", "invalid_value", "Token id -1 is out of vocabulary"),
    "token beyond": ({"tokens": pb.Tokens(ids=[28])}, "prompt", "invalid_value", "Token id 28 is out of vocabulary"),
    "129 prompts": ({"json_prompt": value(["a"] * 129)}, "prompt", "array_above_max_length", "at most 128 prompts"),
    "64 x 4": ({"json_prompt": value(["a"] * 64), "n": 4}, "n", "invalid_value", "prompts*best_of must be <= 128"),
    "two prompts": ({"text": "a", "json_prompt": value("b")}, "prompt", None, "not both"),
    "too long": ({"text": "a" * 49}, "prompt", "context_length_exceeded", "you requested 65 tokens (49 in your prompt"),
    "far too long": ({"text": "a" * 513}, "prompt", "context_length_exceeded", "513 characters, more than the 512"),
    "max_tokens": (
        {"text": "a", "max_tokens": -1},
        "max_tokens",
        "integer_below_min_value",
        "Invalid 'max_tokens': integer below minimum value. Expected a value >= 0, but got -1 instead.",
    ),
    "max_tokens of 2^31": ({"text": "a", "max_tokens": 2**31 - 1}, "prompt", "context_length_exceeded", "2147483648"),
    "temperature NaN": ({"temperature": NAN}, "temperature", "invalid_value", "finite number, but got NaN"),
    "temperature inf": ({"temperature": INFINITY}, "temperature", "invalid_value", "but got Infinity"),
    "temperature -inf": ({"temperature": -INFINITY}, "temperature", "invalid_value", "but got -Infinity"),
    "temperature low": ({"temperature": -0.1}, "temperature", "decimal_below_min_value", ">= 0, but got -0.1"),
    "temperature high": ({"temperature": 2.1}, "temperature", "decimal_above_max_value", "<= 2, but got 2.1"),
    "top_p low": ({"top_p": -0.1}, "top_p", "decimal_below_min_value", ">= 0"),
    "top_p high": ({"top_p": 1.01}, "top_p", "decimal_above_max_value", "<= 1, but got 1.01"),
    "top_p NaN": ({"top_p": NAN}, "top_p", "invalid_value", "finite"),
    "n zero": ({"n": 0}, "n", "integer_below_min_value", ">= 1, but got 0"),
    "n negative": ({"n": -1}, "n", "integer_below_min_value", ">= 1"),
    "n 129": ({"n": 129}, "n", "integer_above_max_value", "<= 128, but got 129"),
    "best_of below n": ({"n": 3, "best_of": 2}, "best_of", "invalid_value", "greater than or equal to n"),
    "best_of 21": ({"best_of": 21}, "best_of", "integer_above_max_value", "<= 20"),
    "best_of 0": ({"best_of": 0}, "best_of", "integer_below_min_value", ">= 1"),
    "logprobs -1": ({"logprobs": -1}, "logprobs", "integer_below_min_value", ">= 0"),
    "logprobs 6": ({"logprobs": 6}, "logprobs", "integer_above_max_value", "<= 5, but got 6"),
    "bias key text": ({"logit_bias": {"abc": 1}}, "logit_bias", "invalid_value", "'abc'"),
    "bias key negative": ({"logit_bias": {"-5": 1}}, "logit_bias", "invalid_value", "'-5'"),
    "bias key fraction": ({"logit_bias": {"1.5": 1}}, "logit_bias", "invalid_value", "'1.5'"),
    "bias key zeros": ({"logit_bias": {"00005": 1}}, "logit_bias", "invalid_value", "'00005'"),
    "bias key line": ({"logit_bias": {"5\n": 1}}, "logit_bias", "invalid_value", "'5\\n'"),
    "bias key digits": ({"logit_bias": {"٥": 1}}, "logit_bias", "invalid_value", "'٥'"),
    "bias key beyond": ({"logit_bias": {"28": 1}}, "logit_bias", "invalid_value", "within 0..27"),
    "bias NaN": ({"logit_bias": {"5": NAN}}, "logit_bias.5", "invalid_value", "finite"),
    "bias 101": ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value", "<= 100, but got 101"),
    "bias -101": ({"logit_bias": {"5": -101}}, "logit_bias.5", "decimal_below_min_value", ">= -100"),
    "1025 biases": (
        {"logit_bias": {str(index): 1 for index in range(1025)}},
        "logit_bias",
        "object_above_max_properties",
        "at most 1024",
    ),
    "empty stop": ({"stop": ["a", ""]}, "stop", "empty_string", "stop cannot contain an empty string"),
    "five stops": (
        {"stop": list("abcde")},
        "stop",
        "array_above_max_length",
        "maximum length 4, but got an array with length 5",
    ),
    "long stop": ({"stop": ["é" * 257]}, "stop", "string_above_max_length", "at most 256 characters"),
    "presence_penalty": (
        {"presence_penalty": 2.01},
        "presence_penalty",
        "decimal_above_max_value",
        "<= 2, but got 2.01",
    ),
    "frequency_penalty": ({"frequency_penalty": -2.01}, "frequency_penalty", "decimal_below_min_value", ">= -2"),
    "frequency NaN": ({"frequency_penalty": NAN}, "frequency_penalty", "invalid_value", "finite"),
    "echo + suffix": ({"echo": True, "suffix": "b"}, "suffix", "invalid_value", "cannot be combined"),
    "suffix": ({"suffix": "b"}, "suffix", "unsupported_parameter", "not supported with this model"),
    "stream_options": ({"stream_options": pb.StreamOptions()}, "stream_options", "invalid_value", "'stream' is true"),
    "user": ({"user": "u" * 257}, "user", "string_above_max_length", "at most 256 characters"),
    "user control": ({"user": "a\nb"}, "user", "invalid_value", "control characters"),
    "top_k": ({"top_k": -2}, "top_k", "integer_below_min_value", ">= -1"),
    "min_p": ({"min_p": 1.5}, "min_p", "decimal_above_max_value", "<= 1"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value", "> 0"),
    "repetition_penalty": ({"repetition_penalty": 2.5}, "repetition_penalty", "decimal_above_max_value", "<= 2"),
    "min_tokens": ({"min_tokens": 17}, "min_tokens", "integer_above_max_value", "<= 16, but got 17"),
    "min_tokens large": (
        {"min_tokens": 1_234_568, "max_tokens": 1_234_567},
        "min_tokens",
        "integer_above_max_value",
        "<= 1234567, but got 1234568",
    ),
    "min_tokens -1": ({"min_tokens": -1}, "min_tokens", "integer_below_min_value", ">= 0"),
    "stop_token_ids": ({"stop_token_ids": [28]}, "stop_token_ids", "integer_above_max_value", "<= 27"),
    "many stop tokens": ({"stop_token_ids": [1] * 129}, "stop_token_ids", "array_above_max_length", "at most 128"),
}


@pytest.mark.parametrize(("fields", "param", "code", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(parsed, fields, param, code, message):
    """The refusal names the field, the bound and what was given."""
    with pytest.raises(InvalidRequestError, match=re.escape(message)) as caught:
        parsed(**fields)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_streams_cannot_rank(parsed):
    """A stream shows pieces before it is known which candidates are best."""
    with pytest.raises(InvalidRequestError, match="Results cannot be streamed") as caught:
        parsed(best_of=2, streaming=True)
    assert caught.value.param == "best_of"
    assert parsed(best_of=1, streaming=True).best_of == 1
    assert parsed(n=3, streaming=True).best_of == 3


def test_defaults(parsed):
    """The defaults are those that OpenAI documents; the seed is random."""
    request, other = parsed(), parsed()
    assert request.prompts == (Prompt((BEGIN,), "", implied=1),)
    assert (request.max_tokens, request.n, request.best_of, request.logprobs, request.echo) == (16, 1, 1, None, False)
    assert (request.stop, request.stop_token_ids, request.min_tokens) == ((), frozenset({END}), 0)
    assert request.sampling == SamplingParams(seed=request.sampling.seed, logit_bias={})
    assert request.sampling.seed != other.sampling.seed
    assert request.identity == "me"
    assert re.fullmatch(r"cmpl-[0-9A-Za-z]{29}", request.id)
    assert request.id != other.id


def test_zero_is_not_unset(parsed):
    """Presence is tracked."""
    request = parsed(max_tokens=0, temperature=0, top_p=0, logprobs=0, seed=0, top_k=0)
    assert (request.max_tokens, request.logprobs) == (0, 0)
    assert request.sampling == SamplingParams(temperature=0, top_p=0, logit_bias={})
    assert request.sampling.greedy


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "ab"}, [[0, 1]]),
        ({"json_prompt": value("ab")}, [[0, 1]]),
        ({"json_prompt": value(None)}, [[BEGIN]]),
        ({"json_prompt": value("")}, [[BEGIN]]),
        ({"json_prompt": value(["", "a"])}, [[BEGIN], [0]]),
        ({"json_prompt": value([3, 4.0])}, [[3, 4]]),
        ({"json_prompt": value([[3], [4, 5]])}, [[3], [4, 5]]),
        ({"json_prompt": value(["b", "a"])}, [[1], [0]]),
        ({"texts": pb.TextBatch(texts=["b", "a"])}, [[1], [0]]),
        ({"tokens": pb.Tokens(ids=[END])}, [[END]]),
        ({"token_batch": pb.TokenBatch(prompts=[pb.Tokens(ids=[3]), pb.Tokens(ids=[4])])}, [[3], [4]]),
        ({"text": "a", "json_prompt": value(None)}, [[0]]),
        ({"text": "a" * 48}, [[0] * 48]),
        ({"json_prompt": value(["a"] * 128)}, [[0]] * 128),
    ],
)
def test_prompt_forms(parsed, fields, expected):
    """Typed or JSON, one or many, text or tokens."""
    assert [list(prompt.token_ids) for prompt in parsed(**fields).prompts] == expected


def test_whole_context_may_be_prompt(parsed):
    """With nothing to generate there is no room needed."""
    assert len(parsed(text="a" * 64, max_tokens=0).prompts[0].token_ids) == 64


@pytest.mark.parametrize("seed", [-1, 2**63 - 1, -(2**63)])
def test_any_seed(parsed, seed):
    """The whole range of int64."""
    assert parsed(seed=seed).sampling.seed == seed


@pytest.mark.parametrize(("top_k", "expected"), [(-1, 0), (0, 0), (5, 5), (1000, VOCABULARY)])
def test_top_k(parsed, top_k, expected):
    """0 and -1 mean no limit, and the limit is at most the vocabulary."""
    assert parsed(top_k=top_k).sampling.top_k == expected


def test_end_tokens(parsed):
    """The caller's come on top of the model's, unless those are ignored."""
    assert parsed(stop_token_ids=[3]).stop_token_ids == {3, END}
    assert parsed(stop_token_ids=[3], ignore_eos=True).stop_token_ids == {3}


def test_logit_bias(parsed):
    """Ids become numbers; bounds are allowed."""
    assert parsed(logit_bias={"0": 100, "27": -100}).sampling.logit_bias == {0: 100, 27: -100}


def test_stream_options(parsed):
    """They are what the stream reports."""
    options = pb.StreamOptions(include_usage=True, continuous_usage_stats=True)
    request = parsed(stream_options=options, streaming=True)
    assert (request.include_usage, request.continuous_usage, request.stream) == (True, True, True)


def test_suffix_where_the_model_can(tmp_path):
    """Prompt and suffix are placed between the model's marks, and count against the context."""
    special = NO_SPECIAL.model_copy(update={"fill_in_the_middle": FILL})
    tokenizer, described = letters_tokenizer(tmp_path, special), manifest(special_tokens=special)

    def run(suffix):
        message = pb.CreateCompletionRequest(model="alphabet", text="a", suffix=suffix)
        return parse(message, described, tokenizer, LIMITS, identity="", streaming=False).prompts[0].token_ids

    assert run("bc") == (FILL.prefix, *ids("a"), FILL.suffix, *ids("bc"), FILL.middle)
    assert run("") == (0,)
    for length in (45, 10_000):
        with pytest.raises(InvalidRequestError) as caught:
            run("b" * length)
        assert caught.value.code == "context_length_exceeded"


def refused_by(parsed, **fields):
    """The error with which a request is refused."""
    with pytest.raises(InvalidRequestError) as caught:
        parsed(**fields)
    return caught.value


def test_too_many_ids_are_refused_unseen(parsed):
    """By their number, before one is looked at: also where the first is no id at all."""
    values = struct_pb2.ListValue(values=[struct_pb2.Value(number_value=0.5)] * 100)
    for fields in (
        {"json_prompt": struct_pb2.Value(list_value=values)},
        {"tokens": pb.Tokens(ids=[-1] * 100)},
        {"token_batch": pb.TokenBatch(prompts=[pb.Tokens(ids=[-1] * 100)] * 2)},
    ):
        error = refused_by(parsed, **fields)
        assert error.code == "context_length_exceeded"
        assert "100 in your prompt" in error.message


def test_a_prompt_that_is_too_long_is_the_last_that_is_tokenized(parsed, letters, monkeypatch):
    """Those after it are not looked at."""
    seen = []
    monkeypatch.setattr(letters, "prompt", lambda text, **_: seen.append(text) or Prompt((1,) * len(text), text))
    error = refused_by(parsed, texts=pb.TextBatch(texts=["a", "b" * 100, "c"]))
    assert error.code == "context_length_exceeded"
    assert seen == ["a", "b" * 100]


def test_answers_that_are_too_large(parsed, monkeypatch):
    """By what is asked, before anything is computed; without scores, or fewer times, the same prompt is answered."""
    monkeypatch.setattr("service.rpc.sizes.MAX_BYTES", 20_000)
    asked = {"text": "a" * 40, "echo": True, "max_tokens": 0, "logprobs": 5}
    error = refused_by(parsed, **asked, n=4)
    assert (error.param, error.code) == ("n", "answer_too_large")
    assert "40 prompt tokens and 0 for the completion, 4 times" in error.message
    assert parsed(**asked, n=1).n == 1
    assert parsed(**{**asked, "logprobs": None}, n=4).n == 4
