"""Metrics for Prometheus: what the observer is told, and what is read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.telemetry.observer import Ended, Method, Observer, Outcome, Refusal, Usage
from service.telemetry.vllm_names import VllmNames

# From a fast GPU's token, or a short answer of it, to those of a large model on a slow CPU: in seconds.
_LONG = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, *_LONG)
_WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, *_LONG, 160)
_REQUEST_BUCKETS = (*_WAIT_BUCKETS, 320, 640)
_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
_TOKEN_BUCKETS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))

# The label of what happened before it was known for which model.
_NO_MODEL = ""

# What has ended by itself, by its caller, and by a fault; vLLM's words.
_STOP, _LENGTH, _ABORT, _ERROR = "stop", "length", "abort", "error"


@dataclass(frozen=True, slots=True)
class Reading:
    """An engine at the moment of a scrape: sequences and slots now, tokens and faults since the start."""

    running: int
    waiting: int
    slots: int
    slot_tokens: int
    looked_up_tokens: int
    cached_tokens: int
    failed_steps: int
    not_finite: int
    slow_readers: int


class _Live(Collector):
    """The metrics that are read at each scrape, and cost nothing in between."""

    def __init__(self, read: Callable[[], Mapping[str, Reading]]) -> None:
        self._read = read
        self.unexpected = 0

    def collect(self) -> Iterator[Metric]:
        now = self._read()

        def each(
            kind: type[GaugeMetricFamily | CounterMetricFamily], name: str, text: str, of: Callable[[Reading], float]
        ) -> Metric:
            family = kind(name, text, labels=["model"])
            for model, reading in now.items():
                family.add_metric([model], of(reading))
            return family

        gauge, counter = GaugeMetricFamily, CounterMetricFamily
        yield each(gauge, "llm_running", "Sequences that hold a slot of keys and values.", lambda it: it.running)
        yield each(gauge, "llm_waiting", "Sequences that hold no slot yet.", lambda it: it.waiting)
        yield each(gauge, "llm_slots", "Slots of keys and values.", lambda it: it.slots)
        yield each(gauge, "llm_slot_tokens", "Tokens that a slot holds.", lambda it: it.slot_tokens)
        yield each(gauge, "llm_kv_usage_ratio", "Held slots by slots.", lambda it: it.running / it.slots)
        looked_up = "Prompt tokens looked up in the prefix cache."
        yield each(counter, "llm_prefix_cache_queries", looked_up, lambda it: it.looked_up_tokens)
        yield each(counter, "llm_prefix_cache_hits", "Prompt tokens found in it.", lambda it: it.cached_tokens)
        yield each(counter, "llm_preemptions", "Slots taken away from their sequences: none ever is.", lambda _: 0)
        faults = CounterMetricFamily("llm_faults", "What went wrong inside.", labels=["model", "kind"])
        for model, reading in now.items():
            faults.add_metric([model, "failed_step"], reading.failed_steps)
            faults.add_metric([model, "not_finite"], reading.not_finite)
            faults.add_metric([model, "slow_reader"], reading.slow_readers)
        faults.add_metric([_NO_MODEL, "unexpected"], self.unexpected)
        yield faults


class _Certificate(Collector):
    """When the TLS certificate expires, read at each scrape."""

    def __init__(self, expires: Callable[[], float]) -> None:
        self._expires = expires

    def collect(self) -> Iterator[Metric]:
        name, text = "llm_certificate_expiry_timestamp_seconds", "When the TLS certificate expires, in Unix time."
        yield GaugeMetricFamily(name, text, self._expires())


class _EngineMetrics:
    """What engines tell, by model."""

    def __init__(self) -> None:
        self.prompt_tokens = Counter(
            "llm_prompt_tokens", "Tokens of prompts read to the end.", ["model"], registry=None
        )
        self.generated = Counter("llm_generation_tokens", "Tokens that were sampled.", ["model"], registry=None)
        self.gap = _histogram("llm_inter_token_latency_seconds", "Between a sequence's tokens.", _STEP_BUCKETS, "model")
        self.rows = _histogram("llm_batch_size", "Sequences in a decode step.", _ROW_BUCKETS, "model")
        self.steps = _histogram("llm_step_duration_seconds", "Steps of the engine.", _STEP_BUCKETS, "model", "kind")

    def all(self) -> list[Collector]:
        return [self.prompt_tokens, self.generated, self.gap, self.rows, self.steps]


class _OfEngine(Observer):
    """Counts and times the steps of one model's engine."""

    def __init__(self, metrics: _EngineMetrics, model: str) -> None:
        self._prompt_tokens, self._generated = metrics.prompt_tokens.labels(model), metrics.generated.labels(model)
        self._gap, self._rows = metrics.gap.labels(model), metrics.rows.labels(model)
        self._prompt_step, self._decode_step = (metrics.steps.labels(model, kind) for kind in ("prompt", "decode"))

    def prompt_step(self, seconds: float) -> None:
        self._prompt_step.observe(seconds)

    def decode_step(self, rows: int, seconds: float) -> None:
        self._decode_step.observe(seconds)
        self._rows.observe(rows)

    def prompt_read(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def sampled(self, tokens: int, gaps: Sequence[float]) -> None:
        self._generated.inc(tokens)
        for gap in gaps:
            self._gap.observe(gap)


class Metrics(Observer):
    """Counts and times calls and requests, and has observers for engines.

    A registry of its own: a process may have several.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Reading]],
        *,
        vllm_names: bool = False,
        certificate_expires: Callable[[], float] | None = None,
    ) -> None:
        """`read` reads the engines, by model; with `vllm_names` everything appears by vLLM's names too.

        With TLS `certificate_expires` tells when the certificate does, in Unix seconds.
        """
        self.registry = CollectorRegistry()
        self._live = _Live(read)
        models = tuple(read())
        self._requests = Counter("llm_requests", "Requests that ended.", ["model", "outcome"], registry=None)
        self._refused = Counter("llm_refused", "Requests that never began.", ["model", "reason"], registry=None)
        self._finished = Counter("llm_finished", "Sequences that ended.", ["model", "finished_reason"], registry=None)
        self._queue = _histogram("llm_queue_time_seconds", "From the queue to the first slot.", _WAIT_BUCKETS, "model")
        self._first = _histogram("llm_time_to_first_token_seconds", "From call to first piece.", _WAIT_BUCKETS, "model")
        self._duration = _histogram("llm_request_duration_seconds", "Completed requests.", _REQUEST_BUCKETS, "model")
        self._prefill = _histogram(
            "llm_prefill_time_seconds", "From first slot to first piece.", _WAIT_BUCKETS, "model"
        )
        self._decode = _histogram("llm_decode_time_seconds", "From first piece to the end.", _REQUEST_BUCKETS, "model")
        self._asked = _histogram("llm_request_prompt_tokens", "Prompts of completed requests.", _TOKEN_BUCKETS, "model")
        self._answered = _histogram("llm_request_generation_tokens", "Their answers.", _TOKEN_BUCKETS, "model")
        self._longest = _histogram("llm_request_longest_tokens", "Their longest candidates.", _TOKEN_BUCKETS, "model")
        engines = _EngineMetrics()
        self._engines = {model: _OfEngine(engines, model) for model in models}
        method = ("grpc_type", "grpc_service", "grpc_method")
        self._began = Counter("grpc_server_started", "Calls that began.", method, registry=None)
        self._ended = Counter("grpc_server_handled", "Calls that ended.", [*method, "grpc_code"], registry=None)
        self._handling = _histogram("grpc_server_handling_seconds", "How long calls took.", _REQUEST_BUCKETS, *method)
        for model in (*models, _NO_MODEL):
            for outcome in Outcome:
                self._requests.labels(model, outcome.value)
            for reason in Refusal:
                self._refused.labels(model, reason.value)
        histograms = [self._queue, self._first, self._prefill, self._decode, self._duration]
        histograms += [self._asked, self._answered, self._longest]
        for model in models:
            for histogram in histograms:
                histogram.labels(model)
            for end in (_STOP, _LENGTH, _ABORT, _ERROR):
                self._finished.labels(model, end)
        own: list[Collector] = [self._live, self._requests, self._refused, self._finished, *engines.all(), *histograms]
        for collector in [*own, self._began, self._ended, self._handling]:
            self.registry.register(collector)
        if vllm_names:
            self.registry.register(VllmNames(own, read))
        if certificate_expires is not None:
            self.registry.register(_Certificate(certificate_expires))
        ProcessCollector(registry=self.registry)

    def engine(self, model: str) -> Observer:
        """Whom the engine of this model tells of its steps."""
        return self._engines[model]

    def call_began(self, method: Method) -> None:
        self._began.labels(method.kind, method.service, method.name).inc()

    def call_ended(self, method: Method, code: str, seconds: float) -> None:
        labels = (method.kind, method.service, method.name)
        self._ended.labels(*labels, _go_code(code)).inc()
        self._handling.labels(*labels).observe(seconds)

    def request_ended(self, ended: Ended) -> None:
        model = ended.model or _NO_MODEL
        self._requests.labels(model, ended.outcome.value).inc()
        if ended.refusal is not None:
            self._refused.labels(model, ended.refusal.value).inc()
        if ended.outcome is Outcome.COMPLETED:
            self._duration.labels(model).observe(ended.seconds)
        if ended.usage is not None:
            self._used(ended.usage, ended)

    def _used(self, usage: Usage, ended: Ended) -> None:
        """Counts a request that the engine had taken."""
        model = ended.model
        self._finished.labels(model, _STOP).inc(usage.stopped)
        self._finished.labels(model, _LENGTH).inc(usage.cut_off)
        others = _ERROR if ended.outcome is Outcome.FAILED else _ABORT
        self._finished.labels(model, others).inc(usage.sequences - usage.stopped - usage.cut_off)
        if usage.queued_seconds is not None and usage.started_seconds is not None:
            self._queue.labels(model).observe(usage.started_seconds - usage.queued_seconds)
        if usage.first_token_seconds is not None:
            self._first.labels(model).observe(usage.first_token_seconds)
            if usage.started_seconds is not None:
                self._prefill.labels(model).observe(usage.first_token_seconds - usage.started_seconds)
        if ended.outcome is not Outcome.COMPLETED:
            return
        if usage.first_token_seconds is not None:
            self._decode.labels(model).observe(ended.seconds - usage.first_token_seconds)
        self._asked.labels(model).observe(usage.prompt_tokens)
        self._answered.labels(model).observe(usage.completion_tokens)
        self._longest.labels(model).observe(usage.longest)

    def failed_unexpectedly(self) -> None:
        self._live.unexpected += 1


def _histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Histogram:
    return Histogram(name, text, labels, buckets=buckets, registry=None)


def _go_code(code: str) -> str:
    """A status by its name in Go, as all gRPC metrics have it: INVALID_ARGUMENT is InvalidArgument."""
    if code == "CANCELLED":
        return "Canceled"
    return code if code == "OK" else "".join(part.capitalize() for part in code.split("_"))
