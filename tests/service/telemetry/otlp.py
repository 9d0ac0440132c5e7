"""A collector of traces in the test's process, which implements OpenTelemetry's protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans that it receives."""

    def __init__(self):
        self.resources = []
        self.spans = []
        self.address = ""

    async def Export(self, request, context):  # noqa: N802, the contract's name
        for group in request.resource_spans:
            self.resources.append(attributes(group.resource))
            for scope in group.scope_spans:
                self.spans += scope.spans
        return pb.ExportTraceServiceResponse()

    def named(self, name):
        """The one span of this name."""
        (found,) = [span for span in self.spans if span.name == name]
        return found


def attributes(holder):
    """The attributes of a span or resource, as plain values."""
    return {item.key: plain(item.value) for item in holder.attributes}


def plain(value):
    found = getattr(value, value.WhichOneof("value"))
    return [plain(item) for item in found.values] if value.HasField("array_value") else found


@asynccontextmanager
async def collector() -> AsyncIterator[Collector]:
    """A collector that listens on loopback."""
    made = Collector()
    server = grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(made, server)
    made.address = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield made
    finally:
        await server.stop(0)
        await asyncio.sleep(0)
