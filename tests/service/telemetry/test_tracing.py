"""Spans that a collector receives from a real server over a fake model."""

from __future__ import annotations

import asyncio
import sys
import time

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.errors import StartupError
from service.rpc.parse import Limits
from service.rpc.servicer import ServedModel
from service.server import Server
from service.serving import models
from service.settings import Settings
from tests.service.telemetry.otlp import attributes, collector
from tests.support.fakes import FakeModel, manifest
from tests.support.patience import PATIENCE
from tests.support.ports import free_ports

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
KEY = (("authorization", "Bearer sk-any"),)
CALLED = (*KEY, ("traceparent", f"00-{TRACE}-{PARENT}-01"), ("x-request-id", "r-1"))
PROMPT = "qrstuvwxyzabcdefghij"


@pytest.fixture
def make_server(letters, monkeypatch):
    """Makes a server over a fake model that sends its traces to `endpoint`."""

    def make(endpoint, model=None):
        model = model or FakeModel()
        engine = Engine(model, letters, Scheduler(KVCache(4), 16), max_waiting=100)
        served = ServedModel(manifest(), letters, engine, Limits(64, 4))
        monkeypatch.setattr(models, "load", lambda _: (served,))
        (port,) = free_ports(1)
        values = {"port": port, "metrics_port": 0, "prompt_chunk": 16, "drain_seconds": 1}
        return Server(Settings(model_dir="none", otlp_endpoint=endpoint, **values))

    return make


async def ask(server, metadata=CALLED, **fields):
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        given = {"model": "abc", "text": PROMPT, "temperature": 0, "max_tokens": 4, **fields}
        return await stub.CreateCompletion(pb.CreateCompletionRequest(**given), metadata=metadata)


async def test_a_request_and_its_stages(make_server):
    """A request has a server span in the caller's trace, with the children queue, prefill and decode in order."""
    async with collector() as seen:
        async with make_server(seen.address) as server:
            answer = await ask(server)
        whole = seen.named("text_completion alphabet")
        parts = [seen.named(name) for name in ("queue", "prefill", "decode")]
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    assert whole.kind == whole.SPAN_KIND_SERVER
    assert {part.parent_span_id for part in parts} == {whole.span_id}
    assert {part.trace_id for part in parts} == {whole.trace_id}
    times = [whole.start_time_unix_nano, *(part.start_time_unix_nano for part in parts), whole.end_time_unix_nano]
    assert times == sorted(times)
    assert [part.end_time_unix_nano for part in parts] == times[2:]
    assert abs(times[-1] / 1e9 - time.time()) < PATIENCE
    found = attributes(whole)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "alphabet",
        "gen_ai.response.id": answer.id,
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": 20,
        "gen_ai.usage.output_tokens": 4,
        "rpc.service": "completion.v1.CompletionService",
        "rpc.method": "CreateCompletion",
        "rpc.grpc.status_code": 0,
        "completion.outcome": "completed",
        "completion.request_id": "r-1",
    }
    assert found | expected == found
    assert seen.resources[0]["service.name"] == "completion-service"


async def test_no_content(make_server):
    """No span contains the prompt, the answer or the key."""
    async with collector() as seen, make_server(seen.address) as server:
        answer = await ask(server)
    assert answer.choices[0].text == "klmn"
    for secret in (PROMPT, "klmn", "sk-any"):
        assert secret not in str(seen.spans)


async def test_a_new_trace(make_server):
    """Without traceparent, or with an invalid one, a request begins a new trace."""
    async with collector() as seen, make_server(seen.address) as server:
        await ask(server, metadata=KEY)
        await ask(server, metadata=(*KEY, ("traceparent", "00-nonsense")))
    roots = [span for span in seen.spans if span.name.startswith("text_completion")]
    assert [span.parent_span_id for span in roots] == [b"", b""]
    assert len({span.trace_id for span in roots}) == 2


async def test_an_unsampled_trace(make_server):
    """A request whose caller decided not to record its trace has no span."""
    async with collector() as seen, make_server(seen.address) as server:
        await ask(server, metadata=(*KEY, ("traceparent", f"00-{TRACE}-{PARENT}-00")))
    assert seen.spans == []


async def test_failures(make_server):
    """A refused request has a span without children and no error status; a failure inside has an error status."""
    model = FakeModel()
    async with collector() as seen, make_server(seen.address, model) as server:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(server, max_tokens=-1)
        model.fault = 1
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(server, text="b")
    refused, failed = seen.named("text_completion"), seen.named("text_completion alphabet")
    assert (attributes(refused)["error.type"], refused.status.code) == ("invalid", refused.status.STATUS_CODE_UNSET)
    assert (attributes(failed)["error.type"], failed.status.code) == ("failed", failed.status.STATUS_CODE_ERROR)
    assert attributes(refused)["gen_ai.request.model"] == "alphabet"
    assert attributes(refused)["rpc.grpc.status_code"] == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    assert {span.parent_span_id for span in seen.spans if span.name == "queue"} == {failed.span_id}


async def test_a_collector_that_is_down(make_server):
    """Requests are answered as usual, and the service can end."""
    (port,) = free_ports(1)
    async with make_server(f"http://127.0.0.1:{port}") as server:
        began = time.monotonic()
        await asyncio.gather(*(ask(server) for _ in range(20)))
        ending = time.monotonic()
    print(f"answered within {ending - began:.1f} s, ended within {time.monotonic() - ending:.1f} s")


async def test_without_the_extra(make_server, monkeypatch):
    """The error at the start says what to install."""
    monkeypatch.delitem(sys.modules, "service.telemetry.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"pip install 'completion-service\[otel\]'"):
        make_server("http://127.0.0.1:4317")
