"""Traces with OpenTelemetry: a span per request, with child spans queue, prefill and decode. Needs the extra `otel`."""

from __future__ import annotations

import threading
import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from service.telemetry.observer import Ended, Observer, Outcome

_NAME = "completion-service"
_OPERATION = "text_completion"
# How long one export may take, and how long the end of the process waits for the last export, in seconds.
_EXPORT_SECONDS = 5
_LAST_SPANS_SECONDS = 2.0


class Tracing(Observer):
    """Makes spans of requests that have ended, and sends them to a collector on its own thread.

    While the collector does not answer, spans that do not fit into the queue are dropped.
    """

    def __init__(self, endpoint: str) -> None:
        """`endpoint` is an OTLP receiver over gRPC: http://host:port or https://host:port."""
        self._provider = TracerProvider(resource=Resource.create({"service.name": _NAME}), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, timeout=_EXPORT_SECONDS)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer(_NAME)
        self._propagator = TraceContextTextMapPropagator()

    def request_ended(self, ended: Ended) -> None:
        now = time.time_ns()
        began = now - _nanoseconds(ended.seconds)
        span = self._tracer.start_span(
            f"{_OPERATION} {ended.usage.model}" if ended.usage else _OPERATION,
            context=self._propagator.extract(ended.trace),
            kind=SpanKind.SERVER,
            attributes=_attributes(ended),
            start_time=began,
        )
        if span.is_recording():
            self._add_stages(ended, set_span_in_context(span), began, now)
            if ended.outcome in {Outcome.FAILED, Outcome.DEADLINE}:  # not callers' mistakes and cancellations
                span.set_status(Status(StatusCode.ERROR))
        span.end(now)

    def _add_stages(self, ended: Ended, context: Context, began: int, now: int) -> None:
        """Adds a child span for each stage that the request reached."""
        usage = ended.usage
        if usage is None:
            return
        marks = [usage.queued_seconds, usage.started_seconds, usage.first_token_seconds]
        times = [began + _nanoseconds(mark) for mark in marks if mark is not None]
        for name, start, end in zip(("queue", "prefill", "decode"), times, [*times[1:], now], strict=False):
            self._tracer.start_span(name, context=context, start_time=start).end(end)

    def close(self) -> None:
        """Sends the remaining spans; waits at most two seconds for a collector that does not answer."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        last.join(_LAST_SPANS_SECONDS)


def _attributes(ended: Ended) -> dict[str, AttributeValue]:
    """Attributes of the semantic conventions for generative AI and RPCs: numbers and names, never content."""
    attributes: dict[str, AttributeValue] = {
        "gen_ai.operation.name": _OPERATION,
        "gen_ai.provider.name": _NAME,
        "rpc.system": "grpc",
        "rpc.service": ended.method.service,
        "rpc.method": ended.method.name,
        "rpc.grpc.status_code": ended.status,
        "completion.outcome": ended.outcome.value,
        "completion.request_id": ended.request_id,
    }
    if ended.outcome is not Outcome.COMPLETED:
        attributes["error.type"] = ended.refusal.value if ended.refusal else ended.outcome.value
    if ended.model:
        attributes["gen_ai.request.model"] = ended.model
    usage = ended.usage
    if usage is not None:
        attributes |= {
            "gen_ai.response.model": usage.model,
            "gen_ai.response.id": usage.id,
            "gen_ai.request.max_tokens": usage.max_tokens,
            "gen_ai.request.temperature": usage.temperature,
            "gen_ai.request.top_p": usage.top_p,
            "gen_ai.request.choice.count": usage.n,
            "gen_ai.response.finish_reasons": ("stop",) * usage.stopped + ("length",) * usage.cut_off,
            "gen_ai.usage.input_tokens": usage.prompt_tokens,
            "gen_ai.usage.output_tokens": usage.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": usage.cached_tokens,
        }
    return attributes


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
