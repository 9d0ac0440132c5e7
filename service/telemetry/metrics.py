"""Metrics for Prometheus: counted and timed as an observer, or read from the engines at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.telemetry.observer import Ended, Method, Observer, Outcome, Refusal, Usage
from service.telemetry.vllm_names import VllmNames

# Bounds in seconds, from a single token of a fast GPU to a long answer of a large model on a slow CPU.
_LONG = (0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80)
_STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, *_LONG)
_WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, *_LONG, 160)
_REQUEST_BUCKETS = (*_WAIT_BUCKETS, 320, 640)
_ROW_BUCKETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024)
_TOKEN_BUCKETS = tuple(digit * 10**power for power in range(5) for digit in (1, 2, 5))

# The label `model` of events that happen before the model of the request is known.
_NO_MODEL = ""

# vLLM's words for why a sequence ended: by itself (two ways), by its caller, and by a fault.
_STOP, _LENGTH, _ABORT, _ERROR = "stop", "length", "abort", "error"
# Kinds of steps.
_PROMPT, _DECODE = "prompt", "decode"
# The labels of gRPC's own metrics.
_METHOD = ("grpc_type", "grpc_service", "grpc_method")


@dataclass(frozen=True, slots=True)
class Reading:
    """The state of an engine at a scrape: sequences, slots and memory now, and tokens and faults since the start."""

    running: int
    waiting: int
    slots: int
    slot_tokens: int
    positions: int
    free_positions: int
    looked_up_tokens: int
    cached_tokens: int
    failed_steps: int
    not_finite: int
    slow_readers: int

    @property
    def usage(self) -> float:
        """The share of the KV cache that sequences hold, 0..1: of its slots or its positions, whichever is larger."""
        return max(self.running / self.slots, 1 - self.free_positions / self.positions)


# The metrics that are read from the engines at each scrape.
_READ_AT_SCRAPE: tuple[
    tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[Reading], float]], ...
] = (
    (GaugeMetricFamily, "llm_running", "Sequences that hold a slot of the KV cache.", lambda now: now.running),
    (GaugeMetricFamily, "llm_waiting", "Sequences that hold no slot yet.", lambda now: now.waiting),
    (GaugeMetricFamily, "llm_slots", "Slots of the KV cache.", lambda now: now.slots),
    (GaugeMetricFamily, "llm_slot_tokens", "Tokens that fit into a slot.", lambda now: now.slot_tokens),
    (GaugeMetricFamily, "llm_kv_positions", "Positions of the KV cache.", lambda now: now.positions),
    (GaugeMetricFamily, "llm_kv_usage_ratio", "Share of the slots or positions that is held.", lambda now: now.usage),
    (
        CounterMetricFamily,
        "llm_prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache.",
        lambda now: now.looked_up_tokens,
    ),
    (
        CounterMetricFamily,
        "llm_prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda now: now.cached_tokens,
    ),
    (CounterMetricFamily, "llm_preemptions", "Slots taken away from their sequences: always 0.", lambda _: 0),
)

# The counters and histograms: name, help, labels, and the buckets of a histogram.
_COUNTERS = (
    ("llm_requests", "Requests that ended.", ("model", "outcome")),
    ("llm_refused", "Requests that were refused before they began.", ("model", "reason")),
    ("llm_finished", "Sequences that ended.", ("model", "finished_reason")),
    ("llm_prompt_tokens", "Tokens of prompts whose prefill is complete.", ("model",)),
    ("llm_generation_tokens", "Tokens that were sampled.", ("model",)),
    ("grpc_server_started", "Calls that began.", _METHOD),
    ("grpc_server_handled", "Calls that ended.", (*_METHOD, "grpc_code")),
)
_HISTOGRAMS = (
    ("llm_queue_time_seconds", "Time from the queue to the first slot.", ("model",), _WAIT_BUCKETS),
    ("llm_time_to_first_token_seconds", "Time from the call to the first piece.", ("model",), _WAIT_BUCKETS),
    ("llm_prefill_time_seconds", "Time from the first slot to the first piece.", ("model",), _WAIT_BUCKETS),
    ("llm_decode_time_seconds", "Time from the first piece to the end.", ("model",), _REQUEST_BUCKETS),
    ("llm_request_duration_seconds", "Duration of completed requests.", ("model",), _REQUEST_BUCKETS),
    ("llm_request_prompt_tokens", "Prompt tokens of completed requests.", ("model",), _TOKEN_BUCKETS),
    ("llm_request_generation_tokens", "Generated tokens of completed requests.", ("model",), _TOKEN_BUCKETS),
    (
        "llm_request_longest_tokens",
        "Tokens of the longest candidate of completed requests.",
        ("model",),
        _TOKEN_BUCKETS,
    ),
    ("llm_inter_token_latency_seconds", "Time between a sequence's tokens.", ("model",), _STEP_BUCKETS),
    ("llm_batch_size", "Sequences in a decode step.", ("model",), _ROW_BUCKETS),
    ("llm_step_duration_seconds", "Duration of a step of the engine.", ("model", "kind"), _STEP_BUCKETS),
    ("grpc_server_handling_seconds", "Duration of calls.", _METHOD, _REQUEST_BUCKETS),
)
# The labels of each series besides `model`. Every series exists from the start, at 0.
_SERIES: dict[str, list[tuple[str, ...]]] = {
    "llm_requests": [(outcome.value,) for outcome in Outcome],
    "llm_refused": [(refusal.value,) for refusal in Refusal],
    "llm_finished": [(_STOP,), (_LENGTH,), (_ABORT,), (_ERROR,)],
    "llm_step_duration_seconds": [(_PROMPT,), (_DECODE,)],
}


class _EngineReadings(Collector):
    """The metrics that are read at each scrape. They cost nothing between scrapes."""

    def __init__(self, read: Callable[[], Mapping[str, Reading]]) -> None:
        self._read = read
        self.unexpected = 0

    def collect(self) -> Iterator[Metric]:
        readings = self._read()
        for family, name, text, value in _READ_AT_SCRAPE:
            metric = family(name, text, labels=["model"])
            for model, reading in readings.items():
                metric.add_metric([model], value(reading))
            yield metric
        faults = CounterMetricFamily("llm_faults", "Faults inside the service.", labels=["model", "kind"])
        for model, reading in readings.items():
            faults.add_metric([model, "failed_step"], reading.failed_steps)
            faults.add_metric([model, "not_finite"], reading.not_finite)
            faults.add_metric([model, "slow_reader"], reading.slow_readers)
        faults.add_metric([_NO_MODEL, "unexpected"], self.unexpected)
        yield faults


class _EngineObserver(Observer):
    """Counts and times the steps of one model's engine."""

    def __init__(self, model: str, counters: Mapping[str, Counter], histograms: Mapping[str, Histogram]) -> None:
        self._prompt_tokens = counters["llm_prompt_tokens"].labels(model)
        self._generated = counters["llm_generation_tokens"].labels(model)
        self._gap = histograms["llm_inter_token_latency_seconds"].labels(model)
        self._rows = histograms["llm_batch_size"].labels(model)
        self._prefill_step = histograms["llm_step_duration_seconds"].labels(model, _PROMPT)
        self._decode_step = histograms["llm_step_duration_seconds"].labels(model, _DECODE)

    def prefill_step(self, seconds: float) -> None:
        self._prefill_step.observe(seconds)

    def decode_step(self, rows: int, seconds: float) -> None:
        self._decode_step.observe(seconds)
        self._rows.observe(rows)

    def prefill_ended(self, tokens: int) -> None:
        self._prompt_tokens.inc(tokens)

    def sampled(self, tokens: int, gaps: Sequence[float]) -> None:
        self._generated.inc(tokens)
        for gap in gaps:
            self._gap.observe(gap)


class Metrics(Observer):
    """Counts and times calls and requests, and has an observer for each engine.

    Each instance has its own registry, so a process can have several.
    """

    def __init__(
        self,
        read: Callable[[], Mapping[str, Reading]],
        *,
        vllm_names: bool = False,
        certificate_expires: Callable[[], float] | None = None,
    ) -> None:
        """`read` returns a reading of each engine, by model id. With `vllm_names` vLLM's names appear as well.

        With TLS, `certificate_expires` returns the time at which the certificate expires, in Unix seconds.
        """
        self.registry = CollectorRegistry()
        self._readings = _EngineReadings(read)
        self.registry.register(self._readings)
        self._counters = {name: Counter(name, text, labels, registry=self.registry) for name, text, labels in _COUNTERS}
        self._histograms = {
            name: Histogram(name, text, labels, buckets=buckets, registry=self.registry)
            for name, text, labels, buckets in _HISTOGRAMS
        }
        by_name: dict[str, Counter | Histogram] = {**self._counters, **self._histograms}
        by_model = {name: metric for name, metric in by_name.items() if name.startswith("llm_")}
        series = [(model, name) for model in read() for name in by_model]
        for model, name in [*series, (_NO_MODEL, "llm_requests"), (_NO_MODEL, "llm_refused")]:
            for labels in _SERIES.get(name, [()]):
                by_model[name].labels(model, *labels)
        self._engines = {model: _EngineObserver(model, self._counters, self._histograms) for model in read()}
        if vllm_names:
            self.registry.register(VllmNames([self._readings, *by_model.values()], read))
        if certificate_expires is not None:
            name, text = "llm_certificate_expiry_timestamp_seconds", "When the TLS certificate expires, in Unix time."
            Gauge(name, text, registry=self.registry).set_function(certificate_expires)
        ProcessCollector(registry=self.registry)

    def engine(self, model: str) -> Observer:
        """The observer for the engine of this model."""
        return self._engines[model]

    def call_began(self, method: Method) -> None:
        self._counters["grpc_server_started"].labels(method.kind, method.service, method.name).inc()

    def call_ended(self, method: Method, code: str, seconds: float) -> None:
        labels = (method.kind, method.service, method.name)
        self._counters["grpc_server_handled"].labels(*labels, _go_code(code)).inc()
        self._histograms["grpc_server_handling_seconds"].labels(*labels).observe(seconds)

    def request_ended(self, ended: Ended) -> None:
        model = ended.model or _NO_MODEL
        self._counters["llm_requests"].labels(model, ended.outcome.value).inc()
        if ended.refusal is not None:
            self._counters["llm_refused"].labels(model, ended.refusal.value).inc()
        if ended.outcome is Outcome.COMPLETED:
            self._histograms["llm_request_duration_seconds"].labels(model).observe(ended.seconds)
        if ended.usage is not None:
            self._count_usage(ended.usage, ended)

    def _count_usage(self, usage: Usage, ended: Ended) -> None:
        """Counts a request that the engine accepted."""
        finished = self._counters["llm_finished"]
        finished.labels(ended.model, _STOP).inc(usage.stopped)
        finished.labels(ended.model, _LENGTH).inc(usage.cut_off)
        other_reason = _ERROR if ended.outcome is Outcome.FAILED else _ABORT
        finished.labels(ended.model, other_reason).inc(usage.sequences - usage.stopped - usage.cut_off)
        queued, started, first = usage.queued_seconds, usage.started_seconds, usage.first_token_seconds
        observed = {
            "llm_queue_time_seconds": _difference(started, queued),
            "llm_time_to_first_token_seconds": first,
            "llm_prefill_time_seconds": _difference(first, started),
        }
        if ended.outcome is Outcome.COMPLETED:
            observed |= {
                "llm_decode_time_seconds": _difference(ended.seconds, first),
                "llm_request_prompt_tokens": usage.prompt_tokens,
                "llm_request_generation_tokens": usage.completion_tokens,
                "llm_request_longest_tokens": usage.longest,
            }
        for name, value in observed.items():
            if value is not None:
                self._histograms[name].labels(ended.model).observe(value)

    def failed_unexpectedly(self) -> None:
        self._readings.unexpected += 1


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


def _go_code(code: str) -> str:
    """A status under its name in Go, as all gRPC metrics have it: INVALID_ARGUMENT is InvalidArgument."""
    if code == "CANCELLED":
        return "Canceled"
    return code if code == "OK" else "".join(part.capitalize() for part in code.split("_"))
