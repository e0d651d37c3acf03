"""Send spans, log records and metrics of a server to a collector, as `[telemetry]` configures.

    put -> queue -> (thread) batch -> exporter

Rules:
- A key that is not set leaves the choice to the OTEL_* variables of the SDK, and OTEL_SDK_DISABLED is obeyed.
- Everything runs in the process that calls `Telemetry`: threads do not survive a fork.
- If the program has no global provider yet, the server's becomes it: spans of the application join its traces.
- Messages of the SDK go to this log, unless the program has a handler for them.
- `put` never waits. What does not fit in the queue is dropped and counted.
- A batch that cannot be delivered is dropped and counted: the next ones would wait for it.
- An answer of the collector is read up to a size and for the time of a request, and dropped: exporters use its
  status and header. A redirect is a failure: it would send the data, and headers with a secret, to another server.
- A metric has the name that docs/reference/metrics.md gives it, without `_total` and its unit, which exporters to
  Prometheus append. Log records have the values of the log, masked and bounded in the same way.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from logging import WARNING, Handler, getLogger
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import requests
from opentelemetry import trace
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.context import _SUPPRESS_INSTRUMENTATION_KEY, attach, set_value
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider, LogRecordProcessor, ReadableLogRecord, ReadWriteLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import TraceFlags

from zcproto.app.app import Method
from zcproto.common.clock import NS_PER_MS, Clock, Entropy, system_clock
from zcproto.common.exceptions import masked
from zcproto.common.files import OTHERS_ANY, PRIVATE_FIX, check_mode, file_errors, read_file
from zcproto.common.text import escape_text
from zcproto.config import TelemetryConfig
from zcproto.errors import ConfigError
from zcproto.observe.histogram import Histogram
from zcproto.observe.log import add_trace_ids, copy_lines, get_logger
from zcproto.observe.metrics import METRICS, Series
from zcproto.observe.metrics import Metric as ServerMetric
from zcproto.telemetry.requests import ChosenIds, RequestTracing
from zcproto.telemetry.spans import NO_CONTEXT, SCHEMA, SCOPE, ids_for_log, tracer_of

MAX_BATCH: Final = 256
"""Items of a batch: about five milliseconds of encoding, during which the event loop waits for the interpreter."""

QUEUE: Final = 2_048
"""Spans, and as many log records, that wait to be sent. More are dropped: no request waits."""

DELAY_S: Final = 5.0
"""How long a span or a log record waits for others."""

FLUSH_S: Final = 5.0
"""How long the end of the server waits for what has not been sent. A worker is killed after ten seconds."""

T = TypeVar("T")


class Batches(Generic[T]):
    """A queue of at most `most` items, and a thread that exports them, up to `size` at once.

    `export` returns whether they have arrived.
    """

    def __init__(
        self,
        export: Callable[[Sequence[T]], bool],
        *,
        most: int,
        delay: float,
        name: str,
        size: int = MAX_BATCH,
    ) -> None:
        self._export = export
        self._size = size
        self._most = most
        self._delay = delay
        self._waiting: deque[T] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self.sent = 0
        self.failed = 0
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"zcproto-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def put(self, item: T) -> None:
        """Queue an item, or drop it."""
        with self._changed:
            if self._is_closed or len(self._waiting) >= self._most:
                self.dropped += 1
                return
            self._waiting.append(item)
            if len(self._waiting) == self._size:
                self._changed.notify_all()

    def begin_close(self) -> None:
        """Accept no more items, and export the queue at once."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def close(self, limit: float) -> int:
        """Wait at most `limit` seconds for the export of the queue. Return how many items are lost."""
        self.begin_close()
        self._thread.join(limit)
        with self._changed:
            lost = len(self._waiting)
            self._waiting.clear()
            self.dropped += lost
            return lost

    def _work(self) -> None:
        attach(set_value(_SUPPRESS_INSTRUMENTATION_KEY, True))  # a traced exporter would never end
        while True:
            with self._changed:
                self._changed.wait_for(self._is_due, self._delay)
                batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
                if not batch and self._is_closed:
                    return
            if batch:
                self._send(batch)

    def _is_due(self) -> bool:
        return self._is_closed or len(self._waiting) >= self._size

    def _send(self, batch: Sequence[T]) -> None:
        try:
            has_arrived = self._export(batch)
        except Exception:  # an exporter may be any
            has_arrived = False
        if has_arrived:
            self.sent += len(batch)
        else:
            self.failed += len(batch)


class BatchedSpans(SpanProcessor):
    """Queues spans that have ended and are sampled."""

    def __init__(self, batches: Batches[ReadableSpan]) -> None:
        self._batches = batches

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self._batches.put(span)


class BatchedLogs(LogRecordProcessor):
    """Queues log records."""

    def __init__(self, batches: Batches[ReadWriteLogRecord]) -> None:
        self._batches = batches

    def on_emit(self, log_record: ReadWriteLogRecord) -> None:
        self._batches.put(log_record)

    def shutdown(self) -> None:
        """Do nothing: `Batches.close` has a limit."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Return True without waiting."""
        return True


UNITS: Final = {"seconds": "s", "bytes": "By"}
"""The units of UCUM by those in names."""

_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE

ReadSeries = Callable[[], Series]


def name_and_unit(metric: ServerMetric) -> tuple[str, str]:
    """Return the name and the unit that a metric has in OpenTelemetry."""
    name = metric.name.removesuffix("_total")
    return name.removesuffix(f"_{metric.unit}") if metric.unit else name, UNITS.get(metric.unit, "1")


def metrics_data(series: Series, resource: Resource, began_ns: int, now_ns: int) -> MetricsData:
    """Return the series of one process as data to export. They have been counted since `began_ns`."""
    metrics = list(_metrics(series, began_ns, now_ns))
    scope = ScopeMetrics(InstrumentationScope(SCOPE, schema_url=SCHEMA), metrics, SCHEMA)
    return MetricsData([ResourceMetrics(resource, [scope], resource.schema_url)])


def _metrics(series: Series, began_ns: int, now_ns: int) -> Iterator[Metric]:
    for known, values in series.items():
        metric = METRICS[known]
        name, unit = name_and_unit(metric)
        numbers: list[NumberDataPoint] = []
        histograms: list[HistogramDataPoint] = []
        for labels, value in values.items():
            attributes = dict(zip(metric.labels, labels, strict=True))
            if isinstance(value, Histogram):
                histograms.append(_histogram(value, attributes, began_ns, now_ns))
            else:
                number = value if isinstance(value, float) else int(value)
                numbers.append(NumberDataPoint(attributes, began_ns, now_ns, number))
        data: Sum | Gauge | HistogramData
        if metric.kind == "histogram":
            data = HistogramData(histograms, _CUMULATIVE)
        elif metric.kind == "counter":
            data = Sum(numbers, _CUMULATIVE, is_monotonic=True)
        else:
            data = Gauge(numbers)
        yield Metric(name, metric.help, unit, data)


def _histogram(
    value: Histogram, attributes: dict[str, str], began_ns: int, now_ns: int
) -> HistogramDataPoint:
    extremes: dict[str, None] = {"min": None, "max": None}  # unknown
    return HistogramDataPoint(
        attributes,
        began_ns,
        now_ns,
        sum(value.counts),
        value.total,
        list(value.counts),
        list(value.bounds),
        **extremes,  # type: ignore[arg-type]  # optional in the protocol
    )


SEVERITY: Final = {
    "debug": SeverityNumber.DEBUG,
    "info": SeverityNumber.INFO,
    "warning": SeverityNumber.WARN,
    "error": SeverityNumber.ERROR,
}
_HEAD: Final = frozenset({"timestamp", "level", "event", "trace_id", "span_id"})


class LogRecords:
    """Emits each line of the log as a record."""

    def __init__(self, provider: LoggerProvider) -> None:
        self._logger = provider.get_logger(SCOPE, schema_url=SCHEMA)

    def __call__(self, level: str, wall: int, fields: Mapping[str, Any]) -> None:
        """Emit a line with these fields, which are loggable. `wall` is in milliseconds since the Unix epoch."""
        trace_id, span_id = fields.get("trace_id"), fields.get("span_id")
        span: trace.Span = trace.INVALID_SPAN  # the span of an empty context would be the current one
        if trace_id is not None and span_id is not None:
            sampled = TraceFlags(TraceFlags.SAMPLED)
            span = trace.NonRecordingSpan(
                trace.SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=False, trace_flags=sampled)
            )
        self._logger.emit(
            LogRecord(
                timestamp=wall * NS_PER_MS,
                context=trace.set_span_in_context(span, NO_CONTEXT),
                severity_text=level,
                severity_number=SEVERITY[level],
                body=fields["event"],
                attributes={name: value for name, value in fields.items() if name not in _HEAD},
                event_name=fields["event"],
            )
        )


MAX_ANSWER: Final = 65_536
"""Bytes of an answer. One that reports a partial success has a few hundred."""

_PART: Final = 8_192


class CollectorSession(requests.Session):
    """Connections to a collector."""

    def __init__(self, now: Callable[[], float] = system_clock.now) -> None:
        super().__init__()
        self._now = now

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        """Send a request and read its answer. Raises RequestException."""
        response = super().send(request, **{**options, "stream": True, "allow_redirects": False})
        try:
            if HTTPStatus.MULTIPLE_CHOICES <= response.status_code < HTTPStatus.BAD_REQUEST:
                raise requests.TooManyRedirects(
                    "the collector redirects; set telemetry.endpoint to its address"
                )
            self._drop_body(response.raw, options.get("timeout"))
        except BaseException:
            response.close()
            raise
        return response

    def _drop_body(self, raw: Any, limit: float | None) -> None:
        """Read a body as it was sent, so that its connection can be used again. Nothing is decompressed."""
        until = None if limit is None else self._now() + limit
        read = getattr(raw, "read1", raw.read)  # `read` of older versions waits for a full part
        left = MAX_ANSWER
        while data := read(_PART, decode_content=False):
            left -= len(data)
            if left < 0 or (until is not None and self._now() > until):
                raise requests.RequestException("the answer of the collector is too long or takes too long")


MAX_HEADERS_FILE: Final = 16_384
MAX_HEADERS: Final = 32
TRY_S: Final = 3.0
"""Seconds for which `try_collector` waits."""

MAX_READINGS: Final = 4
"""Readings of all metrics in the queue."""

_HEADER: Final = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}):[ \t]*([ -~]{1,8192})")
_PROTOCOL: Final = "http/protobuf"

log = get_logger(__name__)


class Telemetry:
    """The telemetry of one server. `batches` are by signal: traces, logs, metrics."""

    def __init__(self, config: TelemetryConfig, clock: Clock, entropy: Entropy) -> None:
        """Raises ConfigError for a file of headers that cannot be used."""
        self._config = config
        self._clock = clock
        self._headers = headers_of(config.headers_file)
        self._resource = _resource(config, entropy)
        self._exporters: list[Any] = []
        self.batches: dict[str, Batches[Any]] = {}
        self.ratio: float | None = None
        self._ids = ChosenIds()
        self.tracer_provider: TracerProvider | None = None
        _show_messages_of_sdk()
        if config.traces:
            self._start_traces()
        if config.metrics:
            self._start_metrics()
        if config.logs:
            self._start_logs()

    def _start_traces(self) -> None:
        config = self._config
        exporter = OTLPSpanExporter(**target_of(config, self._headers, "traces"))
        sampler: Sampler | None = None
        if "sample_ratio" in config.model_fields_set or "OTEL_TRACES_SAMPLER" not in os.environ:
            self.ratio = config.sample_ratio
            sampler = ParentBased(TraceIdRatioBased(config.sample_ratio))
        self.tracer_provider = TracerProvider(
            sampler=sampler, resource=self._resource, shutdown_on_exit=False, id_generator=self._ids
        )
        batches = self._queue(
            "traces", exporter, lambda batch: exporter.export(batch) is SpanExportResult.SUCCESS
        )
        self.tracer_provider.add_span_processor(BatchedSpans(batches))
        add_trace_ids(ids_for_log)
        if isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            trace.set_tracer_provider(self.tracer_provider)

    def _start_metrics(self) -> None:
        exporter = OTLPMetricExporter(**target_of(self._config, self._headers, "metrics"))

        def export(batch: Sequence[MetricsData]) -> bool:
            return all(exporter.export(each) is MetricExportResult.SUCCESS for each in batch)

        self._queue("metrics", exporter, export, most=MAX_READINGS, size=1)

    def _start_logs(self) -> None:
        exporter = OTLPLogExporter(**target_of(self._config, self._headers, "logs"))
        provider = LoggerProvider(resource=self._resource, shutdown_on_exit=False)

        def export(batch: Sequence[ReadableLogRecord]) -> bool:
            return exporter.export(batch) is LogRecordExportResult.SUCCESS

        provider.add_log_record_processor(BatchedLogs(self._queue("logs", exporter, export)))
        copy_lines(LogRecords(provider))

    async def send_metrics(self, read: ReadSeries) -> None:
        """Send the series of this process until cancelled, and then a last time. Returns without metrics."""
        batches = self.batches.get("metrics")
        if batches is None:
            return
        began = self._clock.wall() * NS_PER_MS

        def send() -> None:
            batches.put(metrics_data(read(), self._resource, began, self._clock.wall() * NS_PER_MS))

        try:
            while True:
                await asyncio.sleep(self._config.metrics_interval)
                send()
        finally:
            send()

    def follow_requests(self, methods: Mapping[str, Method]) -> RequestTracing | None:
        """Return the tracer of a server's requests; None without traces."""
        if self.tracer_provider is None:
            return None
        return RequestTracing(
            tracer_of(self.tracer_provider),
            self._ids,
            methods.values(),
            ratio=self.ratio,
            trust=self._config.trust,
        )

    def counts(self) -> Iterator[tuple[str, str, int]]:
        """Yield signal, result and number of the items."""
        for signal, batches in self.batches.items():
            yield signal, "sent", batches.sent
            yield signal, "failed", batches.failed
            yield signal, "dropped", batches.dropped

    async def stop(self) -> None:
        """Send the queues, within the limit of the configuration."""
        loop, limit = asyncio.get_running_loop(), FLUSH_S
        done = asyncio.Event()

        def close() -> None:
            try:
                self._close(limit)
            finally:
                loop.call_soon_threadsafe(done.set)

        # Not a thread of the loop's executor: the end of the loop would wait for it.
        threading.Thread(target=close, name="zcproto-telemetry-end", daemon=True).start()
        await done.wait()

    def _close(self, limit: float) -> None:
        if self._config.logs:
            copy_lines(None)
        until = self._clock.now() + limit
        for batches in self.batches.values():
            batches.begin_close()
        for signal, batches in self.batches.items():
            lost = batches.close(max(0.0, until - self._clock.now()))
            if lost:
                log.warning("telemetry.lost", signal=signal, count=lost)
        if self._config.traces:
            add_trace_ids(None)
        for exporter in self._exporters:
            exporter.shutdown()  # ends its repetitions, too

    def _queue(
        self,
        signal: str,
        exporter: Any,
        export: Callable[[Any], bool],
        *,
        most: int | None = None,
        size: int = MAX_BATCH,
    ) -> Batches[Any]:
        batches: Batches[Any] = Batches(
            export, most=most or QUEUE, delay=DELAY_S, name=f"telemetry-{signal}", size=size
        )
        self.batches[signal] = batches
        self._exporters.append(exporter)
        return batches


def target_of(config: TelemetryConfig, headers: Mapping[str, str], signal: str) -> dict[str, Any]:
    """Return the configured arguments of an exporter."""
    found: dict[str, Any] = {"session": CollectorSession()}
    if config.endpoint:
        found["endpoint"] = f"{config.endpoint.rstrip('/')}/v1/{signal}"
    if config.ca_file is not None:
        found["certificate_file"] = str(config.ca_file)
    if headers:
        found["headers"] = headers
    return found


def try_collector(config: TelemetryConfig, signals: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Send an empty message for each signal; yield why it does not arrive, or an empty text. Raises ConfigError."""
    headers = headers_of(config.headers_file)
    empty: dict[str, Callable[..., Any]] = {
        "traces": lambda **target: OTLPSpanExporter(**target).export([]),
        "metrics": lambda **target: OTLPMetricExporter(**target).export(MetricsData([])),
        "logs": lambda **target: OTLPLogExporter(**target).export([]),
    }
    for signal in signals:
        target = {**target_of(config, headers, signal), "timeout": TRY_S}
        with _reported() as reasons:
            has_arrived = empty[signal](**target).name == "SUCCESS"
        yield signal, "" if has_arrived else masked(reasons[-1] if reasons else "it does not answer")


@contextmanager
def _reported() -> Iterator[list[str]]:
    """Collect the messages of the SDK."""
    found: list[str] = []

    class Collect(Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logger, handler = getLogger("opentelemetry"), Collect(WARNING)
    was, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = was


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise ConfigError if the variables of the SDK ask for another protocol."""
    for name in sorted(environ):
        if (
            name.startswith("OTEL_EXPORTER_OTLP_")
            and name.endswith("PROTOCOL")
            and environ[name] != _PROTOCOL
        ):
            raise ConfigError([f"{name}: the server sends by {_PROTOCOL} only; set it to that, or remove it"])


def headers_of(path: Path | None) -> dict[str, str]:
    """Return the headers of requests to the collector. Raises ConfigError for an unusable file."""
    if path is None:
        return {}
    key = "telemetry.headers_file"
    with file_errors(path, "read", lambda fault: ConfigError([f"{key}: {fault}"]), fix=PRIVATE_FIX):
        data, status = read_file(path, MAX_HEADERS_FILE, forbidden=None)
        check_mode(path, status, OTHERS_ANY)
    found: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8", "replace").splitlines(), 1):
        if not line.strip():
            continue
        match = _HEADER.fullmatch(line.rstrip())
        if match is None or len(found) == MAX_HEADERS:
            raise ConfigError(
                [
                    f'{key}: {escape_text(str(path))}: line {number} must be "Name: value", of at most'
                    f" {MAX_HEADERS}"
                ]
            )
        found[match[1]] = match[2]
    return found


def _resource(config: TelemetryConfig, entropy: Entropy) -> Resource:
    """Return the attributes of this process, which are part of everything that it sends."""
    attributes: dict[str, Any] = {"service.instance.id": entropy(16).hex()}
    if config.service_name:
        attributes["service.name"] = config.service_name
    elif not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        attributes["service.name"] = "zcproto"
    return Resource.create(attributes)


class _MessagesOfSdk(Handler):
    """Writes the messages of the SDK to the log of the server."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warning("telemetry.sdk", text=masked(record.getMessage()))


def _show_messages_of_sdk() -> None:
    logger = getLogger("opentelemetry")
    if not logger.hasHandlers():
        logger.addHandler(_MessagesOfSdk(WARNING))
