"""Spans of calls, sent to an OpenTelemetry collector by OTLP over gRPC. OpenTelemetry is imported where there is one.

A call is a span `rudder.request`, of the trace that its client names by W3C Trace Context; its choices are spans
`queue`, `prefill` and `decode` in it, and so is vLLM's own `llm_request`. Attributes have the names of OpenTelemetry's
conventions for RPC and generative AI where these have one. No span has a prompt, a token or a label.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

SCOPE = "rudder.server"
# Spans that wait for a collector; more are dropped, and never wait for it.
QUEUE, BATCH, DELAY_MS, EXPORT_TIMEOUT_S, CLOSE_TIMEOUT_MS = 2048, 512, 2000, 2, 2000
Value = str | bool | int | float | Sequence[str]


class Part(NamedTuple):
    """A part of a call. `begin`, `end`: seconds since the call began."""

    name: str
    begin: float
    end: float
    attributes: Mapping[str, Value] = {}


class Event(NamedTuple):
    """What happened in a call, at its end."""

    name: str
    attributes: Mapping[str, Value]


class CallSpan:
    """The span of a call in progress."""

    def __init__(self, tracer: Any, span: Any, began_ns: int) -> None:
        self.tracer, self.span, self.began_ns = tracer, span, began_ns

    @property
    def trace_id(self) -> str:
        """The trace that it belongs to, as in a traceparent."""
        return f"{self.span.get_span_context().trace_id:032x}"

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers of a part of the call elsewhere, whose parent it is."""
        from opentelemetry.trace import set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, set_span_in_context(self.span))
        return tuple(carrier.items())

    def end(
        self, attributes: Mapping[str, Value], parts: Iterable[Part], events: Iterable[Event], error: str = ""
    ) -> None:
        """Close the span, with its parts. `error`: why the call failed."""
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        if not self.span.is_recording():
            return
        context = set_span_in_context(self.span)
        for part in parts:
            child = self.tracer.start_span(
                part.name, context, start_time=self.at(part.begin), attributes=part.attributes
            )
            child.end(self.at(part.end))
        for event in events:
            self.span.add_event(event.name, event.attributes)
        self.span.set_attributes(attributes)
        if error:
            self.span.set_status(Status(StatusCode.ERROR, error))
        self.span.end()

    def at(self, seconds: float) -> int:
        """Return the time so many seconds after the call began, in nanoseconds of Unix time."""
        return self.began_ns + int(seconds * 1e9)


class Spans:
    """Makes spans and sends them to the collector at `endpoint`, `http://host:port`, without TLS.

    `share`: of the traces for whose calls the client made no choice. A collector that does not answer costs no call
    anything: spans are sent from a thread, and dropped where they are too many.
    """

    def __init__(self, endpoint: str, share: float, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=True, timeout=EXPORT_TIMEOUT_S)
        resource = Resource.create({"service.name": "rudder", "service.version": version})
        self.provider = TracerProvider(sampler=ParentBasedTraceIdRatio(share), resource=resource)
        self.provider.add_span_processor(
            BatchSpanProcessor(
                exporter, max_queue_size=QUEUE, schedule_delay_millis=DELAY_MS, max_export_batch_size=BATCH
            )
        )
        self.tracer = self.provider.get_tracer(SCOPE, version)

    def begin(self, traceparent: str) -> CallSpan:
        """Begin the span of a call, in the trace of its client's header if it sent a valid one."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract({"traceparent": traceparent}) if traceparent else None
        now = time.time_ns()
        span = self.tracer.start_span("rudder.request", context, SpanKind.SERVER, start_time=now)
        return CallSpan(self.tracer, span, now)

    def close(self) -> None:
        """Send what waits, for at most CLOSE_TIMEOUT_MS."""
        self.provider.force_flush(CLOSE_TIMEOUT_MS)
        self.provider.shutdown()
