"""Servers in memory that follow traces, as those do whose configuration says so."""

from __future__ import annotations

import pytest

from zcproto.server.protocol import TracedProtocol


@pytest.fixture(autouse=True)
def traced_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.testing.memory.ServerProtocol", TracedProtocol)
