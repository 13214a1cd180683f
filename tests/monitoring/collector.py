"""An OpenTelemetry collector in this process: takes OTLP over gRPC and keeps the spans."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass(frozen=True)
class Received:
    """A span. `trace`, `span`, `parent`: its identifiers in hexadecimal; `parent` is empty at the root."""

    name: str
    trace: str
    span: str
    parent: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    error: str


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What was received, at `http://127.0.0.1:port`."""

    port: int = 0
    spans: list[Received] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """The address that a server is given."""
        return f"http://127.0.0.1:{self.port}"

    def Export(self, request: Any, _: Any) -> Any:  # noqa: N802
        """Take spans."""
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans += [received(span) for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()


def received(span: Any) -> Received:
    """Convert a span."""
    events = tuple((event.name, values(event.attributes)) for event in span.events)
    return Received(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        values(span.attributes),
        events,
        span.status.message if span.status.code == 2 else "",
    )


def values(attributes: Any) -> dict[str, Any]:
    """Convert attributes."""
    return {each.key: value(each.value) for each in attributes}


def value(message: Any) -> Any:
    """Convert a value."""
    kind = message.WhichOneof("value")
    if kind == "array_value":
        return [value(each) for each in message.array_value.values]
    return getattr(message, kind)


@contextmanager
def running() -> Iterator[Collector]:
    """Run a collector."""
    server, collector = grpc.server(ThreadPoolExecutor(2)), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector
    server.stop(0).wait()
