from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.load.helpers import wait_long


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_long(monkeypatch)


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Return a function that lists running child processes."""

    def alive() -> list[int]:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]

    before = alive()
    return lambda: [pid for pid in alive() if pid not in before]
