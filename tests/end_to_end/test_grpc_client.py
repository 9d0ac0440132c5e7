"""A typed gRPC client against the real service: every field without JSON, and errors as typed details."""

from __future__ import annotations

import hashlib
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.protobuf import json_format, struct_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from tests.support.patience import ended_by_deadline
from tests.support.processes import service
from tests.support.stack import AUTHORIZED, MODEL, Stack

Stub = completion_pb2_grpc.CompletionServiceStub
PROMPT = "The capital of France is"


def greedy(**fields: object) -> pb.CreateCompletionRequest:
    return pb.CreateCompletionRequest(model=MODEL, max_tokens=8, temperature=0, **fields)


def refusal(call: grpc.RpcError) -> tuple[grpc.StatusCode, pb.Error]:
    """A failed call's status and typed detail."""
    (detail,) = rpc_status.from_call(call).details
    error = pb.ErrorResponse()
    assert detail.Unpack(error)
    assert error.error.message == call.details()
    return call.code(), error.error


def test_unary(stub: Stub) -> None:
    """A unary call answers with text, reason and usage as typed fields."""
    answer = stub.CreateCompletion(greedy(text=PROMPT))
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert not choice.HasField("logprobs")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (5, 8, 13)


def test_stream_joined_equals_unary(stub: Stub) -> None:
    """Streamed texts joined per choice are the unary texts; usage comes last, when asked for."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once upon a time", max_tokens=10, n=3, seed=7)
    whole = stub.CreateCompletion(request)
    request.stream_options.include_usage = True
    *pieces, last = stub.StreamCompletion(request)
    texts = ["", "", ""]
    for piece in pieces:
        texts[piece.choices[0].index] += piece.choices[0].text
        assert not piece.HasField("usage")
    assert texts == [choice.text for choice in whole.choices]
    assert not last.choices
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_every_typed_prompt_form(stub: Stub) -> None:
    """Text, texts, tokens, token batches and JSON that say the same are completed the same."""
    ids = [19556, 28, 905]
    json_prompt = struct_pb2.Value()
    json_format.ParseDict(ids, json_prompt)
    forms = [
        {"text": "Hello, world"},
        {"texts": pb.TextBatch(texts=["Hello, world"])},
        {"tokens": pb.Tokens(ids=ids)},
        {"token_batch": pb.TokenBatch(prompts=[pb.Tokens(ids=ids)])},
        {"json_prompt": json_prompt},
    ]
    answers = [stub.CreateCompletion(greedy(echo=True, **form)).choices[0].text for form in forms]
    assert len(set(answers)) == 1
    assert answers[0].startswith("Hello, world")


def test_logprobs_are_typed(stub: Stub) -> None:
    """Scores, alternatives and nulls are read without parsing JSON."""
    logprobs = stub.CreateCompletion(greedy(text=PROMPT, logprobs=2, echo=True)).choices[0].logprobs
    assert "".join(logprobs.tokens[:5]) == PROMPT
    assert logprobs.token_logprobs[0].WhichOneof("kind") == "null"
    assert logprobs.top_logprobs[0].WhichOneof("kind") == "null"
    for token, score, top in list(zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True))[
        1:
    ]:
        alternatives = top.alternatives.alternatives
        scores = [item.score.logprob for item in alternatives]
        assert scores == sorted(scores, reverse=True)
        assert [item.score.logprob for item in alternatives if item.token == token] == [score.logprob]


def test_stream_false_answers_whole(stub: Stub) -> None:
    """StreamCompletion honours an explicit `stream: false` with one whole message."""
    (only,) = stub.StreamCompletion(greedy(text=PROMPT, stream=False))
    assert only.choices[0].text == stub.CreateCompletion(greedy(text=PROMPT)).choices[0].text
    assert only.HasField("usage")


def test_no_key_is_needed_without_a_file(stack: Stack) -> None:
    """Where the service has no key file, calls without a key are answered."""
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        assert stub.CreateCompletion(greedy(text="a")).usage.completion_tokens
        assert stub.ListModels(pb.ListModelsRequest()).data


def test_key_is_required_but_for_health(tiny_model: Path, tmp_path: Path) -> None:
    """Without a key completions, models and reflection are UNAUTHENTICATED; health answers."""
    keys = tmp_path / "api_keys"
    keys.write_text(f"{hashlib.sha256(b'right').hexdigest()} somebody\n")
    with service(tiny_model, tmp_path, "--api-keys-file", str(keys)) as running:
        channel = running.channel
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        for call in (
            lambda: stub.CreateCompletion(greedy(text="a")),
            lambda: list(stub.StreamCompletion(greedy(text="a"))),
            lambda: stub.ListModels(pb.ListModelsRequest()),
            lambda: list(reflection.ServerReflectionInfo(iter([asked]))),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            code, error = refusal(caught.value)
            assert (code, error.code) == (grpc.StatusCode.UNAUTHENTICATED, "invalid_api_key")
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "completion.v1.CompletionService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_names_the_service(stack: Stack) -> None:
    """Reflection lists the service for tools that have no stubs."""
    with grpc.insecure_channel(stack.grpc_address) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (answer,) = stub.ServerReflectionInfo(iter([asked]), metadata=list(AUTHORIZED.items()))
    names = {service.name for service in answer.list_services_response.service}
    assert {"completion.v1.CompletionService", "grpc.health.v1.Health"} <= names


def test_deadline_ends_the_call(stub: Stub) -> None:
    """A passed deadline is DEADLINE_EXCEEDED, in a stream too, and amid its pieces."""
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=2000, ignore_eos=True)
    with pytest.raises(grpc.RpcError) as caught:
        stub.CreateCompletion(request, timeout=0.5)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    ended_by_deadline(lambda seconds: stub.StreamCompletion(request, timeout=seconds))


def test_every_answer_names_its_request(stub: Stub) -> None:
    """The request's id comes with success and with failure, and is the caller's own where it sent one."""
    call = stub.ListModels.with_call(pb.ListModelsRequest(), metadata=[*AUTHORIZED.items(), ("x-request-id", "mine-1")])
    assert ("x-request-id", "mine-1") in [tuple(item) for item in call[1].trailing_metadata()]
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetModel(pb.GetModelRequest(model="nothing"))
    assert "x-request-id" in dict(caught.value.trailing_metadata())


def test_native_grpc_through_envoy(stack: Stack) -> None:
    """The listener that serves REST carries native gRPC too, typed errors included."""
    with grpc.insecure_channel(stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        metadata = list(AUTHORIZED.items())
        whole = stub.CreateCompletion(greedy(text=PROMPT), metadata=metadata).choices[0].text
        pieces = stub.StreamCompletion(greedy(text=PROMPT), metadata=metadata)
        assert "".join(piece.choices[0].text for piece in pieces) == whole
        with pytest.raises(grpc.RpcError) as caught:
            stub.CreateCompletion(greedy(text="a", n=129), metadata=metadata)
        assert refusal(caught.value)[1].code == "integer_above_max_value"
