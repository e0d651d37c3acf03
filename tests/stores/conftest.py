"""Fixtures of all stores."""

from __future__ import annotations

import pytest

from tests.limits import TIMEOUT
from zcproto.stores import pending
from zcproto.stores.sqlite import store as sqlite


@pytest.fixture(autouse=True)
def closes_completely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for the thread of a closed store, however busy the machine is: the next one uses its file."""
    for module in (pending, sqlite):
        monkeypatch.setattr(module, "CLOSE_TIMEOUT_S", TIMEOUT)
