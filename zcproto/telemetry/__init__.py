"""OpenTelemetry: spans of calls and methods, and what a server sends to a collector. It needs the extra "otel".

    trace_calls      middleware of a client: a span around each call and stream
    trace_handlers   middleware of a client: a span around each call of the server
    trace_requests   middleware of an application: a span around each call of its methods

    async with zcproto.connect("localhost", middleware=[trace_calls()]) as client:
        ...

A server that is configured by `[telemetry]` needs no `trace_requests`: `requests` follows its traces, `export`
sends them. Each name is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from zcproto.common.text import extra_cure

if TYPE_CHECKING:
    from zcproto.telemetry.spans import trace_calls, trace_handlers, trace_requests

__all__ = ["trace_calls", "trace_handlers", "trace_requests"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'zcproto.telemetry' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module("zcproto.telemetry.spans"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "opentelemetry":
            raise
        raise ModuleNotFoundError(
            f"opentelemetry is not installed; {extra_cure('otel')}", name=error.name
        ) from error
