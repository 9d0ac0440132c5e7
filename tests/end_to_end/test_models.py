"""Two models in one service, behind the real Envoy: each answers by itself, and nothing of one is another's."""

from __future__ import annotations

import hashlib
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from prometheus_client.parser import text_string_to_metric_families

from service.host.processor import processor
from tests.support.patience import eventually
from tests.support.processes import METADATA, TINY, Service, export_tiny, service
from tests.support.stack import KEY, MODEL, Stack, envoy, free_ports

LARGE = "SmolLM2-135M-Instruct"
PROMPT = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12}
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 3000, "extra_body": {"ignore_eos": True}}
ONLY_TINY, ONE_AT_ONCE = "only-tiny", "one-at-once"

# The large model has one slot and a short queue: it is soon full.
FILE = """
tokens_per_minute = 1000000

[models.large]
dir = "{large}"
max_running = 1
max_waiting = 2
max_queue_seconds = 10000
memory_mib = 2500

[models.small]
dir = "{small}"
aliases = ["quick"]
max_running = 5
context_length = 4000

[alias]
cheap = "tiny"
"""


@dataclass(frozen=True)
class Both:
    """A service of two models, and Envoy before it."""

    service: Service
    stack: Stack
    client: openai.OpenAI

    def samples(self, name: str, **labels: str) -> dict[str, float]:
        """A metric of the llm_ family by model."""
        page = Stack(self.stack.metrics, 0).request("GET", "/metrics", headers={}).body.decode()
        return {
            sample.labels["model"]: sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        }

    def ask(self, model: str, **fields: Any) -> pb.CreateCompletionResponse:
        return self.service.complete(**{"model": model, "text": "Once upon a time", "max_tokens": 12, **fields})

    def as_key(self, key: str) -> openai.OpenAI:
        return self.client.with_options(api_key=key)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_tiny(tmp_path_factory.mktemp("tiny"))


@contextmanager
def serving(folder: Path, *arguments: str, **options: Any) -> Iterator[Both]:
    """A service of the models that the arguments name, behind Envoy."""
    http, metrics = free_ports(2)
    with (
        service(None, folder, "--metrics-port", str(metrics), *arguments, **options) as running,
        envoy(http, running.port, folder),
        openai.OpenAI(base_url=f"http://127.0.0.1:{http}/v1", api_key=KEY, max_retries=0) as client,
    ):
        stack = Stack(http, running.port, None, metrics)
        stack.wait_until_ready()
        yield Both(running, stack, client)


@pytest.fixture(scope="module")
def both(model_dir: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("both")
    (folder / "settings.toml").write_text(FILE.format(large=model_dir, small=tiny))
    limits = {KEY: "", ONLY_TINY: "models=tiny", ONE_AT_ONCE: "max_sequences=1"}
    lines = (f"{hashlib.sha256(key.encode()).hexdigest()} {key} {more}\n" for key, more in limits.items())
    (folder / "keys").write_text("".join(lines))
    with serving(folder, "--config", str(folder / "settings.toml"), "--api-keys-file", str(folder / "keys")) as made:
        yield made


def test_every_model_and_alias_is_listed(both: Both) -> None:
    """Over REST and gRPC: ids, the manifests' aliases, those of the tables and those of the settings, each once."""
    expected = {LARGE: 8192, MODEL: 8192, TINY: 4000, "quick": 4000, "cheap": 4000}
    listed = both.client.models.list().data
    assert {model.id: model.model_dump()["max_model_len"] for model in listed} == expected
    assert len(listed) == len(expected)
    typed = both.service.stub.ListModels(pb.ListModelsRequest(), metadata=METADATA).data
    assert {model.id: model.max_model_len for model in typed} == expected
    for name, length in expected.items():
        assert both.client.models.retrieve(name).model_dump()["max_model_len"] == length


def test_each_answers_for_itself(both: Both, stack: Stack) -> None:
    """Concurrent requests by id and by alias, over REST and gRPC, get each model's own answer."""
    alone = stack.complete(**PROMPT).json["choices"][0]["text"]
    with ThreadPoolExecutor(4) as pool:
        small = [pool.submit(both.ask, name) for name in (TINY, "quick", "cheap")]
        large = pool.submit(both.client.completions.create, model=LARGE, **PROMPT)
        texts = {each.result().choices[0].text for each in small}
        assert large.result().choices[0].text == alone
    by_alias = both.client.completions.create(model=MODEL, **PROMPT)
    assert (by_alias.choices[0].text, by_alias.model) == (alone, MODEL)
    (text,) = texts
    assert text != alone
    assert (
        both.client.completions.create(model="quick", **PROMPT, extra_body={"ignore_eos": True}).choices[0].text == text
    )


def test_a_model_that_is_not_there(both: Both) -> None:
    """404, as ever."""
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        both.client.completions.create(model="large", **PROMPT)


def test_slots_and_budget_of_each(both: Both) -> None:
    """Each has its own, as its table says, and the log says what of the memory it has."""
    assert both.samples("llm_slots") == {LARGE: 1, TINY: 5}
    lines = {line["model"]: line for line in both.service.log if "positions" in line}
    assert (lines[LARGE]["slots"], lines[LARGE]["total_mib"]) == (1, 2500)
    assert lines[TINY]["slots"] == 5
    assert both.samples("llm_kv_positions") == {name: line["positions"] for name, line in lines.items()}
    serving = both.service.logged("serving")
    assert (serving["models"], serving["processor"]) == ([LARGE, TINY], str(processor()))


def test_a_full_queue_is_its_own(both: Both) -> None:
    """While the large model refuses what comes, the small one answers, also who has just been refused."""
    answered = both.samples("llm_requests_total", outcome="completed")
    streams = [both.service.stream(model=LARGE, text="Once", max_tokens=3000)]
    next(streams[0])
    # It holds the slot. The next waits, and that is the half of the queue that one caller may fill.
    streams.append(both.service.stream(model=LARGE, text="Once", max_tokens=3000))
    try:
        eventually(lambda: both.samples("llm_waiting")[LARGE] == 1)
        with pytest.raises(openai.RateLimitError):
            both.client.completions.create(model=LARGE, **PROMPT)
        assert both.samples("llm_running") == {LARGE: 1, TINY: 0}
        assert both.client.completions.create(model=TINY, **PROMPT).choices[0].text
    finally:
        for stream in streams:
            stream.cancel()
    eventually(lambda: both.samples("llm_running")[LARGE] == 0)
    now = both.samples("llm_requests_total", outcome="completed")
    assert {model: now[model] - answered[model] for model in now} == {LARGE: 0, TINY: 1, "": 0}
    assert both.samples("llm_refused_total", reason="overloaded") == {LARGE: 1, TINY: 0, "": 0}


def test_a_keys_quota_is_for_all_models(both: Both) -> None:
    """A caller that may have one sequence at once, and has it in one model, is refused by the other."""
    client = both.as_key(ONE_AT_ONCE)
    stream = client.completions.create(model=LARGE, stream=True, **LONG)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="sequences at once"):
        client.completions.create(model=TINY, **PROMPT)
    stream.close()
    eventually(lambda: both.samples("llm_running")[LARGE] == 0)
    assert client.completions.create(model=TINY, **PROMPT).usage


def test_a_key_for_one_model(both: Both) -> None:
    """The key lists only that model, under all its names; the other one does not exist for it."""
    client = both.as_key(ONLY_TINY)
    assert {model.id for model in client.models.list()} == {TINY, "quick", "cheap"}
    assert client.completions.create(model="cheap", **PROMPT).usage
    with pytest.raises(openai.NotFoundError) as forbidden:
        client.completions.create(model=MODEL, **PROMPT)
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="unknown", **PROMPT)
    assert str(forbidden.value).replace(MODEL, "unknown") == str(unknown.value)


def test_metrics_and_log_name_the_model(both: Both) -> None:
    """Tokens count where they were made; the line of a request has the model's id, whatever it was called by."""
    names = ("llm_generation_tokens_total", "llm_prompt_tokens_total", "llm_time_to_first_token_seconds_count")
    before = {name: both.samples(name) for name in names}
    answer = both.ask("cheap", max_tokens=7)
    after = {name: both.samples(name) for name in names}
    grown = {name: {model: after[name][model] - before[name][model] for model in (LARGE, TINY)} for name in names}
    counts = (7, answer.usage.prompt_tokens, 1)
    assert grown == {name: {LARGE: 0, TINY: count} for name, count in zip(names, counts, strict=True)}
    line = [line for line in both.service.log if line["message"] == "call" and "model" in line][-1]
    assert (line["model"], line["completion_tokens"]) == (TINY, 7)


def busy(running: Service) -> list[Any]:
    """A stream of each model, each with its first piece; the tiny model is the faster one."""
    streams = [running.stream(model=name, text="Once", max_tokens=most) for name, most in ((MODEL, 150), (TINY, 300))]
    for stream in streams:
        next(stream)
    return streams


def directories(*models: Path) -> list[str]:
    return [part for model in models for part in ("--model-dir", str(model))]


def test_a_drain_with_both_busy(model_dir: Path, tiny: Path, tmp_path: Path) -> None:
    """After SIGTERM the streams of both models run to their ends; the log counts both."""
    flags = ["--context-length", "1024", "--max-running", "2"]
    with service(None, tmp_path, *directories(model_dir, tiny), *flags, step_seconds=0.01) as running:
        streams = busy(running)
        running.process.send_signal(signal.SIGTERM)
        with ThreadPoolExecutor(2) as pool:
            for pieces in pool.map(list, streams):
                assert pieces[-1].choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert running.exit_code() == 0, running.errors
    assert running.logged("draining")["running"] == 2
    assert running.logged("stopped")["failed_steps"] == 0


@pytest.mark.parametrize(
    ("fault", "message", "ends"),
    [
        ("die", "the engine has died", [grpc.StatusCode.UNAVAILABLE] * 2),
        # The stream in the step that hangs may be its cause, and must not be sent elsewhere.
        ("hang", "the engine hangs", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE]),
    ],
)
def test_an_engine_of_two_that_ends(
    tiny: Path, tmp_path: Path, fault: str, message: str, ends: list[grpc.StatusCode]
) -> None:
    """Whichever it is: callers of both models hear of it, health says so, and the process ends with 1."""
    other = renamed(tiny, tmp_path / "other", "other")
    flags = [*directories(tiny, other), "--watchdog-seconds", "3"]
    with service(None, tmp_path, *flags, fault=fault, step_seconds=0.02) as running:
        streams = [running.stream(model=name, max_tokens=3000) for name in (TINY, "other")]
        for stream in streams:
            next(stream)
        running.process.send_signal(signal.SIGUSR1)
        codes = []
        for stream in streams:
            with pytest.raises(grpc.RpcError) as caught:
                list(stream)
            codes.append(caught.value.code())
        assert sorted(codes, key=str) == ends
        assert running.exit_code() == 1
    assert running.logged(message)["level"] == "critical"


def renamed(model: Path, target: Path, name: str) -> Path:
    """A copy of a model with another id."""
    target.mkdir()
    for file in model.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    manifest = json.loads((target / "manifest.json").read_text())
    (target / "manifest.json").write_text(json.dumps(manifest | {"id": name}))
    return target
