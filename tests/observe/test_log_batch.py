"""Test batched log lines: all are written, in order, with the times of their events."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from tests.helpers import FakeClock, FakeTimers
from zcproto.common.deadlines import DeadlineWheel
from zcproto.config.model import LogConfig
from zcproto.observe.log import BATCH_DELAY, MAX_BATCH, LogBatch, configure_logging, get_logger, lost_lines


class LogHarness:
    def __init__(self, capsys: pytest.CaptureFixture[str], level: str = "info") -> None:
        self.clock = FakeClock()
        self.timers = FakeTimers(self.clock.now())
        self.batch = LogBatch(get_logger("test"), DeadlineWheel(self.timers), self.clock)
        self._capsys = capsys
        configure_logging(LogConfig(level=level, format="json"), clock=self.clock)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.timers.advance(seconds)

    def written(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self._capsys.readouterr().err.splitlines()]


@pytest.fixture
def harness(capsys: pytest.CaptureFixture[str]) -> LogHarness:
    return LogHarness(capsys)


def test_batched_lines_have_times_of_their_events(harness: LogHarness) -> None:
    harness.batch.add("session.opened", {"user": "ada"})
    harness.advance(BATCH_DELAY / 2)
    harness.batch.add("session.closed", {"user": "ada"})
    assert harness.written() == []
    harness.advance(BATCH_DELAY)
    first, second = harness.written()
    assert (first["event"], second["event"]) == ("session.opened", "session.closed")
    assert first["timestamp"] == "2026-01-01T00:00:00.000Z"
    assert second["timestamp"] == "2026-01-01T00:00:00.125Z"
    assert (first["user"], "_at" in first) == ("ada", False)


def test_next_line_starts_a_new_batch(harness: LogHarness) -> None:
    for _ in range(3):
        harness.batch.add("session.opened", {})
        assert harness.written() == []
        harness.advance(2 * BATCH_DELAY)
        assert len(harness.written()) == 1


def test_full_batch_is_written_at_once(harness: LogHarness) -> None:
    for number in range(MAX_BATCH + 1):
        harness.batch.add("session.opened", {"number": number, "user": f"user {number}"})
    assert [line["number"] for line in harness.written()] == list(range(MAX_BATCH))
    harness.advance(2 * BATCH_DELAY)
    assert [line["number"] for line in harness.written()] == [MAX_BATCH]


def test_waiting_lines_are_written_at_the_end(harness: LogHarness) -> None:
    harness.batch.add("session.opened", {})
    harness.batch.write()
    harness.batch.write()
    assert len(harness.written()) == 1


def test_disabled_level_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    harness = LogHarness(capsys, "warning")
    harness.batch.add("session.opened", {})
    harness.advance(2 * BATCH_DELAY)
    assert harness.written() == []


def test_batch_is_one_write(harness: LogHarness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    configure_logging(LogConfig(level="info", file=tmp_path / "log"), clock=harness.clock)
    writes: list[int] = []
    write = os.write

    def counted(descriptor: int, data: bytes) -> int:
        writes.append(bytes(data).count(b"\n"))
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", counted)
    for _ in range(3):
        harness.batch.add("session.opened", {})
    harness.batch.write()
    assert writes == [3]


def test_lost_batch_counts_each_line(
    harness: LogHarness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, "failed")

    configure_logging(LogConfig(level="info", file=tmp_path / "log"), clock=harness.clock)
    monkeypatch.setattr(os, "write", full)
    harness.batch.add("session.opened", {})
    harness.batch.add("session.closed", {})
    harness.batch.write()
    assert lost_lines() == 2
