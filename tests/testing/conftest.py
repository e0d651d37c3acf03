"""Fixtures: time that only a test moves."""

from __future__ import annotations

import pytest

from tests.helpers import FakeClock
from zcproto.common.clock import system_clock


@pytest.fixture
def stopped_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only `advance` move a MovableClock, so that a busy machine adds nothing."""
    monkeypatch.setattr(
        "zcproto.testing.memory.system_clock", FakeClock(system_clock.wall(), system_clock.now())
    )
