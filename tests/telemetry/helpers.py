"""Servers in memory whose spans are kept, and a collector that receives them by OTLP over HTTP."""

from __future__ import annotations

import gzip
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

from tests.limits import TIMEOUT
from zcproto.app.app import App
from zcproto.config import TelemetryConfig
from zcproto.telemetry.requests import ChosenIds, RequestTracing
from zcproto.telemetry.spans import trace_calls, tracer_of
from zcproto.testing import MemoryServer

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
NOT_SAMPLED = SAMPLED[:-1] + "0"
TRACE_ID = int(SAMPLED[3:35], 16)


class Spans:
    """A provider that keeps its spans in memory."""

    def __init__(self, ratio: float = 1.0) -> None:
        self.ratio = ratio
        self.ids = ChosenIds()
        self.exporter = InMemorySpanExporter()
        self.provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(ratio)), shutdown_on_exit=False, id_generator=self.ids
        )
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.middleware = [trace_calls(self.provider)]

    @property
    def ended(self) -> tuple[ReadableSpan, ...]:
        return self.exporter.get_finished_spans()

    def only(self) -> ReadableSpan:
        (span,) = self.ended
        return span

    def trace(self, server: MemoryServer, app: App[Any], **options: Any) -> RequestTracing:
        """Follow the requests of a server in memory."""
        assert server._state is not None
        options = {"ratio": self.ratio, **options}
        tracing = RequestTracing(tracer_of(self.provider), self.ids, list(app), **options)
        server._state.tracing = tracing
        return tracing

    @asynccontextmanager
    async def serve(self, app: App[Any], **options: Any) -> AsyncIterator[MemoryServer]:
        """Run a server in memory and follow its requests."""
        async with MemoryServer(app, **options) as server:
            self.trace(server, app)
            yield server


def chain(spans: tuple[ReadableSpan, ...]) -> list[ReadableSpan]:
    """Return the spans of one trace from its root, each the only child of the one before."""
    children = {span.parent.span_id if span.parent is not None else 0: span for span in spans}
    assert len(children) == len(spans)
    assert len({span.context.trace_id for span in spans}) == 1
    ordered, place = [], 0
    while place in children:
        span = children.pop(place)
        ordered.append(span)
        place = span.context.span_id
    assert not children, "not one chain"
    return ordered


def patient_config(address: str) -> TelemetryConfig:
    """Return a configuration that sends spans to a collector."""
    return TelemetryConfig(traces=True, endpoint=address)


class Collector:
    """Receives OTLP over HTTP. `status` is the answer to each request; `gate` delays answers until it is set."""

    MESSAGES: ClassVar[dict[str, Any]] = {
        "/v1/traces": ExportTraceServiceRequest,
        "/v1/metrics": ExportMetricsServiceRequest,
        "/v1/logs": ExportLogsServiceRequest,
    }

    def __init__(self) -> None:
        self.status = 200
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.changed = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                message = collector.MESSAGES[self.path].FromString(body)
                with collector.changed:
                    collector.requests.append((self.path, dict(self.headers), message))
                    collector.changed.notify_all()
                collector.gate.wait(TIMEOUT)
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Write nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    @contextmanager
    def run(self) -> Iterator[Collector]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.gate.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join(TIMEOUT)

    def messages(self, path: str) -> list[Any]:
        return [message for found, _, message in self.requests if found == path]

    def spans(self) -> list[Any]:
        """Return the spans received, as they are on the wire."""
        return [
            span
            for message in self.messages("/v1/traces")
            for resource in message.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def metrics(self) -> dict[str, Any]:
        """Return the metrics of the last message, by their names."""
        (*_, message) = self.messages("/v1/metrics")
        (resource,) = message.resource_metrics
        return {metric.name: metric for scope in resource.scope_metrics for metric in scope.metrics}

    def records(self) -> list[Any]:
        """Return the log records received."""
        return [
            record
            for message in self.messages("/v1/logs")
            for resource in message.resource_logs
            for scope in resource.scope_logs
            for record in scope.log_records
        ]

    def wait_for(self, path: str, count: int = 1) -> list[Any]:
        """Return the messages at a path once there are so many."""
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.messages(path)) >= count, TIMEOUT), path
        return self.messages(path)
