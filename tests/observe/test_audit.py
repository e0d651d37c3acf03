"""The audit trail: each event validates against the published schema; a full disk is counted and harms nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.audit_trail import lines_of, validator
from tests.helpers import FakeClock, FakeTimers
from zcproto.common.deadlines import DeadlineWheel
from zcproto.config.model import LogConfig
from zcproto.errors import ConfigError
from zcproto.observe.audit import MAX_AUDIT_LINE
from zcproto.observe.events import EVENTS, LogEvent
from zcproto.observe.log import (
    LogBatch,
    LogChange,
    audit_failures,
    audit_trail,
    configure_logging,
    flush_log,
    get_logger,
    lost_audit_lines,
    lost_lines,
    reopen_log,
)
from zcproto.observe.output import MAX_WAITING

log = get_logger("zcproto.test")
TOKEN = "A" * 43
AUDITED = [event for event in EVENTS.values() if event.audit]


@pytest.fixture
def trail(tmp_path: Path) -> Path:
    path = tmp_path / "audit"
    configure_logging(LogConfig(level="warning", file=tmp_path / "log", audit_file=path), clock=FakeClock())
    return path


def value_of(name: str) -> Any:
    """Return a value of the type that the schema has for a field."""
    kind = validator().schema["$defs"][name]["type"]
    return {"integer": 7, "number": 0.5, "boolean": True, "array": ["a"] * 40, "string": "é" * 300}[kind]


@pytest.mark.parametrize("event", AUDITED, ids=lambda event: event.name)
@pytest.mark.parametrize("has_values", [False, True])
def test_each_event_of_the_trail_validates_against_the_schema(
    trail: Path, event: LogEvent, has_values: bool
) -> None:
    values = {name: value_of(name) for name in event.fields} if has_values else {}
    getattr(log, event.level)(event.name, **values, unlisted="x")
    (line,) = lines_of(trail)
    assert list(line)[:3] == ["timestamp", "event", "outcome"]
    assert (line["event"], line["outcome"]) == (event.name, event.audit)
    assert set(line) == {"timestamp", "event", "outcome", *(event.fields if has_values else ())}


@pytest.mark.parametrize(
    "change",
    [{"event": "server.fault"}, {"outcome": "failure"}, {"colour": "red"}, {"user": 7}, {"timestamp": "now"}],
)
def test_schema_refuses_what_no_server_writes(trail: Path, change: dict[str, Any]) -> None:
    log.info("session.closed", user="ada")
    (line,) = lines_of(trail)
    assert not validator().is_valid({**line, **change})


def test_trail_has_its_events_whatever_the_level_of_the_log_is(trail: Path, tmp_path: Path) -> None:
    log.info("session.closed", session="s", user="ada")
    log.warning("operator.revoked", operator="eve")
    log.error("server.fault", what="x")
    log.debug("connection.opened", peer="192.0.2.1")
    assert [line["event"] for line in lines_of(trail)] == ["session.closed", "operator.revoked"]
    written = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert written == ["operator.revoked", "server.fault"]


def test_without_a_file_no_trail_is_written(tmp_path: Path) -> None:
    configure_logging(LogConfig(file=tmp_path / "log"))
    log.info("session.closed", user="ada")
    assert os.listdir(tmp_path) == ["log"]


def test_file_is_private(trail: Path) -> None:
    assert trail.stat().st_mode & 0o777 == 0o600


def test_events_of_strangers_are_limited_and_those_of_operators_are_not(trail: Path, tmp_path: Path) -> None:
    for _ in range(100):
        log.info("login.failed", peer="192.0.2.1")
        log.info("control.asked", what="users.add")
        log.error("config.refused", faults=["x"])
    names = [line["event"] for line in lines_of(trail)]
    assert names.count("login.failed") == 10
    assert names.count("control.asked") == 100
    assert names.count("config.refused") == 100
    assert (tmp_path / "log").read_text().count("config.refused") == 60


def test_suppressed_lines_are_counted_in_the_trail(tmp_path: Path) -> None:
    clock = FakeClock()
    configure_logging(LogConfig(file=tmp_path / "log", audit_file=tmp_path / "audit"), clock=clock)
    for _ in range(15):
        log.info("login.failed", peer="192.0.2.1")
    clock.advance(61)
    log.info("login.failed", peer="192.0.2.1")
    assert lines_of(tmp_path / "audit")[-1]["suppressed"] == 5


def test_values_are_masked_and_escaped_as_in_the_log(trail: Path) -> None:
    log.bind(user="ada").info("session.opened", client=f"x {TOKEN}\n\x7f", scheme="api_key")
    (line,) = lines_of(trail)
    assert TOKEN not in trail.read_text()
    assert trail.read_text().count("\n") == 1
    assert "\x7f" not in trail.read_text()
    assert line["user"] == "ada"


def test_too_long_line_keeps_who_and_from_where(trail: Path) -> None:
    ids = ["\U0001f600" * 256] * 16
    log.info("operator.revoked", operator="eve", peer="192.0.2.1", ids=ids, user="\u4e00" * 256, sessions=1)
    (line,) = lines_of(trail)
    assert line["oversize"] > MAX_AUDIT_LINE
    assert "ids" not in line
    assert (line["operator"], line["peer"], line["sessions"]) == ("eve", "192.0.2.1", 1)
    assert len(trail.read_text()) < MAX_AUDIT_LINE


def test_batch_is_one_write_with_the_times_of_its_events(
    trail: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    batch = LogBatch(log, DeadlineWheel(FakeTimers(clock.now())), clock)
    writes: list[int] = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(fd) or write(fd, data))
    for _ in range(3):
        batch.add("session.opened", {"user": "ada"})
        clock.advance(0.01)
    batch.write()
    assert len(writes) == 1
    assert len({line["timestamp"] for line in lines_of(trail)}) == 3


# --- a full disk, rotation, settings ------------------------------------------------------------------------


def test_full_disk_is_counted_and_never_raises(tmp_path: Path) -> None:
    configure_logging(LogConfig(file=tmp_path / "log", audit_file=Path("/dev/full")))
    log.info("control.asked", what="x")
    assert (audit_failures(), lost_audit_lines()) == (0, 0)
    flush_log()
    assert (audit_failures(), lost_audit_lines()) == (1, 0), "the line waits"
    for _ in range(MAX_WAITING // 100):
        log.info("control.asked", what="x" * 100)
    assert lost_audit_lines() > 0
    assert audit_failures() == 1 + lost_audit_lines()
    assert lost_lines() == 0
    configure_logging(LogConfig(file=tmp_path / "log", audit_file=tmp_path / "audit"))
    lost = lost_audit_lines()
    log.info("control.asked", what="x")
    lines = lines_of(tmp_path / "audit")
    assert [line["event"] for line in lines] == ["control.asked", "audit.lost"]
    assert lines[1]["lines"] == lost


def test_moved_trail_is_reopened_with_the_log(trail: Path, tmp_path: Path) -> None:
    log.info("control.asked", what="a")
    trail.rename(tmp_path / "audit.1")
    assert reopen_log()
    log.info("control.asked", what="b")
    assert [line["what"] for line in lines_of(tmp_path / "audit.1")] == ["a"]
    assert [line["what"] for line in lines_of(trail)] == ["b"]


def test_trail_that_cannot_be_reopened_stays_in_use(tmp_path: Path) -> None:
    folder = tmp_path / "trail"
    folder.mkdir()
    configure_logging(LogConfig(file=tmp_path / "log", audit_file=folder / "audit"))
    folder.rename(tmp_path / "gone")
    assert not reopen_log()
    log.info("control.asked", what="a")
    assert [line["what"] for line in lines_of(tmp_path / "gone" / "audit")] == ["a"]
    assert "log.audit_file" in (tmp_path / "log").read_text()


def test_trail_that_cannot_be_opened_names_the_setting_and_changes_nothing(tmp_path: Path) -> None:
    old = LogConfig(file=tmp_path / "log", audit_file=tmp_path / "audit")
    configure_logging(old)
    missing = LogConfig(file=tmp_path / "log", audit_file=tmp_path / "no" / "audit")
    for fails in (lambda: configure_logging(missing), lambda: LogChange(old, missing)):
        with pytest.raises(ConfigError, match=r"log\.audit_file = .*: cannot be opened: No such file"):
            fails()
    unreachable = LogConfig(file=tmp_path / "no" / "log", audit_file=tmp_path / "other")
    for fails in (lambda: configure_logging(unreachable), lambda: LogChange(old, unreachable)):
        with pytest.raises(ConfigError, match=r"log\.file = "):
            fails()
    log.info("control.asked", what="a")
    assert [line["what"] for line in lines_of(tmp_path / "audit")] == ["a"]


def test_reload_changes_adds_and_removes_the_trail(tmp_path: Path) -> None:
    none = LogConfig(file=tmp_path / "log")
    first = LogConfig(file=tmp_path / "log", audit_file=tmp_path / "first")
    second = LogConfig(file=tmp_path / "log", audit_file=tmp_path / "second")
    configure_logging(none)
    for old, new, what in (
        (none, first, "a"),
        (first, first, "b"),
        (first, second, "c"),
        (second, none, "d"),
    ):
        LogChange(old, new).apply()
        log.info("control.asked", what=what)
    LogChange(none, first).drop()
    log.info("control.asked", what="e")
    assert [line["what"] for line in lines_of(tmp_path / "first")] == ["a", "b"]
    assert [line["what"] for line in lines_of(tmp_path / "second")] == ["c"]


def test_trail_of_a_command_ends_with_it(trail: Path, tmp_path: Path) -> None:
    with audit_trail(LogConfig(audit_file=tmp_path / "other")):
        log.info("command.done", what="a")
    log.info("command.done", what="b")
    with audit_trail(LogConfig()):
        log.info("command.done", what="c")
    assert [line["what"] for line in lines_of(tmp_path / "other")] == ["a"]
    assert [line["what"] for line in lines_of(trail)] == ["b"]
