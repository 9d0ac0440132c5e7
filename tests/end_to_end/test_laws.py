"""Laws that hold exactly for every request, tried on generated ones against the real stack.

A few of each law in every run, many with `-m slow`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.protobuf import json_format
from grpc_status import rpc_status
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.rpc.render import Form, response_json
from tests.end_to_end.test_doors_agree import joined
from tests.support.stack import AUTHORIZED, MODEL, Answer, Stack

JSON = {**AUTHORIZED, "content-type": "application/json"}
METADATA = tuple(AUTHORIZED.items())
VOCABULARY = 49152
CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"]
# The default model's vocabulary lacks some bytes, of control characters and of rare planes.
LETTERS = st.characters(max_codepoint=0x2FFF, categories=("L", "N", "P", "S", "Zs"))
PIECES = st.sampled_from(
    [*CONTROL, "<|im_", "start|>", "<", "|>", "\n", " ", "Hello", "world", "1, 2,", "é", "😀", "'s"]
)
TEXT = st.lists(PIECES | st.text(LETTERS, max_size=3), min_size=1, max_size=8).map("".join).filter(bool)
IDS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8)
PARTS = st.lists(
    st.fixed_dictionaries({"text": TEXT})
    | st.fixed_dictionaries({"control": st.sampled_from(CONTROL)})
    | st.fixed_dictionaries({"tokens": IDS}),
    min_size=1,
    max_size=6,
)
PROMPT = TEXT | IDS | PARTS | st.lists(TEXT, min_size=1, max_size=2) | st.lists(IDS, min_size=1, max_size=2)


def single(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that are the same in single precision."""
    return st.floats(low, high, width=32)


# Valid values of every field, as JSON has them.
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": PROMPT,
    "suffix": st.just(""),
    "max_tokens": st.integers(0, 5),
    "temperature": single(0, 2),
    "top_p": single(0, 1),
    "n": st.integers(1, 3),
    "stream_options": st.fixed_dictionaries(
        {}, optional=dict.fromkeys(["include_usage", "continuous_usage_stats"], st.booleans())
    ),
    "logprobs": st.integers(0, 5),
    "echo": st.booleans(),
    "stop": st.lists(st.sampled_from([*CONTROL, " ", "e", "\n", ", "]), max_size=4),
    "presence_penalty": single(-2, 2),
    "frequency_penalty": single(-2, 2),
    "best_of": st.integers(1, 3),
    "logit_bias": st.dictionaries(st.integers(0, VOCABULARY - 1).map(str), single(-100, 100), max_size=3),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "user": st.text(LETTERS, max_size=8),
    "top_k": st.integers(-1, 50),
    "min_p": single(0, 1),
    "repetition_penalty": single(0.5, 2),
    "min_tokens": st.integers(0, 5),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
    "response_format": st.just({"type": "json_object"}),
    "structured_outputs": st.just({"regex": "yes|no"}),
    "output_message": st.just("acme.Order"),
    "parse_special": st.booleans(),
    "add_special_tokens": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "include_stop_str_in_output": st.booleans(),
    "truncate_prompt_tokens": st.integers(1, 8) | st.just(-1),
    "bad_words": st.lists(st.sampled_from(["the", " a"]), min_size=1, max_size=2),
    "allowed_token_ids": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
    "logprob_token_ids": st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
    "logprobs_from": st.just(0),
    "prediction": st.fixed_dictionaries({"content": TEXT}),
    "priority": st.integers(-100, 100),
    "resume": st.fixed_dictionaries({"token_ids": IDS, "system_fingerprint": st.just("fp_none")}),
    "return_token_ids": st.booleans(),
    "return_timings": st.just(False),
    "on_deadline": st.sampled_from(["FAIL", "PARTIAL"]),
}
# Fields of which an answer is made in any run, and a seed so that it is the same in each.
REQUESTS = st.fixed_dictionaries(
    {"prompt": PROMPT, "max_tokens": FIELDS["max_tokens"], "seed": FIELDS["seed"]},
    optional={name: FIELDS[name] for name in ("temperature", "top_p", "n", "logprobs", "echo", "stop", "ignore_eos")}
    | {name: FIELDS[name] for name in ("parse_special", "skip_special_tokens", "repetition_penalty", "logit_bias")},
)

Run = Callable[..., None]
MANY = pytest.mark.parametrize("count", [25, pytest.param(1_000, marks=pytest.mark.slow)])


def every(count: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Run], None]:
    """Runs a check at once, on that many generated values."""

    def run(check: Run) -> None:
        options = settings(
            max_examples=count,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        options(given(*strategies)(check))()

    return run


def choices(answer: Answer) -> list[dict[str, Any]]:
    """The choices of a whole answer."""
    assert answer.status == 200, answer.body
    found: list[dict[str, Any]] = answer.json["choices"]
    return found


def post(stack: Stack, path: str, **fields: Any) -> Any:
    """The JSON of an answer to these fields."""
    answer = stack.request("POST", path, json.dumps(fields), JSON)
    assert answer.status == 200, answer.body
    return answer.json


@MANY
def test_a_joined_stream_is_the_whole_answer(stack: Stack, count: int) -> None:
    """Text, scores, offsets and reasons: to the bit."""

    @every(count, REQUESTS)
    def _(fields: dict[str, Any]) -> None:
        whole = choices(stack.complete(**fields))
        answer = stack.complete(**fields, stream=True)
        assert answer.status == 200, (fields, answer.body)
        *events, done = answer.events
        assert done == "[DONE]"
        assert joined([json.loads(event) for event in events], len(whole)) == whole, fields


@MANY
def test_the_tokens_of_a_text_are_the_text(stack: Stack, count: int) -> None:
    """The answer to what `/tokenize` says is the answer to the text itself, with or without its control tokens."""

    @every(count, TEXT | PARTS, st.booleans(), REQUESTS)
    def _(prompt: Any, special: bool, fields: dict[str, Any]) -> None:
        told = post(stack, "/tokenize", prompt=prompt, parse_special=special)
        assert told["count"] == len(told["tokens"])
        asked = {**fields, "parse_special": special}
        text = stack.complete(**{**asked, "prompt": prompt})
        tokens = stack.complete(**{**asked, "prompt": told["tokens"]})
        assert choices(tokens) == choices(text), (prompt, fields)
        assert text.json["usage"]["prompt_tokens"] == told["count"]


@MANY
def test_one_text_is_plain_text(stack: Stack, count: int) -> None:
    """A part list of one text is that text without control tokens, however it is cut into texts."""

    @every(count, TEXT, st.integers(0, 20), REQUESTS)
    def _(text: str, cut: int, fields: dict[str, Any]) -> None:
        plain = choices(stack.complete(**{**fields, "prompt": text, "parse_special": False}))
        assert choices(stack.complete(**{**fields, "prompt": [{"text": text}]})) == plain, (text, fields)
        meeting = [{"text": text[:cut]}, {"text": text[cut:]}]
        assert choices(stack.complete(**{**fields, "prompt": meeting})) == plain, (text, cut, fields)


@MANY
def test_detokenizing_is_the_way_back(stack: Stack, count: int) -> None:
    """`/detokenize` of `/tokenize` is the text, and so are the tokens' own texts, joined, where they are whole."""

    @every(count * 4, TEXT, st.booleans())
    def _(text: str, special: bool) -> None:
        told = post(stack, "/tokenize", prompt=text, parse_special=special, return_token_strs=True)
        assert post(stack, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
        assert special or not set(range(4)) & set(told["tokens"]), text
        assert len(told["token_strs"]) == len(told["offsets"]) == told["count"]
        if not any(token.startswith("bytes:") for token in told["token_strs"]):
            assert "".join(told["token_strs"]) == text
            ends = [*told["offsets"][1:], len(text)]
            cut = [text[start:end] for start, end in zip(told["offsets"], ends, strict=True)]
            assert cut == told["token_strs"]


def typed(fields: dict[str, Any]) -> pb.CreateCompletionRequest:
    """The message that says what JSON fields say, in the forms for typed callers."""
    message = dict(fields)
    prompt = message.pop("prompt", None)
    if isinstance(prompt, str):
        message["text"] = prompt
    elif isinstance(prompt, list) and isinstance(prompt[0], str):
        message["texts"] = {"texts": prompt}
    elif isinstance(prompt, list) and isinstance(prompt[0], int):
        message["tokens"] = {"ids": prompt}
    elif isinstance(prompt, list) and isinstance(prompt[0], list):
        message["token_batch"] = {"prompts": [{"ids": ids} for ids in prompt]}
    elif isinstance(prompt, list):
        parts = [{**part, "tokens": {"ids": part["tokens"]}} if "tokens" in part else part for part in prompt]
        message["parts"] = {"parts": parts}
    if "on_deadline" in message:
        message["on_deadline"] = f"ON_DEADLINE_{message['on_deadline']}"
    if "response_format" in message:
        message["response_format"] = {"type": f"RESPONSE_FORMAT_TYPE_{message['response_format']['type'].upper()}"}
    return json_format.ParseDict({"model": MODEL, **message}, pb.CreateCompletionRequest())


def test_every_field_has_values() -> None:
    """A field of the contract that these laws do not try is missing here."""
    forms = {"model", "stream", "text", "texts", "tokens", "token_batch", "parts", "json_prompt", "json_stop"}
    assert set(FIELDS) == set(pb.CreateCompletionRequest.DESCRIPTOR.fields_by_name) - forms | {"prompt"}


def over_grpc(stub: completion_pb2_grpc.CompletionServiceStub, fields: dict[str, Any]) -> Any:
    """The answer to a typed caller in JSON, or its error."""
    try:
        request = typed(fields)
        return comparable(response_json(stub.CreateCompletion(request, metadata=METADATA), Form.of(request)))
    except grpc.RpcError as error:
        return refusal(error)


def refusal(call: Any) -> tuple[str, str | None, str | None]:
    """The message, the parameter and the code of a refused call."""
    (detail,) = rpc_status.from_call(call).details
    answer = pb.ErrorResponse()
    assert detail.Unpack(answer)
    return answer.error.message, answer.error.param or None, answer.error.code or None


def over_rest(answer: Answer) -> Any:
    """The answer to a REST caller, or its error."""
    if answer.status == 200:
        return comparable(answer.json)
    return tuple(answer.json["error"][name] for name in ("message", "param", "code"))


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs from request to request: its id, its times, and what a cache had of its prompt."""
    answer["usage"].pop("prompt_tokens_details", None)
    return {name: value for name, value in answer.items() if name not in {"id", "created", "timings"}}


@MANY
def test_grpc_is_rest(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub, count: int) -> None:
    """Any fields together have the same answer, or the same error, at both doors; and so has each field by itself."""

    def check(fields: dict[str, Any]) -> None:
        assert over_grpc(stub, fields) == over_rest(stack.complete(**fields)), fields

    @every(count, st.fixed_dictionaries({}, optional=FIELDS), FIELDS["seed"])
    def _(fields: dict[str, Any], seed: int) -> None:
        check({**fields, "max_tokens": fields.get("max_tokens", 2), "seed": seed})

    def alone(field: dict[str, Any]) -> None:
        check({"prompt": "Once upon a time", "max_tokens": 3, "seed": 7, **field})

    for name, values in FIELDS.items():
        every(max(2, count // 25), st.fixed_dictionaries({name: values}))(alone)


@MANY
def test_tokenizing_over_grpc_is_that_over_rest(
    stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub, count: int
) -> None:
    """The same tokens, texts and offsets, and the same text back."""

    @every(count, TEXT | PARTS, st.booleans(), st.booleans())
    def _(prompt: Any, special: bool, strings: bool) -> None:
        fields = {"parse_special": special, "return_token_strs": strings}
        told = post(stack, "/tokenize", prompt=prompt, **fields)
        message = typed({"prompt": prompt})
        form = message.WhichOneof("prompt")
        request = pb.TokenizeRequest(**fields, **{form: getattr(message, form)})
        answer = stub.Tokenize(request, metadata=METADATA)
        texts = [text.text for text in answer.token_strs.values] if answer.HasField("token_strs") else None
        assert told == {
            "count": answer.count,
            "max_model_len": answer.max_model_len,
            "tokens": list(answer.tokens),
            "token_strs": texts,
            "offsets": list(answer.offsets),
        }
        text = stub.Detokenize(pb.DetokenizeRequest(tokens=answer.tokens), metadata=METADATA).prompt
        assert post(stack, "/detokenize", tokens=told["tokens"]) == {"prompt": text}
