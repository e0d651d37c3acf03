"""Starts the telemetry of a server, if its configuration has any."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from zcproto.common.clock import Clock, Entropy
from zcproto.config import TelemetryConfig
from zcproto.errors import ConfigError

if TYPE_CHECKING:
    from zcproto.telemetry.export import Telemetry


def build_telemetry(config: TelemetryConfig, clock: Clock, entropy: Entropy) -> Telemetry | None:
    """Return what sends traces, metrics and log records; None if nothing is to be sent. Reads files.

    Raises ConfigError for an unusable file, and without the packages of the extra.
    """
    if not (config.traces or config.metrics or config.logs):
        return None
    if os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    try:
        from zcproto.telemetry.export import Telemetry, check_environment  # noqa: PLC0415 - of an extra
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ConfigError(
            ['telemetry: OpenTelemetry is not installed; run: pip install "zcproto[otel]"']
        ) from None
    check_environment(os.environ)
    return Telemetry(config, clock, entropy)
