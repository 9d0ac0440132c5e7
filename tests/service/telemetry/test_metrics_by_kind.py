"""Each value of each label, under a load that leads to it, and times that a reader can compute."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from datetime import UTC, datetime

import grpc
import pytest
import trustme
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.rpc import servicer
from service.telemetry.observer import Outcome, Refusal
from tests.service.telemetry import test_metrics as metered
from tests.service.telemetry.test_metrics import KEY, METHOD, WARM_UP_STEPS, asked, ended, run
from tests.support.engines import GatedModel, busy
from tests.support.fakes import FakeModel
from tests.support.patience import PATIENCE, eventually_async

make_server, running = metered.make_server, metered.running
FINISHED = ("stop", "length", "abort", "error")


async def by(running, name, label):
    """The values of a metric that are not 0, by one label."""
    return {
        dict(labels)[label]: value
        for (found, labels), value in (await running.scrape()).items()
        if found == name and value
    }


async def reached(running, name, value, **labels):
    """Waits until a metric has the given value."""

    async def there():
        return await running.value(name, **labels) == value

    await eventually_async(there, lambda: f"{name} does not become {value}")


async def refused(call):
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value.code()


async def test_every_series_exists_from_the_start(running):
    """A series that has never been counted is 0 and not missing, so that its rate is 0 too."""
    found = await running.scrape()
    for name, label, values in (
        ("llm_requests_total", "outcome", [outcome.value for outcome in Outcome]),
        ("llm_refused_total", "reason", [refusal.value for refusal in Refusal]),
        ("llm_finished_total", "finished_reason", FINISHED),
        ("llm_faults_total", "kind", ["failed_step", "not_finite", "slow_reader", "unexpected"]),
    ):
        there = {dict(labels)[label]: value for (other, labels), value in found.items() if other == name}
        assert there == dict.fromkeys(values, 0)


async def test_how_sequences_end(running):
    """Sequences end at a stop text, at an end token, at their length, or by a fault of the model."""
    await running.ask(stop=["e"])  # ab -> cd
    await running.ask(stop_token_ids=[3], n=2)  # ab -> c
    await running.ask(n=3)
    running.model.fault = 5
    await refused(running.ask(text="f", n=2))
    await ended(running, "failed")
    assert await by(running, "llm_finished_total", "finished_reason") == {"stop": 3, "length": 3, "error": 2}
    theirs = await by(running, "vllm:request_success_total", "finished_reason")
    assert theirs == {"stop": 3, "length": 3, "error": 2}


async def test_a_cancelled_request(make_server):
    """Sequences of a cancelled request that had ended keep their reason, and the others count as aborted."""
    model = GatedModel()
    model.gate.release(WARM_UP_STEPS)
    async for running in run(make_server, model):
        for _ in range(WARM_UP_STEPS):
            await model.reached()
        batch = pb.TextBatch(texts=["ab", "xy"])
        request = pb.CreateCompletionRequest(model="abc", texts=batch, temperature=0, max_tokens=9, stop=["c"])
        stream = running.stub.StreamCompletion(request, metadata=KEY)
        await model.reached()
        model.gate.release()  # the first prompt's step, after which comes "c"
        assert (await anext(aiter(stream))).choices[0].finish_reason == pb.FINISH_REASON_STOP
        await model.reached()
        stream.cancel()
        await ended(running, "cancelled")
        model.gate.release(1000)
        assert await by(running, "llm_finished_total", "finished_reason") == {"stop": 1, "abort": 1}
        assert await running.value("llm_request_generation_tokens_count") == 0


class SlowModel(FakeModel):
    """A fake model that takes a millisecond per step."""

    def forward(self, *arguments):
        time.sleep(0.001)
        return super().forward(*arguments)


async def test_a_slow_reader(make_server):
    """A request whose caller does not read its stream has the outcome `slow_reader`, and is one fault."""
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    async for running in run(make_server, SlowModel()):
        running.server.models[0].engine.send_timeout = 0.05
        async with grpc.aio.insecure_channel(running.server.address, options=narrow) as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            stream = stub.StreamCompletion(asked(n=128, max_tokens=50, logprobs=5), metadata=KEY)
            await reached(running, "llm_faults_total", 1, kind="slow_reader")
            assert await running.value("llm_running") == 0
            # The caller gets the error as soon as it reads; only then has the call ended.
            with pytest.raises(grpc.aio.AioRpcError):
                _ = [piece async for piece in stream]
            assert await stream.code() is grpc.StatusCode.ABORTED
            await ended(running, "slow_reader")
            assert await by(running, "llm_requests_total", "outcome") == {"slow_reader": 1}
            assert await by(running, "llm_faults_total", "kind") == {"slow_reader": 1}
            found = await by(running, "llm_finished_total", "finished_reason")
            assert sum(found.values()) == 128
            assert found["abort"] > 64
        method = {**METHOD, "grpc_type": "server_stream", "grpc_method": "StreamCompletion"}
        assert await running.value("grpc_server_handled_total", **method, grpc_code="Aborted") == 1


async def test_an_unexpected_error(running, monkeypatch):
    """A call that fails with an error of no known class ends as INTERNAL, and is one fault."""

    def broken(*_arguments, **_options):
        raise ZeroDivisionError

    monkeypatch.setattr(servicer, "parse", broken)
    for _ in range(2):
        assert await refused(running.ask()) is grpc.StatusCode.INTERNAL
    await ended(running, "failed", 2)
    assert await by(running, "llm_faults_total", "kind") == {"unexpected": 2}
    assert await by(running, "llm_requests_total", "outcome") == {"failed": 2}
    assert await running.value("grpc_server_handled_total", **METHOD, grpc_code="Internal") == 2
    assert await by(running, "llm_finished_total", "finished_reason") == {}


async def test_a_key_without_access(make_server, tmp_path):
    """A model that the key may not use is NOT_FOUND for the caller, and counts as forbidden."""
    keys = tmp_path / "keys"
    keys.write_text(f"{hashlib.sha256(b'sk-other').hexdigest()} team models=another\n")
    async for running in run(make_server, FakeModel(), api_keys_file=keys):
        call = running.stub.CreateCompletion(asked(), metadata=(("authorization", "Bearer sk-other"),))
        assert await refused(call) is grpc.StatusCode.NOT_FOUND
        assert await refused(running.ask()) is grpc.StatusCode.UNAUTHENTICATED
        await ended(running, "refused")
        await ended(running, "refused", model="")
        assert await by(running, "llm_refused_total", "reason") == {"forbidden": 1, "unauthenticated": 1}


async def test_a_deadline_shorter_than_the_wait(running):
    """A deadline shorter than the estimated wait counts as refused, not as the outcome `deadline`."""
    engine = running.server.models[0].engine
    busy(engine)
    call = running.stub.CreateCompletion(asked(), metadata=KEY, timeout=PATIENCE)
    assert await refused(call) is grpc.StatusCode.DEADLINE_EXCEEDED
    await ended(running, "refused")
    assert await by(running, "llm_refused_total", "reason") == {"deadline": 1}


async def test_a_request_after_the_stop(running):
    """A request that arrives while the engine stops is refused as `stopping`."""
    running.server.models[0].engine.stop()
    assert await refused(running.ask()) is grpc.StatusCode.UNAVAILABLE
    await ended(running, "refused")
    assert await by(running, "llm_refused_total", "reason") == {"stopping": 1}


HELD = 0.2


async def test_times(make_server):
    """With one slot, a request is held up in its prefill and in its second token, and another waits for the slot."""
    model = GatedModel(slots=1)
    model.gate.release(WARM_UP_STEPS)
    async for running in run(make_server, model):
        for _ in range(WARM_UP_STEPS):
            await model.reached()
        began = time.monotonic()
        first = asyncio.ensure_future(running.ask(max_tokens=2))
        await model.reached()
        second = asyncio.ensure_future(running.ask(text="xy", max_tokens=1))
        await eventually_async(
            lambda running=running: running.server.models[0].engine.admission.queued
        )  # it waits in the queue
        await asyncio.sleep(HELD)
        model.gate.release()
        await model.reached()
        await asyncio.sleep(HELD)
        model.gate.release(1000)
        await asyncio.gather(first, second)
        took = time.monotonic() - began
        await ended(running, "completed", 2)
        rest = took - HELD  # without one of the two delays
        for name, count, least, most in (
            ("llm_prefill_time_seconds", 2, HELD, rest),  # the first request's prefill
            ("llm_decode_time_seconds", 2, HELD, rest),  # its second token
            ("llm_inter_token_latency_seconds", 1, HELD, rest),
            ("llm_queue_time_seconds", 2, 2 * HELD, took),  # the second request waits for both delays
            ("llm_time_to_first_token_seconds", 2, 3 * HELD, rest + took),
            ("llm_request_duration_seconds", 2, 4 * HELD, 2 * took),
        ):
            assert await running.value(f"{name}_count") == count, name
            assert least - 0.01 <= await running.value(f"{name}_sum") <= most + 0.01, name
        for kind in ("prompt", "decode"):
            assert HELD - 0.01 <= await running.value("llm_step_duration_seconds_sum", kind=kind) <= rest + 0.01


async def test_buckets(running):
    """Buckets of times begin at 1 ms or below, end above a minute, and each is less than three times the one before."""
    await running.ask()
    found: dict[str, set[float]] = {}
    for name, labels in await running.scrape():
        if name.endswith("_seconds_bucket"):
            found.setdefault(name, set()).add(float(dict(labels)["le"]))
    assert len(found) == 8 + 7
    for name, bounds in found.items():
        *finite, last = sorted(bounds)
        assert (finite[0] <= 0.001, finite[-1] >= 60, last) == (True, True, float("inf")), name
        assert all(after / before < 3 for before, after in itertools.pairwise(finite)), name


async def connect(running, authority):
    """Makes one call over a new connection."""
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(running.server.address, credentials, options=options) as channel:
        await completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(asked(), metadata=KEY)


async def test_the_certificate(make_server, tmp_path):
    """The metric is the expiry of the certificate for new connections, and does not exist without TLS."""
    authority = trustme.CA()
    files = {"tls_certificate": tmp_path / "service.pem", "tls_key": tmp_path / "service.key"}

    def issue(until):
        issued = authority.issue_cert("127.0.0.1", not_after=until)
        issued.private_key_pem.write_to_path(files["tls_key"])
        issued.cert_chain_pems[0].write_to_path(files["tls_certificate"])
        return until.timestamp()

    name = "llm_certificate_expiry_timestamp_seconds"
    first = issue(datetime(2098, 2, 3, 4, 5, 6, tzinfo=UTC))
    async for running in run(make_server, FakeModel(), **files):
        assert await running.value(name) == first
        await connect(running, authority)
        second = issue(datetime(2099, 1, 1, tzinfo=UTC))
        await connect(running, authority)
        assert await running.value(name) == second
    async for running in run(make_server, FakeModel()):
        assert name not in {found for found, _ in await running.scrape()}
