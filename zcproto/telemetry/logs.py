"""Lines of the log as OpenTelemetry's log records: with the same values, masked and bounded in the same way.

Must not know: where records go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.trace import TraceFlags

from zcproto.common.clock import NS_PER_MS
from zcproto.telemetry.spans import NO_CONTEXT, SCHEMA, SCOPE

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
        in_trace: dict[str, Any] = {}
        if trace_id is not None and span_id is not None:
            in_trace = {
                "trace_id": int(trace_id, 16),
                "span_id": int(span_id, 16),
                "trace_flags": TraceFlags(TraceFlags.SAMPLED),
            }
        self._logger.emit(
            LogRecord(
                timestamp=wall * NS_PER_MS,
                context=NO_CONTEXT,
                severity_text=level,
                severity_number=SEVERITY[level],
                body=fields["event"],
                attributes={name: value for name, value in fields.items() if name not in _HEAD},
                event_name=fields["event"],
                **in_trace,
            )
        )
