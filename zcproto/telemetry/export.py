"""Builds OpenTelemetry's SDK from `[telemetry]` and ends it with the server.

Rules:
- A key that is not set leaves the choice to the OTEL_* variables of the SDK, and OTEL_SDK_DISABLED is obeyed.
- Everything runs in the process that calls `Telemetry`: threads do not survive a fork.
- If the program has no global provider yet, the server's becomes it: spans of the application join its traces.
- Messages of the SDK go to this log, unless the program has a handler for them.

Must not know: what is counted and logged.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import WARNING, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any, Final

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider, ReadableLogRecord
from opentelemetry.sdk._logs.export import LogRecordExportResult
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased

from zcproto.app.app import Method
from zcproto.common.clock import NS_PER_MS, Clock, Entropy
from zcproto.common.exceptions import masked
from zcproto.common.files import OTHERS_ANY, check_mode, file_errors, read_file
from zcproto.common.text import escape_text
from zcproto.config import TelemetryConfig
from zcproto.errors import ConfigError
from zcproto.observe.log import add_trace_ids, copy_lines, get_logger
from zcproto.telemetry.batch import MAX_BATCH, BatchedLogs, BatchedSpans, Batches
from zcproto.telemetry.collector import CollectorSession
from zcproto.telemetry.logs import LogRecords
from zcproto.telemetry.metrics import ReadSeries, metrics_data
from zcproto.telemetry.requests import ChosenIds, RequestTracing
from zcproto.telemetry.spans import ids_for_log, tracer_of

MAX_HEADERS_FILE: Final = 16_384
MAX_HEADERS: Final = 32
TRY_S: Final = 3.0
"""Seconds for which `try_collector` waits."""

MAX_READINGS: Final = 4
"""Readings of all metrics that wait to be sent."""

_HEADER: Final = re.compile(r"([A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}):[ \t]*([ -~]{1,8192})")
_PROTOCOL: Final = "http/protobuf"

log = get_logger(__name__)


class Telemetry:
    """What one server sends. `batches` are by signal: traces, logs, metrics."""

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
        exporter = OTLPSpanExporter(**self._target("traces"))
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
        exporter = OTLPMetricExporter(**self._target("metrics"))

        def export(batch: Sequence[MetricsData]) -> bool:
            return all(exporter.export(each) is MetricExportResult.SUCCESS for each in batch)

        self._queue("metrics", exporter, export, most=MAX_READINGS, size=1)

    def _start_logs(self) -> None:
        exporter = OTLPLogExporter(**self._target("logs"))
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
        """Return what traces the requests of a server; None without traces."""
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
        """Yield signal, result and count of what has been sent or not."""
        for signal, batches in self.batches.items():
            yield signal, "sent", batches.sent
            yield signal, "failed", batches.failed
            yield signal, "dropped", batches.dropped

    async def stop(self) -> None:
        """Send what waits, within the limit of the configuration."""
        loop, limit = asyncio.get_running_loop(), self._config.flush_timeout
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
        config = self._config
        batches: Batches[Any] = Batches(
            export, most=most or config.queue, delay=config.delay, name=f"telemetry-{signal}", size=size
        )
        self.batches[signal] = batches
        self._exporters.append(exporter)
        return batches

    def _target(self, signal: str) -> dict[str, Any]:
        return target_of(self._config, self._headers, signal)


def target_of(config: TelemetryConfig, headers: Mapping[str, str], signal: str) -> dict[str, Any]:
    """Return the arguments of an exporter: those that the configuration has."""
    found: dict[str, Any] = {"session": CollectorSession()}
    if config.endpoint:
        found["endpoint"] = f"{config.endpoint.rstrip('/')}/v1/{signal}"
    if config.ca_file is not None:
        found["certificate_file"] = str(config.ca_file)
    if headers:
        found["headers"] = headers
    if "timeout" in config.model_fields_set:
        found["timeout"] = config.timeout
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
        target = {**target_of(config, headers, signal), "timeout": min(config.timeout, TRY_S)}
        with _reported() as reasons:
            has_arrived = empty[signal](**target).name == "SUCCESS"
        yield signal, "" if has_arrived else masked(reasons[-1] if reasons else "it does not answer")


@contextmanager
def _reported() -> Iterator[list[str]]:
    """Collect what the SDK reports."""
    found: list[str] = []

    class Collect(Handler):
        def emit(self, record: LogRecord) -> None:
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
    with file_errors(path, "read", lambda fault: ConfigError([f"{key}: {fault}"])):
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
    """Return what is true of all that this process sends."""
    attributes: dict[str, Any] = {"service.instance.id": entropy(16).hex()}
    if config.service_name:
        attributes["service.name"] = config.service_name
    elif not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in os.environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    ):
        attributes["service.name"] = "zcproto"
    return Resource.create(attributes)


class _MessagesOfSdk(Handler):
    """Writes what the SDK reports to the log of the server."""

    def emit(self, record: LogRecord) -> None:
        log.warning("telemetry.sdk", text=masked(record.getMessage()))


def _show_messages_of_sdk() -> None:
    logger = getLogger("opentelemetry")
    if not logger.hasHandlers():
        logger.addHandler(_MessagesOfSdk(WARNING))
