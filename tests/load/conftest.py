from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from zcproto.load import generator


@pytest.fixture
def children() -> Callable[[], list[int]]:
    """Return a function that lists running child processes."""

    def alive() -> list[int]:
        return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]

    before = alive()
    return lambda: [pid for pid in alive() if pid not in before]


@pytest.fixture
def short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeouts of the generator."""
    monkeypatch.setattr(generator, "ANSWER_TIMEOUT", 1.0)
    monkeypatch.setattr(generator, "CLOSE_TIMEOUT", 3.0)
