"""Servers in memory that follow traces, as those do whose configuration says so."""

from __future__ import annotations

import pytest

from tests.limits import TIMEOUT
from zcproto.server.protocol import TracedProtocol
from zcproto.telemetry import export


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send everything at the end, as long as that takes."""
    monkeypatch.setattr(export, "DELAY_S", TIMEOUT)
    monkeypatch.setattr(export, "FLUSH_S", TIMEOUT)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", str(TIMEOUT))


@pytest.fixture(autouse=True)
def traced_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.testing.memory.ServerProtocol", TracedProtocol)
