from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
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


class StandardInput:
    """The parent's end of this process's standard input."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.file = os.fdopen(reading, "rb", buffering=0)
        self._writing = os.fdopen(writing, "wb", buffering=0)

    def send(self, *lines: str) -> None:
        self._writing.write("".join(line + "\n" for line in lines).encode())

    def close(self) -> None:
        self._writing.close()


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandardInput]:
    made = StandardInput()
    monkeypatch.setattr(sys, "stdin", made.file)
    yield made
    made.close()
    made.file.close()
