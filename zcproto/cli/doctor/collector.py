"""Check the collector of `[telemetry]`, as a server uses it: the extra is installed, and each signal is taken."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from zcproto.cli.doctor.finding import FAULT, OK, WARNING, Result, from_message
from zcproto.common.home import Home
from zcproto.config import Config
from zcproto.errors import ConfigError


def check(config: Config, home: Home) -> Iterator[Result]:
    """Send an empty message of each signal."""
    telemetry = config.telemetry
    signals = [each for each in ("traces", "metrics", "logs") if getattr(telemetry, each)]
    if not signals:
        return
    if importlib.util.find_spec("opentelemetry") is None:
        yield FAULT, "OpenTelemetry is not installed", 'run: pip install "zcproto[otel]"'
        return
    from zcproto.telemetry.export import check_environment, try_collector  # noqa: PLC0415 - of an extra

    try:
        check_environment(os.environ)
        for signal, reason in try_collector(telemetry, signals):
            if reason:
                cure = "check telemetry.endpoint and the collector; the server runs on without it"
                yield WARNING, f"{signal}: {reason}", cure
            else:
                yield OK, f"{signal}: the collector takes them"
    except ConfigError as error:
        for state, found, *cures in map(from_message, error.faults):
            yield state, found, cures[0] or "check the file that it names"
