"""Fixtures of servers in processes of their own."""

from __future__ import annotations

import pytest

from tests.helpers import variables
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give servers the longest timeouts, as `configuration` does. A test that waits for one sets it."""
    for name, value in variables(PATIENT).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", TIMEOUT)
    monkeypatch.setattr("zcproto.runtime.build.HEARTBEAT_S", TIMEOUT)  # after it, no token would be trusted
