"""What answers say when they are asked: token ids, stop reasons, times, further scores, the fingerprint; both doors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.protobuf import json_format

from service import manifest
from tests.support.patience import eventually
from tests.support.stack import AUTHORIZED, MODEL, Stack

PROMPT = "1, 2, 3, 4,"
FIXED = {"prompt": PROMPT, "temperature": 0}
TIMES = ["queue_seconds", "prefill_seconds", "decode_seconds", "tokens_per_second"]
PLAIN = {"id", "object", "created", "model", "choices", "usage"}
PLAIN_CHOICE = {"text", "index", "logprobs", "finish_reason"}


def typed(**fields: Any) -> pb.CreateCompletionRequest:
    return pb.CreateCompletionRequest(model=MODEL, text=PROMPT, temperature=0, **fields)


def pieces(stack: Stack, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, without [DONE]."""
    answer = stack.complete(**FIXED, **fields, stream=True)
    assert answer.status == 200, answer
    *events, done = answer.events
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_nothing_new_unless_asked(stack: Stack) -> None:
    """An answer keeps exactly its keys, whole and streamed."""
    whole = stack.complete(**FIXED, logprobs=1).json
    assert set(whole) == PLAIN
    assert set(whole["choices"][0]) == PLAIN_CHOICE
    assert set(whole["choices"][0]["logprobs"]) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    for piece in pieces(stack, max_tokens=3):
        assert set(piece) == PLAIN - {"usage"}
        assert set(piece["choices"][0]) == PLAIN_CHOICE


def test_token_ids_whole_and_streamed(stack: Stack) -> None:
    """Prompt and choice have theirs; the prompt's come once in a stream; sent as a prompt they are the same prompt."""
    whole = stack.complete(**FIXED, max_tokens=6, n=2, return_token_ids=True)
    assert whole.headers["content-type"] == "application/json"
    first, second = whole.json["choices"]
    assert list(first) == [*sorted(PLAIN_CHOICE, key=list(first).index), "stop_reason", "token_ids", "prompt_token_ids"]
    assert first["token_ids"] == second["token_ids"]
    assert len(first["token_ids"]) == 6
    assert len(first["prompt_token_ids"]) == whole.json["usage"]["prompt_tokens"]
    assert first["stop_reason"] is None
    again = stack.complete(prompt=first["prompt_token_ids"], temperature=0, max_tokens=6).json["choices"][0]
    assert again["text"] == first["text"]
    streamed = [piece["choices"][0] for piece in pieces(stack, max_tokens=6, return_token_ids=True)]
    assert [index for piece in streamed for index in piece["token_ids"]] == first["token_ids"]
    assert [piece.get("prompt_token_ids") for piece in streamed] == [first["prompt_token_ids"], *[None] * 5]
    assert all(piece["stop_reason"] is None for piece in streamed)


def test_token_ids_over_grpc(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """The same ids as over REST; without the field there are none."""
    rest = stack.complete(**FIXED, max_tokens=4, return_token_ids=True).json["choices"][0]
    (choice,) = stub.CreateCompletion(typed(max_tokens=4, return_token_ids=True)).choices
    assert (choice.token_ids, choice.prompt_token_ids) == (rest["token_ids"], rest["prompt_token_ids"])
    streamed = [piece.choices[0] for piece in stub.StreamCompletion(typed(max_tokens=4, return_token_ids=True))]
    assert [index for piece in streamed for index in piece.token_ids] == rest["token_ids"]
    (plain,) = stub.CreateCompletion(typed(max_tokens=4)).choices
    assert not plain.token_ids
    assert not plain.prompt_token_ids
    assert plain.WhichOneof("stop_reason") is None


def test_echo_has_the_completions_ids(stack: Stack) -> None:
    """The text begins with the prompt, whose ids stand apart."""
    choice = stack.complete(**FIXED, max_tokens=3, echo=True, return_token_ids=True).json["choices"][0]
    assert choice["text"].startswith(PROMPT)
    assert len(choice["token_ids"]) == 3


def stop_reasons(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub, **fields: Any) -> tuple[Any, ...]:
    """REST's stop_reason whole and streamed (absent: "none"), and gRPC's oneof, for a request."""
    whole = stack.complete(**FIXED, **fields).json["choices"][0].get("stop_reason", "none")
    *_, last = pieces(stack, **fields)
    (choice,) = stub.CreateCompletion(typed(**as_typed(fields))).choices
    kind = choice.WhichOneof("stop_reason")
    return whole, last["choices"][0].get("stop_reason", "none"), kind and (kind, getattr(choice, kind))


def as_typed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of typed callers, whose `stop` is a list."""
    return {**fields, "stop": [fields["stop"]]} if "stop" in fields else fields


def test_stop_reasons(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub, token_id: Any) -> None:
    """A stop text or token is shown whenever it matched; an end token only to who asks, and over gRPC alone."""
    seven = stop_reasons(stack, stub, stop=" 7", max_tokens=16)
    assert seven == (" 7", " 7", ("stop_text", " 7"))
    token = token_id("7")
    assert stop_reasons(stack, stub, stop_token_ids=[token], max_tokens=16) == (token, token, ("stop_token_id", token))
    assert stop_reasons(stack, stub, max_tokens=2) == ("none", "none", None)
    ended = {"allowed_token_ids": [0], "max_tokens": 4}
    assert stop_reasons(stack, stub, **ended) == ("none", "none", None)
    assert stop_reasons(stack, stub, **ended, return_token_ids=True) == (None, None, ("end_token_id", 0))


def test_times_are_told_on_request(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """In the answer, in a stream's last message, and in gRPC's trailing metadata."""
    whole = stack.complete(**FIXED, max_tokens=4, return_timings=True).json
    assert list(whole["timings"]) == TIMES
    assert all(value >= 0 for value in whole["timings"].values())
    assert whole["timings"]["prefill_seconds"] > 0
    assert whole["timings"]["tokens_per_second"] == pytest.approx(3 / whole["timings"]["decode_seconds"], rel=0.01)
    streamed = pieces(stack, max_tokens=3, return_timings=True)
    assert [list(piece.get("timings", [])) for piece in streamed] == [[], [], TIMES]
    with_usage = pieces(stack, max_tokens=2, return_timings=True, stream_options={"include_usage": True})
    assert [list(piece.get("timings", [])) for piece in with_usage] == [[], [], TIMES]
    answer, call = stub.CreateCompletion.with_call(typed(max_tokens=4, return_timings=True))
    trailers = dict(call.trailing_metadata())
    assert [float(trailers[f"x-{name.replace('_', '-')}"]) for name in TIMES] == pytest.approx(
        [getattr(answer.timings, name) for name in TIMES], abs=1e-3
    )
    plain, call = stub.CreateCompletion.with_call(typed(max_tokens=1))
    assert not plain.HasField("timings")
    assert not any(name.endswith("-seconds") for name, _ in call.trailing_metadata())


def test_the_fingerprint_is_shown_to_who_asks(stack: Stack) -> None:
    """With a seed, or for token ids; the same in each piece."""
    seeded = stack.complete(**FIXED, max_tokens=1, seed=1).json["system_fingerprint"]
    assert seeded.startswith("fp_")
    assert stack.complete(**FIXED, max_tokens=1, return_token_ids=True).json["system_fingerprint"] == seeded
    assert {piece["system_fingerprint"] for piece in pieces(stack, max_tokens=3, seed=2)} == {seeded}


def test_scores_of_chosen_ids(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """A map per token, null where the prompt has no score; gRPC lists them in the request's order."""
    fields = {"max_tokens": 2, "echo": True, "logprob_token_ids": [40, 7, 40]}
    scores = stack.complete(**FIXED, **fields).json["choices"][0]["logprobs"]
    assert scores["token_id_logprobs"][0] is None
    assert all(list(each) == ["40", "7"] for each in scores["token_id_logprobs"][1:])
    assert len(scores["token_id_logprobs"]) == len(scores["tokens"])
    assert [len(each) for each in scores["top_logprobs"][1:]] == [1] * (len(scores["tokens"]) - 1)
    (choice,) = stub.CreateCompletion(typed(**fields)).choices
    told = [{str(score.token_id): score.logprob for score in each.scores} for each in choice.logprobs.token_id_logprobs]
    assert told == [each or {} for each in scores["token_id_logprobs"]]


def test_scores_from_a_position_on_reuse_what_is_cached(stack: Stack, model_dir: Path) -> None:
    """Earlier tokens of the prompt get null and may come from the cache; the others have their usual scores.

    Over our own kernels the cache has the scores too, and only the prompt's last two tokens are computed again.
    """
    has_scores = manifest.load(model_dir).kernels == "own"
    prompt = " ".join(str(number * number) for number in range(60))
    fields = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    whole = stack.complete(**fields).json
    count = whole["usage"]["prompt_tokens"]
    for start in (0, 1, 2, count // 2, count - 1, count):
        part = stack.complete(**fields, logprobs_from=start).json
        scores, expected = part["choices"][0]["logprobs"], whole["choices"][0]["logprobs"]
        first = max(1, start)
        assert scores["token_logprobs"] == [None] * first + expected["token_logprobs"][first:]
        assert scores["top_logprobs"] == [None] * first + expected["top_logprobs"][first:]
        assert (scores["tokens"], scores["text_offset"]) == (expected["tokens"], expected["text_offset"])
        cached = part["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
        if has_scores:
            assert cached == count - 2
        else:
            assert cached <= max(0, start - 1)
            assert (cached > 0) == (start > 2)


def test_padded_events_have_one_length(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """Pieces of any text are as long as each other, over both doors, and say the same."""
    padded = {"stream_options": {"include_obfuscation": True}, "max_tokens": 8}
    answer = stack.complete(**FIXED, **padded, stream=True)
    events = [f"data: {event}\n\n".encode() for event in answer.events[:-1]]
    assert {len(event) for event in events} == {512}
    read = [json.loads(event) for event in answer.events[:-1]]
    assert len({piece.pop("obfuscation") for piece in read}) == len(read)
    assert (
        "".join(piece["choices"][0]["text"] for piece in read)
        == stack.complete(**FIXED, max_tokens=8).json["choices"][0]["text"]
    )
    messages = list(stub.StreamCompletion(typed(**padded)))
    assert {message.ByteSize() for message in messages} == {512}
    assert json_format.MessageToDict(messages[0])["obfuscation"]


def test_the_callers_id_comes_back(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """And is in the service's log."""
    body = json.dumps({"model": MODEL, "prompt": PROMPT, "max_tokens": 1, "return_token_ids": True})
    headers = {**AUTHORIZED, "content-type": "application/json", "x-client-request-id": "mine-17"}
    assert stack.request("POST", "/v1/completions", body, headers).headers["x-client-request-id"] == "mine-17"
    metadata = [*((name, value) for name, value in AUTHORIZED.items()), ("x-client-request-id", "mine-18")]
    _, call = stub.CreateCompletion.with_call(typed(max_tokens=1), metadata=metadata)
    assert dict(call.trailing_metadata())["x-client-request-id"] == "mine-18"
    assert stack.logs is not None
    log = stack.logs / "service.log"
    eventually(lambda: {"mine-17", "mine-18"} <= set(re.findall(r"mine-\d+", log.read_text())), log.read_text)


def test_scores_of_tokens_without_text(stack: Stack) -> None:
    """Control tokens that are generated have none: `top_logprobs` names them, over both ways of REST."""
    fields = {**FIXED, "logit_bias": {"2": 100}, "ignore_eos": True, "max_tokens": 3, "logprobs": 0}
    transcoded, rendered = (stack.complete(**fields, return_token_ids=ids).json["choices"][0] for ids in (False, True))
    assert rendered["token_ids"] == [2, 2, 2]
    for choice in (transcoded, rendered):
        assert (choice["text"], choice["logprobs"]["tokens"]) == ("", ["", "", ""])
        assert [list(each) for each in choice["logprobs"]["top_logprobs"]] == [["<|im_end|>"]] * 3
