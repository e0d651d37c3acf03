"""The limit of a test counts seconds of an idle machine, and also ends a test that catches its exception."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_timeout

from tests import limits


class Alarm:
    """Replaces the timer and its signal. `ring` is what the signal calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.happened: list[str] = []
        self.interval = 0.0
        self.ring: Callable[[], None] = pytest.fail

        def handle(number: int, handler: Any) -> None:
            self.ring = lambda: handler(number, None)

        def start(timer: int, first: float, interval: float = 0.0) -> None:
            self.interval = interval

        monkeypatch.setattr(signal, "signal", handle)
        monkeypatch.setattr(signal, "setitimer", start)
        monkeypatch.setattr(pytest_timeout, "timeout_sigalrm", lambda *_: self.happened.append("raised"))
        monkeypatch.setattr(limits, "end_process", lambda item: self.happened.append("ended"))

    def rings(self) -> int:
        """Return how often it rings until something happens."""
        before = len(self.happened)
        for count in range(1, 1_000):
            self.ring()
            if len(self.happened) > before:
                return count
        return 0


@pytest.fixture
def alarm(monkeypatch: pytest.MonkeyPatch) -> Alarm:
    return Alarm(monkeypatch)


@pytest.mark.parametrize(("load", "factor"), [(0.0, 1), (2.0, 1), (6.0, 3), (20.0, 10)])
def test_busy_machine_makes_the_limit_longer(
    alarm: Alarm, monkeypatch: pytest.MonkeyPatch, load: float, factor: int
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    item = SimpleNamespace()
    assert limits.pytest_timeout_set_timer(item, SimpleNamespace(method="signal", timeout=180.0))
    assert alarm.rings() * alarm.interval == 180.0 * factor
    assert alarm.happened == ["raised"]
    item.cancel_timeout()
    assert alarm.interval == 0.0


def test_test_that_catches_the_exception_is_ended_with_its_process(alarm: Alarm) -> None:
    limits.pytest_timeout_set_timer(SimpleNamespace(), SimpleNamespace(method="signal", timeout=1.0))
    assert alarm.rings() >= 1
    assert alarm.rings() >= limits.SWALLOWED_S
    assert alarm.happened == ["raised", "ended"]
