"""At the service's own port: calls without a key cost little, and one caller cannot harm the others."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc import running, wire
from service.rpc.quota import Quota
from tests.support import http2
from tests.support.log_events import logged
from tests.support.patience import eventually_async
from tests.support.served import KEY, METHOD, SEND_TIMEOUT_SECONDS, asked, detail, refused

HEAD = {":path": METHOD, "content-type": "application/grpc", "te": "trailers"}
BEARER = {"authorization": KEY[0][1]}
STREAM = METHOD.replace("Create", "Stream")


@pytest.mark.parametrize("given", [{}, {"authorization": "Bearer sk-wrong"}])
async def test_no_message_is_waited_for(served, given):
    """A call without a valid key is refused after its headers."""

    def ask():
        with http2.Connection(served.port) as connection:
            connection.open([1], HEAD | given)
            return connection.wait_for_end(1)

    assert await asyncio.to_thread(ask) == http2.HEADERS


async def test_key_that_comes_twice(served):
    """Two keys are a wrong one, whichever would be right."""
    for metadata in ((*KEY, ("authorization", "Bearer x")), (("authorization", "Bearer x"), *KEY), KEY * 2):
        error = await refused(served.stub.CreateCompletion(asked(), metadata=metadata))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "Incorrect" in error.details()


async def test_call_without_a_message(served):
    """INVALID_ARGUMENT, in words of the service's own."""
    call = served.channel.stream_unary(METHOD)
    error = await refused(call(iter(()), metadata=KEY))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no request message" in error.details()


async def test_large_message(served, monkeypatch):
    """One that is parsed on a thread is as good as another; one of too many parts is refused unparsed."""
    text = "a" * (wire.LARGE + 1)
    error = await refused(served.stub.CreateCompletion(asked(text=text), metadata=KEY))
    assert detail(error).code == "context_length_exceeded"
    error = await refused(served.channel.unary_unary(METHOD)(b"\xff" * (wire.LARGE + 1), metadata=KEY))
    assert "not a valid protobuf message" in error.details()
    monkeypatch.setattr(wire, "_MAX_PARTS", 100_000)
    prompts = pb.TokenBatch(prompts=[pb.Tokens()] * 50_001)
    call = served.channel.unary_unary(METHOD)(
        pb.CreateCompletionRequest(token_batch=prompts).SerializeToString(), metadata=KEY
    )
    assert "more than 100000 parts" in (await refused(call)).details()


async def stall(served, method=STREAM, **fields):
    """A stream whose caller takes nothing of it, not even its end."""
    connection = await asyncio.to_thread(http2.Connection, served.port, 0)
    message = http2.message(asked(max_tokens=40, **fields).SerializeToString())
    connection.open([1], {**HEAD, ":path": method, **BEARER}, message)
    return connection


@pytest.mark.parametrize("method", [STREAM, METHOD])
async def test_a_reader_that_takes_nothing_is_cut_off(served, method, caplog):
    """A call ends at its deadline even if its answer is complete; its memory is freed and its stream is closed."""
    caplog.set_level(logging.INFO)
    with await stall(served, method) as connection:
        ended = asyncio.ensure_future(asyncio.to_thread(connection.wait_for_end, 1))
        async with asyncio.timeout(60 * SEND_TIMEOUT_SECONDS):
            while not ended.done():
                # gRPC lets go of a call when the next one comes.
                assert (await served.stub.ListModels(pb.ListModelsRequest(), metadata=KEY)).data
                await asyncio.sleep(0.1)
        await served.idle()
    assert "slow_reader" in [line["outcome"] for line in logged(caplog, "call") if "outcome" in line]
    assert not served.running.calls


async def test_a_caller_who_leaves_is_no_error(served, caplog):
    """A connection that is closed in the middle of a message leaves no work and no error in the log."""
    caplog.set_level(logging.DEBUG)
    with await stall(served):
        await eventually_async(lambda: served.running.calls)
    await eventually_async(lambda: not served.running.calls)
    await served.idle()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("method", ["CreateCompletion", "StreamCompletion", "StreamCompletionEvents"])
async def test_a_key_that_is_revoked_ends_what_runs(served, method):
    """The caller hears why, and the engine has nothing left to do."""
    forward, loop, begun = served.model.forward, asyncio.get_running_loop(), asyncio.Event()

    def slow(*arguments):
        loop.call_soon_threadsafe(begun.set)
        time.sleep(0.05)
        return forward(*arguments)

    served.model.forward = slow
    call = getattr(served.stub, method)(asked(max_tokens=60, stream=method != "CreateCompletion"), metadata=KEY)
    if method != "CreateCompletion":
        await call.read()
    await begun.wait()
    served.running.revoke([served.identity])
    last = None
    if method != "CreateCompletion":
        with suppress(grpc.aio.AioRpcError):
            while (message := await call.read()) is not grpc.aio.EOF:
                last = message
    if method == "StreamCompletionEvents":
        assert b"has been revoked" in last.data
    else:
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
        assert await call.details() == "The API key has been revoked."
    await served.idle()


async def test_calls_of_one_caller_are_bounded(served, monkeypatch):
    """One more is refused, at once; what has ended makes room."""
    monkeypatch.setattr(running, "_MAX_PER_CALLER", 1)
    with await stall(served) as connection:
        await eventually_async(lambda: served.running.calls)
        error = await refused(served.stub.ListModels(pb.ListModelsRequest(), metadata=KEY))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "1"
        del connection
    await eventually_async(lambda: not served.running.calls)
    await served.stub.ListModels(pb.ListModelsRequest(), metadata=KEY)


async def test_whole_answers_of_one_caller_are_bounded(served, monkeypatch):
    """A caller with many unread bytes gets no further unary answers, but streams and other answers."""
    monkeypatch.setattr(running, "_MAX_HELD", 2000)
    with await stall(served, METHOD, n=4, logprobs=5):
        await eventually_async(lambda: served.running.held)
        error = await refused(served.stub.CreateCompletion(asked(n=4, max_tokens=40, logprobs=5), metadata=KEY))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "not read yet" in error.details()
        await served.stub.StreamCompletion(asked(max_tokens=1), metadata=KEY).read()
    await eventually_async(lambda: not served.running.calls)
    await served.stub.CreateCompletion(asked(n=4, max_tokens=40, logprobs=5), metadata=KEY)


async def test_requests_per_minute_are_counted_by_key(served):
    """Calls above the limit are refused before a message is read; calls without a key count for no caller."""
    served.limit(Quota(requests_per_minute=2))
    for _ in range(2):
        await served.stub.ListModels(pb.ListModelsRequest(), metadata=KEY)
    for number in range(100):
        wrong = (("authorization", f"Bearer junk-{number}"),)
        error = await refused(served.stub.ListModels(pb.ListModelsRequest(), metadata=wrong))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    error = await refused(served.stub.CreateCompletion(asked(), metadata=KEY))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(error.trailing_metadata())["x-ratelimit-remaining-requests"] == "0"


async def test_health(served, caplog):
    """Without a key: each name, all names, and what changes; unknown names and what is no message have a status."""
    health = health_pb2_grpc.HealthStub(served.channel)
    served.health.set_serving(True, "", "readiness")
    assert (await health.Check(health_pb2.HealthCheckRequest(service="readiness"))).status == 1
    assert dict((await health.List(health_pb2.HealthListRequest())).statuses).keys() == {"", "readiness"}
    error = await refused(health.Check(health_pb2.HealthCheckRequest(service="nothing")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == 1
    served.health.set_serving(False, "")
    assert (await watch.read()).status == 2
    for name in ("Check", "Watch", "List"):
        for data in (b"\xff\xff", b"\x0a\xff", b"x" * (wire.LARGE + 1)):
            error = await refused(served.channel.unary_unary(f"/grpc.health.v1.Health/{name}")(data))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    served.health.end_watches()
    assert await watch.read() is grpc.aio.EOF
    assert not caplog.records


async def test_watches_are_bounded(served, monkeypatch):
    """So many, and a check is answered all the same; one that ends makes room for another."""
    monkeypatch.setitem(running._MAX_LASTING, "Watch", 3)
    served.health.set_serving(True, "")
    health = health_pb2_grpc.HealthStub(served.channel)
    watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
    for watch in watches:
        assert (await watch.read()).status == 1
    error = await refused(health.Watch(health_pb2.HealthCheckRequest()))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1
    watches[0].cancel()
    await eventually_async(lambda: served.running.lasting_calls["Watch"] < 3)
    assert (await health.Watch(health_pb2.HealthCheckRequest()).read()).status == 1


async def test_a_watch_that_reads_nothing_holds_nobody_up(served):
    """A change of status reaches the other watchers at once."""
    served.health.set_serving(True, "")
    watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == 1
    with await asyncio.to_thread(http2.Connection, served.port, 0) as connection:
        connection.open([1], HEAD | {":path": "/grpc.health.v1.Health/Watch"}, http2.message(b""))
        await eventually_async(lambda: served.health.watches == 2)
        served.health.set_serving(False, "")
        assert (await watch.read()).status == 2
