"""Fixtures of servers in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers import variables
from tests.limits import TIMEOUT
from tests.server.helpers import PATIENT
from tests.server.process import home_with
from zcproto.auth import UserFile


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give servers the longest timeouts, as `configuration` does. A test that waits for one sets it."""
    for name, value in variables(PATIENT).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", TIMEOUT)
    monkeypatch.setattr("zcproto.runtime.build.HEARTBEAT_S", TIMEOUT)  # after it, no token would be trusted


@pytest.fixture
def home(request: pytest.FixtureRequest, tmp_path: Path, certs: Path) -> Path:
    """Return a home with certificates, and with CONFIG of the test's module as its configuration."""
    return home_with(tmp_path, certs, getattr(request.module, "CONFIG", ""))


@pytest.fixture
def key(home: Path) -> str:
    """Return the key of ada, who is a user of this home."""
    return UserFile(home / "users.toml").add("ada").reveal()
