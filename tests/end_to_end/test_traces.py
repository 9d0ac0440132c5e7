"""A trace from a REST caller through the real Envoy into a collector."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from tests.service.telemetry.otlp import attributes, collector
from tests.support.ports import free_ports
from tests.support.processes import TINY, export_tiny, service
from tests.support.stack import AUTHORIZED, Stack, envoy

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


def ask(model: Path, folder: Path, endpoint: str) -> None:
    """One streamed completion by a caller that traces."""
    (http,) = free_ports(1)
    with service(model, folder, "--otlp-endpoint", endpoint, "--metrics-port", "0") as running:
        with envoy(http, running.port, folder):
            Stack(http, 0).wait_until_ready()
            body = json.dumps({"model": TINY, "prompt": "the", "max_tokens": 3, "stream": True, "ignore_eos": True})
            headers = {"content-type": "application/json", "traceparent": f"00-{TRACE}-{PARENT}-01"}
            answer = Stack(http, 0).request("POST", "/v1/completions", body, AUTHORIZED | headers)
            assert answer.events[-1] == "[DONE]"
        running.stop()


async def test_a_trace_through_envoy(tmp_path: Path) -> None:
    """The request's span is a child of the caller's, and has its parts; the process sends it before it ends."""
    async with collector() as seen:
        await asyncio.to_thread(ask, export_tiny(tmp_path), tmp_path, seen.address)
    whole = seen.named(f"text_completion {TINY}")
    assert (whole.trace_id.hex(), whole.parent_span_id.hex()) == (TRACE, PARENT)
    assert attributes(whole)["gen_ai.usage.output_tokens"] == 3
    assert attributes(whole)["rpc.method"] == "StreamCompletionEvents"
    parts = [span.name for span in seen.spans if span.parent_span_id == whole.span_id]
    assert parts == ["queue", "prefill", "decode"]
