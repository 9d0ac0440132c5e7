"""Metrics of a real server over a fake model, scraped over HTTP, under a load whose numbers a reader can count."""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.scheduler import Scheduler
from service.errors import OverloadedError, StartupError
from service.rpc.parse import Limits
from service.rpc.servicer import ServedModel
from service.server import Server
from service.serving import models
from service.settings import Settings
from tests.support.engines import GatedModel
from tests.support.fakes import FakeModel, manifest
from tests.support.log_events import logged
from tests.support.patience import PATIENCE, eventually_async
from tests.support.ports import free_ports

KEY = (("authorization", "Bearer any"),)
WARM_UP_STEPS = 4


def cache_of(model):
    """A KV cache with memory for all slots of a model."""
    return KVCache(len(model.slots), Share(Budget(len(model.slots) * model.context_length)))


DOCS = (Path(__file__).resolve().parents[3] / "docs" / "metrics.md").read_text()
METHOD = {"grpc_type": "unary", "grpc_service": "completion.v1.CompletionService", "grpc_method": "CreateCompletion"}


class Running:
    """A running server, its clients, and the port of its metrics."""

    def __init__(self, server, model, port, channel):
        self.server, self.model, self.port = server, model, port
        self.stub = completion_pb2_grpc.CompletionServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    def ask(self, **fields):
        return self.stub.CreateCompletion(asked(**fields), metadata=KEY)

    async def scrape(self):
        """All samples by name and labels."""
        page = await asyncio.to_thread(fetch, self.port)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        }

    async def value(self, name, **labels):
        """The value of a sample; the label `model` is the alphabet model unless `labels` names another."""
        if name.startswith("llm_") and "certificate" not in name:
            labels = {"model": "alphabet", **labels}
        return (await self.scrape())[name, frozenset(labels.items())]

    async def serving(self, name):
        answer = await self.health.Check(health_pb2.HealthCheckRequest(service=name))
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def fetch(port, accept="text/plain"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("GET", "/metrics", headers={"accept": accept})
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def asked(**fields):
    return pb.CreateCompletionRequest(
        **{"model": "alphabet", "text": "ab", "temperature": 0, "max_tokens": 4, **fields}
    )


@pytest.fixture
def make_server(letters, monkeypatch):
    """Makes a server over a fake model, and returns it with the port of its metrics."""

    def make(model, **settings):
        engine = Engine(model, letters, Scheduler(cache_of(model), 16), max_waiting=100)
        served = ServedModel(manifest(), letters, engine, Limits(64, 4))
        monkeypatch.setattr(models, "load", lambda _: (served,))
        port, metrics_port = free_ports(2)
        values = {"port": port, "metrics_port": metrics_port, "prompt_chunk": 16, "drain_seconds": 1, **settings}
        return Server(Settings(model_dir=Path("none"), **values)), metrics_port

    return make


async def run(make_server, model, **settings):
    server, port = make_server(model, **settings)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        yield Running(server, model, port, channel)


@pytest.fixture
async def running(make_server):
    async for running in run(make_server, FakeModel(), vllm_metric_names=True):
        yield running


async def ended(running, outcome, count=1, model="alphabet"):
    """Waits until `count` requests have ended with this outcome, which callers can see before it is counted."""

    async def reached():
        return await running.value("llm_requests_total", outcome=outcome, model=model) == count

    await eventually_async(reached, lambda: f"no {count} requests {outcome}")


async def test_a_whole_answer(running):
    """Two requests of 2 prompt and 4 generated tokens, one after the other, are counted, and nothing else is."""
    for _ in range(2):
        await running.ask()
    found = await running.scrape()
    model = ("model", "alphabet")
    value = {name: number for (name, labels), number in found.items() if labels == {model}}
    assert found["llm_requests_total", frozenset({model, ("outcome", "completed")})] == 2
    assert (value["llm_prompt_tokens_total"], value["llm_generation_tokens_total"]) == (4, 8)
    assert (value["llm_prefix_cache_queries_total"], value["llm_prefix_cache_hits_total"]) == (4, 0)
    assert value["llm_time_to_first_token_seconds_count"] == 2
    assert value["llm_queue_time_seconds_count"] == 2
    assert value["llm_request_duration_seconds_count"] == 2
    assert value["llm_inter_token_latency_seconds_count"] == 6
    assert found["llm_step_duration_seconds_count", frozenset({model, ("kind", "prompt")})] == 2
    assert found["llm_step_duration_seconds_count", frozenset({model, ("kind", "decode")})] == 6
    assert (value["llm_batch_size_count"], value["llm_batch_size_sum"]) == (6, 6)
    assert value["llm_prefill_time_seconds_count"] == value["llm_decode_time_seconds_count"] == 2
    for name, total in (("prompt", 4), ("generation", 8), ("longest", 8)):
        assert value[f"llm_request_{name}_tokens_count"] == 2
        assert value[f"llm_request_{name}_tokens_sum"] == total
    assert (value["llm_running"], value["llm_waiting"]) == (0, 0)
    assert (value["llm_slots"], value["llm_slot_tokens"]) == (4, 64)
    assert value["llm_preemptions_total"] == 0
    assert value["llm_time_to_first_token_seconds_sum"] <= value["llm_request_duration_seconds_sum"]
    assert sum(number for (name, _), number in found.items() if name == "llm_requests_total") == 2
    assert sum(number for (name, _), number in found.items() if name == "llm_faults_total") == 0


async def test_prefixes(running):
    """The second time that a prompt of 20 tokens is sent, 18 are cached; the last two are always computed."""
    for _ in range(2):
        await running.ask(text="abcdefghijklmnopqrst", max_tokens=1)
    assert await running.value("llm_prefix_cache_queries_total") == 40
    assert await running.value("llm_prefix_cache_hits_total") == 18
    assert await running.value("llm_prompt_tokens_total") == 40


async def test_candidates(running):
    """With three candidates the prompt counts once, each generated token counts, and their steps are shared."""
    await running.ask(n=3)
    assert await running.value("llm_prompt_tokens_total") == 2
    assert await running.value("llm_generation_tokens_total") == 12
    assert await running.value("llm_inter_token_latency_seconds_count") == 9
    assert await running.value("llm_batch_size_sum") == 9
    assert await running.value("llm_request_generation_tokens_sum") == 12
    assert await running.value("llm_request_longest_tokens_sum") == 4


async def test_grpc(running):
    """Calls are counted by method and status, under Go's names."""
    await running.ask()
    with pytest.raises(grpc.aio.AioRpcError):
        await running.ask(max_tokens=-1)
    assert [piece async for piece in running.stub.StreamCompletion(asked(max_tokens=1), metadata=KEY)]
    await running.stub.ListModels(pb.ListModelsRequest(), metadata=KEY)
    assert await running.value("grpc_server_started_total", **METHOD) == 2
    assert await running.value("grpc_server_handled_total", **METHOD, grpc_code="OK") == 1
    assert await running.value("grpc_server_handled_total", **METHOD, grpc_code="InvalidArgument") == 1
    assert await running.value("grpc_server_handling_seconds_count", **METHOD) == 2
    stream = METHOD | {"grpc_type": "server_stream", "grpc_method": "StreamCompletion", "grpc_code": "OK"}
    assert await running.value("grpc_server_handled_total", **stream) == 1
    models = METHOD | {"grpc_method": "ListModels", "grpc_code": "OK"}
    assert await running.value("grpc_server_handled_total", **models) == 1
    assert await running.value("llm_requests_total", outcome="completed") == 2


@pytest.mark.parametrize(
    ("fields", "metadata", "reason", "model"),
    [
        ({"temperature": 3}, KEY, "invalid", "alphabet"),
        ({"model": "abc", "temperature": 3}, KEY, "invalid", "alphabet"),
        ({"model": ""}, KEY, "invalid", ""),
        ({"model": "none"}, KEY, "unknown_model", ""),
    ],
)
async def test_refusals(running, fields, metadata, reason, model):
    """A refusal counts under its reason, and the model's id if it is known; the request does not reach the engine."""
    with pytest.raises(grpc.aio.AioRpcError):
        await running.stub.CreateCompletion(asked(**fields), metadata=metadata)
    await ended(running, "refused", model=model)
    assert await running.value("llm_refused_total", reason=reason, model=model) == 1
    assert await running.value("llm_prompt_tokens_total") == 0
    assert await running.value("llm_queue_time_seconds_count") == 0


async def test_limits_of_a_key(make_server):
    """The limit of tokens per minute has its own reason; the limit of sequences counts as `overloaded`."""
    async for running in run(make_server, FakeModel(), tokens_per_minute=10, max_sequences=2):
        for fields in ({"max_tokens": 20}, {"n": 3, "max_tokens": 1}):
            with pytest.raises(grpc.aio.AioRpcError):
                await running.ask(**fields)
        await ended(running, "refused", 2)
        assert await running.value("llm_refused_total", reason="tokens_per_minute") == 1
        assert await running.value("llm_refused_total", reason="overloaded") == 1


async def test_faults(running):
    """A step that fails and logits that are NaN count as faults of their kinds, and their requests as failed."""
    running.model.fault = 5
    with pytest.raises(grpc.aio.AioRpcError):
        await running.ask(text="f")
    running.model.fault, running.model.broken = None, {7}
    with pytest.raises(grpc.aio.AioRpcError):
        await running.ask(text="h")
    await ended(running, "failed", 2)
    assert await running.value("llm_faults_total", kind="failed_step") == 1
    assert await running.value("llm_faults_total", kind="not_finite") == 1
    assert await running.value("llm_faults_total", kind="unexpected", model="") == 0
    assert await running.value("grpc_server_handled_total", **METHOD, grpc_code="Internal") == 2


async def test_while_it_runs(make_server, caplog):
    """While a step is held up, gauges show running and waiting sequences; one request is late, one is cancelled.

    The log line of each has the same outcome.
    """
    caplog.set_level(logging.INFO)
    model = GatedModel(slots=2)
    model.gate.release(WARM_UP_STEPS)
    async for running in run(make_server, model):
        for _ in range(WARM_UP_STEPS):
            await model.reached()
        leaving = running.stub.CreateCompletion(asked(n=2), metadata=KEY)
        await model.reached()
        late = asyncio.ensure_future(running.stub.CreateCompletion(asked(), metadata=KEY, timeout=3))
        with pytest.raises(grpc.aio.AioRpcError, match="Deadline"):
            await late
        await ended(running, "deadline")
        assert await running.value("llm_running") == 1
        assert await running.value("llm_waiting") == 1
        assert await running.value("llm_kv_usage_ratio") == 0.5
        leaving.cancel()
        await ended(running, "cancelled")
        assert await running.value("llm_request_duration_seconds_count") == 0
        codes = {code: await running.value("grpc_server_handled_total", **METHOD, grpc_code=code) for code in CUT_OFF}
        assert codes == CUT_OFF
        model.gate.release(1000)
    lines = logged(caplog, "call")
    assert [line["outcome"] for line in lines] == ["deadline", "cancelled"]
    assert [line["sequences"] for line in lines] == [1, 2]


CUT_OFF = {"DeadlineExceeded": 1, "Canceled": 1}


async def test_the_line_of_a_request(running, caplog):
    """The log line of a request has its numbers, and no word of its prompt or answer."""
    caplog.set_level(logging.INFO)
    prompt = "qrstuvwxyzabcdefghij"
    for _ in range(2):
        await running.stub.CreateCompletion(asked(text=prompt, n=2), metadata=(*KEY, ("x-request-id", "r-1")))
    await ended(running, "completed", 2)
    line = logged(caplog, "call")[-1]
    counts = {"sequences": 2, "prompt_tokens": 20, "cached_tokens": 18, "completion_tokens": 8}
    assert line | counts == line
    assert (line["outcome"], line["code"], line["request_id"]) == ("completed", "OK", "r-1")
    assert line["model"] == "alphabet"
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert prompt not in str(caplog.records)
    assert "klmn" not in str([record.__dict__ for record in caplog.records])


async def test_vllm_names(running):
    """Every documented vLLM name has the values of its counterpart, with the label `model_name`."""
    await running.ask(n=2)
    found = await running.scrape()
    names = [line.split("`")[1::2] for line in DOCS.splitlines() if line.startswith("| `vllm:")]
    assert len(names) == 20
    model, renamed = ("model", "alphabet"), ("model_name", "alphabet")
    for theirs, ours in names:
        same = {
            (theirs + name.removeprefix(ours), labels - {model} | {renamed}): value
            for (name, labels), value in found.items()
            if name.startswith(ours) and not name.endswith("_created")
        }
        assert same, ours
        assert same == {key: found[key] for key in same}
    assert sum(name.startswith("vllm:") for name, _ in found) == sum(renamed in labels for _, labels in found)
    others = {name for name, _ in found if name.startswith("vllm:") and not name.startswith(tuple(dict(names)))}
    assert others == set(NOT_RENAMED)
    for name, labels in NOT_RENAMED.items():
        assert found[name, frozenset(labels.items()) | {renamed}] == 1


# Four slots of 64 tokens, in blocks of 16.
NOT_RENAMED = {"vllm:cache_config_info": {"block_size": "16", "num_gpu_blocks": "16"}}
# What vLLM's own Grafana dashboard and the endpoint picker of the Gateway API's inference extension read, except for
# metrics of adapters, which do not exist here.
READ_BY_OTHERS = """
vllm:e2e_request_latency_seconds_bucket vllm:prompt_tokens_total vllm:generation_tokens_total
vllm:time_per_output_token_seconds_bucket vllm:inter_token_latency_seconds_bucket vllm:num_requests_running
vllm:num_requests_waiting vllm:time_to_first_token_seconds_bucket vllm:gpu_cache_usage_perc vllm:kv_cache_usage_perc
vllm:request_prompt_tokens_bucket vllm:request_generation_tokens_bucket vllm:request_success_total
vllm:request_queue_time_seconds_sum vllm:request_prefill_time_seconds_sum vllm:request_decode_time_seconds_sum
vllm:request_max_num_generation_tokens_sum vllm:cache_config_info
"""


async def test_names_that_dashboards_read(running):
    """Everything that public dashboards and endpoint pickers read exists before the first request."""
    names = {name for name, _ in await running.scrape()}
    assert set(READ_BY_OTHERS.split()) <= names


async def test_vllm_names_are_an_option(make_server):
    """Without the setting no metric has a vLLM name."""
    async for running in run(make_server, FakeModel()):
        assert not [name for name, _ in await running.scrape() if name.startswith("vllm:")]


async def test_the_documented_names(make_server):
    """The documented table has exactly the exported metrics, except for those of the process."""
    async for running in run(make_server, FakeModel()):
        await running.ask()
        page = await asyncio.to_thread(fetch, running.port)
        exported = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}
        exported = {name for name in exported if not name.startswith("process_") and not name.endswith("_created")}
        rows = {line.split("`")[1] for line in DOCS.splitlines() if line.startswith(("| `llm_", "| `grpc_"))}
        assert rows - exported == {"llm_certificate_expiry_timestamp_seconds"}  # only with TLS
        assert exported <= rows


OPEN = "application/openmetrics-text"


@pytest.mark.parametrize(
    "accept",
    [
        f"{OPEN};version=1.0.0,{OPEN};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        f"{OPEN};version=1.0.0;escaping=allow-utf-8;q=0.6,{OPEN};version=0.0.1;q=0.5,text/plain;version=1.0.0;q=0.4",
        f"{OPEN};version=1.0.0;escaping=underscores;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    ],
    ids=["second", "third", "third, old names"],
)
async def test_the_format_that_prometheus_asks_for(running, accept):
    """Every version of Prometheus gets valid OpenMetrics, with the same names and values."""
    await running.ask()
    page = await asyncio.to_thread(fetch, running.port, accept)
    assert page.endswith("# EOF\n")
    families = {family.name: family for family in openmetrics.text_string_to_metric_families(page)}
    generated = families["llm_generation_tokens"].samples
    assert [sample.value for sample in generated if sample.name.endswith("_total")] == [4]
    assert families["vllm:time_to_first_token_seconds"].type == "histogram"
    samples = {sample.name for family in families.values() for sample in family.samples}
    plain = {name for name, _ in await running.scrape()}
    assert {name for name in samples if not name.endswith("_created")} == {
        name for name in plain if not name.endswith("_created")
    }


async def test_no_metrics(make_server):
    """With port 0 nothing listens for scrapes."""
    async for running in run(make_server, FakeModel(), metrics_port=0):
        await running.ask()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.to_thread(fetch, running.port)


async def test_a_port_that_is_taken(make_server, monkeypatch, caplog):
    """A configured port must be free; if the default port is in use, the service starts without metrics and warns."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server, _ = make_server(FakeModel(), metrics_port=port)
        with pytest.raises(StartupError, match=f"port {port}.*--metrics-port"):
            await server.__aenter__()
        server, _ = make_server(FakeModel())
        unasked = server._settings.model_copy(update={"metrics_port": port})
        unasked.model_fields_set.discard("metrics_port")
        monkeypatch.setattr(server, "_settings", unasked)
        async with server, grpc.aio.insecure_channel(server.address) as channel:
            await completion_pb2_grpc.CompletionServiceStub(channel).CreateCompletion(asked(), metadata=KEY)
    assert f"port {port}" in caplog.text


async def test_a_scraper_that_hangs(running):
    """A client that connects and sends nothing blocks neither other scrapes nor the end of the server."""
    with socket.create_connection(("127.0.0.1", running.port)):
        assert await running.value("llm_running") == 0


async def test_health_follows_the_warm_up(make_server):
    """Liveness is SERVING from the start, readiness and startup after the warm-up; a drain ends only readiness."""
    model = GatedModel()
    server, _ = make_server(model)
    names = ("liveness", "startup", "readiness", "", "completion.v1.CompletionService")
    entering = asyncio.ensure_future(server.__aenter__())
    await model.reached()
    async with grpc.aio.insecure_channel(server.address) as channel:
        running = Running(server, model, 0, channel)
        assert [await running.serving(name) for name in names] == [True, False, False, False, False]
        model.gate.release(1000)
        await entering
        assert [await running.serving(name) for name in names] == [True] * 5
        server.announce_end()
        assert [await running.serving(name) for name in names] == [True, True, False, False, False]
    await server.__aexit__(None, None, None)


async def test_a_model_that_cannot_answer(make_server):
    """If the warm-up fails, the start fails."""
    model = FakeModel()
    model.fault = manifest().special_tokens.default_prompt
    server, _ = make_server(model)
    with pytest.raises(StartupError, match="warm-up"):
        await server.__aenter__()


@pytest.fixture
def make_server_of_two(letters, monkeypatch):
    """Makes a server over two fake models, `alphabet` and `second`, and returns it with the port of its metrics."""

    def make(*fakes):
        named = zip(({}, {"id": "second", "aliases": ("two",)}), fakes, strict=True)
        served = tuple(
            ServedModel(
                manifest(**changes),
                letters,
                Engine(model, letters, Scheduler(cache_of(model), 16), max_waiting=100),
                Limits(64, 4),
            )
            for changes, model in named
        )
        monkeypatch.setattr(models, "load", lambda _: served)
        port, metrics_port = free_ports(2)
        values = {"port": port, "metrics_port": metrics_port, "drain_seconds": 1, "vllm_metric_names": True}
        return Server(Settings(model_dir=["none", "none"], **values)), metrics_port

    return make


async def test_every_model_is_warmed_up(make_server_of_two):
    """The service is ready only after the second model has answered as well."""
    first, second = FakeModel(), GatedModel()
    server, _ = make_server_of_two(first, second)
    entering = asyncio.ensure_future(server.__aenter__())
    await second.reached()
    assert first.steps == WARM_UP_STEPS
    async with grpc.aio.insecure_channel(server.address) as channel:
        running = Running(server, second, 0, channel)
        assert [await running.serving(name) for name in ("liveness", "startup", "readiness")] == [True, False, False]
        second.gate.release(1000)
        await entering
        assert await running.serving("readiness")
    await server.__aexit__(None, None, None)


async def test_callers_do_not_keep_the_service_from_starting(make_server_of_two):
    """If callers fill a queue before the warm-up, the warm-up waits for its turn."""
    first, second = GatedModel(), FakeModel()
    server, _ = make_server_of_two(first, second)
    entering = asyncio.ensure_future(server.__aenter__())
    await first.reached()
    engine = server.models[1].engine
    engine.admission.max_sequences = 1
    held = engine.submit(next(models.warm_up_requests(server.models[1])))
    with pytest.raises(OverloadedError):
        engine.check("another")
    first.gate.release(1000)
    await entering
    async for _ in held:
        pass
    await server.__aexit__(None, None, None)


async def test_a_second_model_that_cannot_answer(make_server_of_two):
    """The start fails, and the message names the model."""
    second = FakeModel()
    second.fault = manifest().special_tokens.default_prompt
    server, _ = make_server_of_two(FakeModel(), second)
    with pytest.raises(StartupError, match=r"model second cannot answer.*warm-up"):
        await server.__aenter__()


async def test_two_models(make_server_of_two):
    """Each metric counts only its own model, whichever alias the caller used, also under vLLM's names."""
    fakes = FakeModel(slots=4), FakeModel(slots=2)
    server, port = make_server_of_two(*fakes)
    async with server, grpc.aio.insecure_channel(server.address) as channel:
        running = Running(server, fakes[1], port, channel)
        await running.ask(model="two", max_tokens=5)
        await ended(running, "completed", model="second")
        expected = {"llm_generation_tokens_total": 5, "llm_prompt_tokens_total": 2, "llm_batch_size_count": 4}
        expected |= {"llm_time_to_first_token_seconds_count": 1, "llm_prefix_cache_queries_total": 2}
        for name, value in expected.items():
            assert await running.value(name, model="second") == value
            assert await running.value(name) == 0
        assert [await running.value("llm_slots", model=name) for name in ("alphabet", "second")] == [4, 2]
        fakes[1].fault = 5
        with pytest.raises(grpc.aio.AioRpcError):
            await running.ask(model="second", text="f")
        assert await running.value("llm_faults_total", model="second", kind="failed_step") == 1
        assert await running.value("llm_faults_total", kind="failed_step") == 0
        assert await running.value("vllm:generation_tokens_total", model_name="second") == 5
        assert await running.value("vllm:generation_tokens_total", model_name="alphabet") == 0


async def test_the_warm_up_leaves_no_trace(running):
    """Neither metrics nor wait estimates include the warm-up."""
    assert running.model.steps == WARM_UP_STEPS
    assert await running.value("llm_generation_tokens_total") == 0
    assert await running.value("llm_prefix_cache_queries_total") == 0
    assert running.server.models[0].engine.admission.pace.generation(100) == 0
