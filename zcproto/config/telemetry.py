"""Define the settings of OpenTelemetry.

Rules: as in zcproto/config/model.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field
from pydantic_core import core_schema

from zcproto.config.texts import OPTIONAL_PATH, is_issuer
from zcproto.config.types import FLAG, Accepts, Settings, duration, one_of, text, whole

_DECIMAL: Final = re.compile(r"[01](\.[0-9]{1,18})?")

COLLECTOR_URL: Final = text(
    'an address such as "https://collector.example.com:4318", of printable ASCII and without a user, a query or a'
    ' fragment; http:// is for this machine alone; or ""',
    lambda url: url == "" or is_issuer(url),
)
SERVICE_NAME: Final = text(
    'a text of up to 128 printable characters, or ""', lambda name: name.isprintable() and len(name) <= 128
)


class _Fraction(Accepts):
    """A number from 0 to 1, which is not a duration."""

    def write(self, value: Any) -> str:
        return repr(float(value))


_FRACTION_WORDS: Final = "a number from 0 to 1"
FRACTION: Final = _Fraction(
    _FRACTION_WORDS,
    core_schema.custom_error_schema(
        core_schema.float_schema(ge=0, le=1, strict=True, allow_inf_nan=False),
        "refused",
        custom_error_message=f"must be {_FRACTION_WORDS}",
    ),
    from_variable=lambda value: float(value) if _DECIMAL.fullmatch(value.strip()) else value,
)


class TelemetryConfig(Settings):
    """OpenTelemetry: traces, metrics and log records, sent by OTLP over HTTP. It needs the extra "otel"."""

    traces: Annotated[bool, FLAG] = False
    """Whether requests, streams and calls to clients are traced."""
    metrics: Annotated[bool, FLAG] = False
    """Whether the metrics of /metrics are sent too, by each process with its own."""
    logs: Annotated[bool, FLAG] = False
    """Whether the lines of the log are sent too. They are written as [log] says all the same."""
    endpoint: Annotated[str, COLLECTOR_URL] = Field(default="", repr=False)
    """The address of the collector, to which /v1/traces and such is added. Empty: OTEL_EXPORTER_OTLP_ENDPOINT, or
    http://localhost:4318."""
    headers_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """A file of mode 0600 with headers of each request to the collector, one "Name: value" a line, such as its
    access token. Empty: OTEL_EXPORTER_OTLP_HEADERS, or none."""
    ca_file: Annotated[Path | None, OPTIONAL_PATH] = None
    """The CA certificates for the collector. Empty: OTEL_EXPORTER_OTLP_CERTIFICATE, or those that are common."""
    service_name: Annotated[str, SERVICE_NAME] = ""
    """The name of this server in traces (service.name). Empty: OTEL_SERVICE_NAME, or zcproto."""
    sample_ratio: Annotated[float, FRACTION] = 1.0
    """The part of the traces that begin here which is recorded: 0.01 is one of a hundred. Requests of a trace that
    has begun elsewhere are recorded if their caller's are. If it is not set, OTEL_TRACES_SAMPLER may choose another
    sampler."""
    trust: Annotated[str, one_of("all", "sessions", "none")] = "sessions"
    """Whose `traceparent` is followed. "sessions": that of requests with a session, since a stranger could have all
    requests recorded by it. For others a trace begins here."""
    timeout: Annotated[float, duration("100ms", "1m")] = 10.0
    """How long sending one batch may take, with its repetitions. If it is not set, OTEL_EXPORTER_OTLP_TIMEOUT
    applies."""
    delay: Annotated[float, duration("100ms", "1m")] = 5.0
    """How long a span or a log record waits for others before it is sent."""
    queue: Annotated[int, whole(64, 1_000_000)] = 2048
    """Spans, and as many log records, that wait to be sent. More are dropped and counted: a collector that is down
    costs no request its time."""
    metrics_interval: Annotated[float, duration("1s", "1h")] = 60.0
    """How often metrics are sent."""
    flush_timeout: Annotated[float, duration("0s", "8s")] = 5.0
    """How long the end of the server waits for what has not been sent: less than the ten seconds after which
    a worker that does not end is killed."""
