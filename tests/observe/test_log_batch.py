"""Lines that wait for others: all are written, in their order, with the time of their events."""

from __future__ import annotations

import json

import pytest

from tests.helpers import FakeClock, FakeTimers
from zcproto.common.deadlines import DeadlineWheel
from zcproto.config.model import LogConfig
from zcproto.observe.log import configure_logging, get_logger
from zcproto.observe.log_batch import DELAY, MAX_LINES, LogBatch


class Desk:
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
def desk(capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(capsys)


def test_lines_are_written_together_with_the_times_of_their_events(desk: Desk) -> None:
    desk.batch.add("session.opened", user="ada")
    desk.advance(DELAY / 2)
    desk.batch.add("session.closed", user="ada")
    assert desk.written() == []
    desk.advance(DELAY)
    first, second = desk.written()
    assert (first["event"], second["event"]) == ("session.opened", "session.closed")
    assert first["timestamp"] == "2026-01-01T00:00:00.000Z"
    assert second["timestamp"] == "2026-01-01T00:00:00.125Z"
    assert (first["user"], "_at" in first) == ("ada", False)


def test_the_next_line_waits_anew(desk: Desk) -> None:
    for _ in range(3):
        desk.batch.add("session.opened")
        assert desk.written() == []
        desk.advance(2 * DELAY)
        assert len(desk.written()) == 1


def test_many_lines_do_not_wait(desk: Desk) -> None:
    for number in range(MAX_LINES + 1):
        desk.batch.add("session.opened", number=number, user=f"user {number}")
    assert [line["number"] for line in desk.written()] == list(range(MAX_LINES))
    desk.advance(2 * DELAY)
    assert [line["number"] for line in desk.written()] == [MAX_LINES]


def test_what_waits_is_written_at_the_end(desk: Desk) -> None:
    desk.batch.add("session.opened")
    desk.batch.write()
    desk.batch.write()
    assert len(desk.written()) == 1


def test_a_level_that_is_off_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    desk = Desk(capsys, "warning")
    desk.batch.add("session.opened")
    desk.advance(2 * DELAY)
    assert desk.written() == []
