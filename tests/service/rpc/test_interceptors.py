"""Calls through a real server in this process: interceptor, servicer and engine over the alphabet."""

from __future__ import annotations

import json
import logging
import math
import time

import grpc
import pytest
from completion.v1 import completion_pb2 as pb

from service.rpc.quota import Quota
from tests.support.engines import busy
from tests.support.fakes import END, VOCABULARY
from tests.support.log_events import logged
from tests.support.patience import PATIENCE, eventually_async
from tests.support.served import KEY, METHOD, asked, detail, refused


async def test_whole_answer(served):
    """Interceptor, parsing, engine and rendering, end to end."""
    response = await served.stub.CreateCompletion(asked(max_tokens=3), metadata=KEY)
    assert [choice.text for choice in response.choices] == ["cde"]
    assert response.usage.total_tokens == 5


async def test_stream(served):
    """Pieces as messages, then the usage that was asked for."""
    request = asked(max_tokens=2, stream_options=pb.StreamOptions(include_usage=True))
    messages = [message async for message in served.stub.StreamCompletion(request, metadata=KEY)]
    assert [choice.text for message in messages for choice in message.choices] == ["c", "d"]
    assert messages[-1].usage.completion_tokens == 2


async def test_stream_that_is_explicitly_none(served):
    """The request's own word counts: one message with everything."""
    messages = [each async for each in served.stub.StreamCompletion(asked(stream=False, max_tokens=2), metadata=KEY)]
    assert [message.choices[0].text for message in messages] == ["cd"]
    assert messages[0].usage.total_tokens == 4


async def test_events(served):
    """The same as server-sent events, closed by DONE; without `stream` one JSON body."""
    bodies = [each async for each in served.stub.StreamCompletionEvents(asked(stream=True, max_tokens=2), metadata=KEY)]
    assert [body.content_type for body in bodies] == ["text/event-stream"] * 3
    assert [json.loads(body.data[6:])["choices"][0]["text"] for body in bodies[:-1]] == ["c", "d"]
    assert bodies[-1].data == b"data: [DONE]\n\n"
    (body,) = [each async for each in served.stub.StreamCompletionEvents(asked(max_tokens=2), metadata=KEY)]
    assert json.loads(body.data)["choices"][0]["text"] == "cd"


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer sk-wrong"),), (("authorization", "sk-right"),)])
@pytest.mark.parametrize("method", ["CreateCompletion", "StreamCompletion", "ListModels"])
async def test_every_method_wants_a_key(served, metadata, method):
    """UNAUTHENTICATED, and nothing reaches the engine."""
    request = pb.ListModelsRequest() if method == "ListModels" else asked()
    error = await refused(getattr(served.stub, method)(request, metadata=metadata))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert detail(error).code == "invalid_api_key"
    assert served.model.steps == 0


async def test_models(served):
    """By id and alias; unknown ones are NOT_FOUND, with a name that is safe to print."""
    listed = await served.stub.ListModels(pb.ListModelsRequest(), metadata=KEY)
    assert [(model.id, model.max_model_len) for model in listed.data] == [("alphabet", 64), ("abc", 64)]
    assert (await served.stub.GetModel(pb.GetModelRequest(model="abc"), metadata=KEY)).id == "abc"
    for call in (
        served.stub.GetModel(pb.GetModelRequest(model="x\n" * 5000), metadata=KEY),
        served.stub.CreateCompletion(asked(model="x\n" * 5000), metadata=KEY),
    ):
        error = await refused(call)
        assert (error.code(), detail(error).code) == (grpc.StatusCode.NOT_FOUND, "model_not_found")
        assert len(error.details()) < 300
        assert "\n" not in error.details()


@pytest.mark.parametrize("fields", [{"model": ""}, {"max_tokens": -1}, {"stream": True}])
async def test_refusal_names_the_field(served, fields):
    """INVALID_ARGUMENT with the typed detail."""
    error = await refused(served.stub.CreateCompletion(asked(**fields), metadata=KEY))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert detail(error).param == next(iter(fields))


async def test_bias_against_the_whole_vocabulary(served):
    """If every token has the same bias, the answer is the same as without, up to `max_tokens`."""
    bias = {str(token): -100.0 for token in range(VOCABULARY)}
    response = await served.stub.CreateCompletion(asked(max_tokens=3, logit_bias=bias, logprobs=0), metadata=KEY)
    (choice,) = response.choices
    assert (choice.text, choice.finish_reason) == ("cde", pb.FINISH_REASON_LENGTH)
    assert all(math.isfinite(score.logprob) for score in choice.logprobs.token_logprobs)


async def test_bytes_that_are_no_message(served):
    """INVALID_ARGUMENT, not UNKNOWN with the library's words."""
    call = served.channel.unary_unary(METHOD)
    error = await refused(call(b"\xff\xff\xff", metadata=KEY))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a valid protobuf message" in error.details()


async def test_unknown_method(served):
    """UNIMPLEMENTED, as gRPC has it."""
    error = await refused(served.channel.unary_unary("/completion.v1.CompletionService/Nope")(b"", metadata=KEY))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize(("given", "kept"), [("my-id.1", True), ("bad id", False), ("x" * 129, False)])
async def test_request_id(served, given, kept):
    """A caller's id is taken over where it is safe; else there is a new one."""
    error = await refused(served.stub.CreateCompletion(asked(n=0), metadata=(*KEY, ("x-request-id", given))))
    found = dict(error.trailing_metadata())["x-request-id"]
    assert (found == given) == kept
    assert found


async def test_fault_is_not_described_to_the_caller(served):
    """INTERNAL with the request id and constant text; the next call is answered."""
    served.model.fault = END
    request = pb.CreateCompletionRequest(model="abc", tokens=pb.Tokens(ids=[END]))
    error = await refused(served.stub.CreateCompletion(request, metadata=(*KEY, ("x-request-id", "id-7"))))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "fake model" not in error.details()
    assert "id-7" in error.details()
    assert (await served.stub.CreateCompletion(asked(max_tokens=1), metadata=KEY)).choices[0].text == "c"


async def test_fault_in_mid_stream(served):
    """HTTP readers get an event with the error as the last; typed callers the status."""
    served.model.fault = 3
    bodies = [each async for each in served.stub.StreamCompletionEvents(asked(stream=True), metadata=KEY)]
    assert [json.loads(body.data[6:]).get("error", {}).get("type") for body in bodies] == [None, None, "server_error"]
    stream = served.stub.StreamCompletion(asked(), metadata=KEY)
    assert [(await stream.read()).choices[0].text for _ in range(2)] == ["c", "d"]
    assert (await refused(stream)).code() is grpc.StatusCode.INTERNAL


async def test_overload(served):
    """RESOURCE_EXHAUSTED, and when to come back."""
    served.engine.admission.max_sequences = 0
    error = await refused(served.stub.CreateCompletion(asked(), metadata=KEY))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["retry-after"] == "1"
    assert detail(error).code == "rate_limit_exceeded"
    served.limit(Quota(tokens_per_minute=600))
    error = await refused(served.stub.CreateCompletion(asked(), metadata=KEY))
    assert dict(error.trailing_metadata())["x-ratelimit-remaining-tokens"] == "600"


@pytest.mark.parametrize("method", ["CreateCompletion", "StreamCompletion", "StreamCompletionEvents"])
async def test_leaving_frees(served, method):
    """A caller who cancels, whenever that is, leaves nothing running."""
    for steps in (0, 1, 5, 20):
        done = served.model.steps + steps
        call = getattr(served.stub, method)(asked(max_tokens=60, n=4, stream=method.endswith("Events")), metadata=KEY)
        await eventually_async(lambda done=done: served.model.steps >= done)
        call.cancel()
        await served.idle()
    assert not served.engine.steps.sequences


async def test_deadline_frees(served):
    """DEADLINE_EXCEEDED ends the work too."""
    forward = served.model.forward
    served.model.forward = lambda *arguments: time.sleep(0.1) or forward(*arguments)
    error = await refused(served.stub.CreateCompletion(asked(max_tokens=60), metadata=KEY, timeout=1))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await served.idle()
    assert served.model.steps < 60


async def test_log_line_per_call(served, caplog):
    """Method, status and caller, but neither prompt nor key."""
    caplog.set_level(logging.INFO)
    await served.stub.CreateCompletion(asked(text="secret", user="me", max_tokens=1), metadata=KEY)
    lines = await eventually_async(lambda: logged(caplog, "call"))
    assert (lines[0]["method"], lines[0]["code"], lines[0]["caller"]) == (METHOD, "OK", "team")
    assert "secret" not in str([record.__dict__ for record in caplog.records])
    assert "sk-right" not in str([record.__dict__ for record in caplog.records])


async def test_users_are_logged_by_pseudonym(served, caplog):
    """Each user has its own stable name in the log, and never its clear text."""
    caplog.set_level(logging.INFO)
    for user in ("alice", "bob", "alice"):
        await served.stub.CreateCompletion(asked(max_tokens=1, user=user), metadata=KEY)
    await eventually_async(lambda: len(logged(caplog, "call")) == 3)
    first, second, third = (line["user"] for line in logged(caplog, "call"))
    assert first == third != second
    assert "alice" not in str([record.__dict__ for record in caplog.records])


async def test_tokens_per_minute(served):
    """A request is charged with all that it may use, and gets back what it did not; headers say what is left."""
    served.limit(Quota(tokens_per_minute=600))
    call = served.stub.CreateCompletion(asked(max_tokens=58, stop=["e"]), metadata=KEY)  # "ab", then "cd"
    await call
    assert dict(await call.initial_metadata()) == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "540",
        "x-ratelimit-reset-tokens": "6s",
    }
    stream = served.stub.StreamCompletion(asked(max_tokens=2), metadata=KEY)
    assert [each async for each in stream]
    remaining = int(dict(await stream.initial_metadata())["x-ratelimit-remaining-tokens"])
    assert 592 <= remaining <= 594  # of the first request only 4 are left, less what the time since then forgave
    error = await refused(served.stub.CreateCompletion(asked(max_tokens=60, n=10), metadata=KEY))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (detail(error).type, detail(error).code) == ("tokens", "rate_limit_exceeded")
    metadata = dict(error.trailing_metadata())
    assert (metadata["x-ratelimit-limit-tokens"], metadata["retry-after"]) == ("600", "60")


async def test_sequences_at_once(served):
    """A key has a limit of sequences; ended and refused ones no longer count."""
    served.limit(Quota(max_sequences=3))
    error = await refused(served.stub.CreateCompletion(asked(n=4), metadata=KEY))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (detail(error).type, detail(error).code) == ("requests", "rate_limit_exceeded")
    for _ in range(5):
        assert len((await served.stub.CreateCompletion(asked(n=3), metadata=KEY)).choices) == 3


async def test_deadline_shorter_than_the_wait(served):
    """Refused by its estimate, without a step of the engine."""
    busy(served.engine)
    error = await refused(served.stub.CreateCompletion(asked(), metadata=KEY, timeout=PATIENCE))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "wait" in detail(error).message
    assert served.model.steps == 0


async def test_the_wall_clock_may_jump(served, monkeypatch):
    """An hour forth and back in mid-request: deadlines and rates go on; only `created` follows the clock."""
    served.limit(Quota(tokens_per_minute=600))
    wall = time.time
    for jump in (3600.0, -3600.0):
        stream = served.stub.StreamCompletion(asked(max_tokens=40), metadata=KEY, timeout=PATIENCE)
        pieces = aiter(stream)
        first = await anext(pieces)
        monkeypatch.setattr(time, "time", lambda jump=jump: wall() + jump)
        rest = [each async for each in pieces]
        assert await stream.code() is grpc.StatusCode.OK
        assert rest[-1].choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert abs(first.created - wall()) < 4000
        answer = served.stub.CreateCompletion(asked(max_tokens=1), metadata=KEY)
        assert abs((await answer).created - wall() - jump) < PATIENCE
        assert 0 <= int(dict(await answer.initial_metadata())["x-ratelimit-remaining-tokens"]) <= 600
