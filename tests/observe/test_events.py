"""Compare the catalogue of events with all log calls in the source, and test its limits.

The sources are parsed. A call such as `log.info("session.opened", user=user)` must have an entry with this level
and these fields in zcproto/observe/events.py, and each entry must have a call. Two tables name the calls that
cannot be read like this. HELPERS has functions that pass an event on: `log_event("session.opened", ...)` counts as
a call with the level and the fields that the function adds. INDIRECT has files that put a name together at run
time, as in `log.info(f"alert.{phase.value}")`, with every name that can result.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import FakeClock
from zcproto.alerts import Phase
from zcproto.certs.notices import NoticeKind
from zcproto.config.model import LogConfig
from zcproto.observe.events import EVENTS, FIELDS, LogEvent
from zcproto.observe.limits import MINUTE_S
from zcproto.observe.log import configure_logging, get_logger, report_suppressed
from zcproto.observe.values import loggable

ROOT = Path(__file__).resolve().parents[2]

LEVELS = ("debug", "info", "warning", "error")

HELPERS: dict[tuple[str, str], tuple[str, set[str]]] = {
    ("zcproto/server/protocol_methods.py", "log_event"): ("info", {"session", "user", "peer", "connection"}),
}
"""Functions, by file, that log the event passed as first argument: their level and added fields."""

INDIRECT: dict[str, tuple[str, list[str]]] = {
    "zcproto/server/protocol_methods.py": ("what the callers of `log_event` pass, which are read", []),
    "zcproto/certs/manager.py": (
        "the name is made of the kind of a notice",
        [f"certificate.{kind.value}" for kind in NoticeKind],
    ),
    "zcproto/auth/directory.py": (
        "the name begins with the kind of the file",
        [
            f"{file}.{what}"
            for file in ("users", "devices")
            for what in ("unreadable", "readable", "changed", "look_failed", "not_gone")
        ]
        + ["tokens.unreadable", "tokens.readable", "tokens.changed"],
    ),
    "zcproto/bus/connection.py": (
        "the name begins with what the connection is for",
        [f"{name}.{what}" for name in ("topics", "runs") for what in ("away", "back")],
    ),
    "zcproto/alerts/service.py": (
        "the name is that of a phase of an alert",
        [f"alert.{phase.value}" for phase in Phase],
    ),
    "zcproto/runtime/process_setup.py": (
        "the name is that of a risk which was found",
        ["server.traceable", "server.key_log_ignored", "server.runs_as_root"],
    ),
    "zcproto/runtime/store_setup.py": (
        "the name is that of a store's notice, such as store_damaged",
        ["store.damaged", "store.missing", "store.close_failed", "store.record_damaged"],
    ),
}
"""Files with log calls whose name or fields are not literals: the reason and the possible names. An unneeded entry
fails too."""

HOW_TO_ADD = "add it to zcproto/observe/events.py, and new fields to FIELDS; then: python -m docs.generate"


class Place(NamedTuple):
    """A log call. None where the source has no literal."""

    where: str
    name: str | None
    level: str | None
    fields: set[str]
    all_fields: bool


def places(path: str, source: str) -> Iterator[Place]:
    """Yield all log calls in a file."""
    if "logging.getLogger" in source:  # Python's own logging, for users of the library
        return
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = node.func
        called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        of = _last_name(function.value) if isinstance(function, ast.Attribute) else ""
        level: str | None
        added: set[str]
        if called in LEVELS and of in {"log", "_log", "logger"}:
            level, added = called, set()
        elif called == "add" and of == "log_soon":
            level, added = "info", set()
        elif (path, called) in HELPERS:
            level, added = HELPERS[path, called]
        elif (isinstance(function, ast.Call) and _last_name(function.func) == "getattr") or (
            called == "write" and isinstance(function, ast.Name) and path.endswith("certs/manager.py")
        ):
            level, added = None, set()
        else:
            continue
        first = node.args[0]
        name = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None
        given = {keyword.arg for keyword in node.keywords if keyword.arg is not None}
        unpacked = any(keyword.arg is None for keyword in node.keywords)
        yield Place(f"{path}:{node.lineno}", name, level, given | added, not unpacked)


def _last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def faults_of(place: Place, known: dict[str, LogEvent]) -> list[str]:
    """Return the problems of a log call."""
    path = place.where.partition(":")[0]
    if place.name is None or not place.all_fields:
        if path not in INDIRECT:
            return [
                f"{place.where} logs an event whose name or fields are not written out: write literals, or say in"
                " INDIRECT of this test why not, and which names there can be"
            ]
        if place.name is None:
            return []
    event = known.get(place.name)
    if event is None:
        return [f"{place.where} logs {place.name!r}, which is not in the catalogue: {HOW_TO_ADD}"]
    faults = []
    if place.level != event.level:
        faults.append(f"{place.where} logs {event.name} as {place.level}; the catalogue says {event.level}")
    unlisted = place.fields - set(event.fields)
    if unlisted:
        faults.append(
            f"{place.where} gives {event.name} fields that are not listed:"
            f" {', '.join(sorted(unlisted))}; {HOW_TO_ADD}"
        )
    return faults


def all_places() -> list[Place]:
    found = []
    for path in sorted((ROOT / "zcproto").rglob("*.py")):
        found += places(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    return found


def test_every_logged_event_matches_the_catalogue() -> None:
    faults = [fault for place in all_places() for fault in faults_of(place, EVENTS)]
    assert not faults, "\n" + "\n".join(faults)


def test_every_event_of_catalogue_is_logged() -> None:
    logged = {place.name for place in all_places()} | {
        name for _, names in INDIRECT.values() for name in names
    }
    logged.add("log.misnamed")  # replaces invalid names
    assert set(EVENTS) - logged == set(), "listed in zcproto/observe/events.py and never logged"
    assert logged - set(EVENTS) - {None} == set()


def test_every_listed_field_is_logged_somewhere() -> None:
    given: dict[str, set[str]] = {}
    indirect = {name for _, names in INDIRECT.values() for name in names}
    for place in all_places():
        if place.name is not None:
            given.setdefault(place.name, set()).update(place.fields)
            if not place.all_fields:
                indirect.add(place.name)
    never = {
        name: missing
        for name, fields in given.items()
        if name not in indirect and (missing := set(EVENTS[name].fields) - fields)
    }
    assert never == {}, "fields are listed in zcproto/observe/events.py that no place gives"


def test_every_indirect_exception_is_still_needed() -> None:
    indirect = {
        place.where.partition(":")[0] for place in all_places() if place.name is None or not place.all_fields
    }
    assert set(INDIRECT) - indirect == set()


def test_every_field_has_a_meaning_and_is_used() -> None:
    used = {field for event in EVENTS.values() for field in event.fields}
    used |= {"suppressed", "oversize", "exc_info_at", "traceback", "trace_id", "span_id"}  # added by the log
    assert used == set(FIELDS)


def test_no_field_name_is_masked_as_secret() -> None:
    assert [name for name in FIELDS if loggable(name, "x") != "x"] == []


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_events_follow_conventions_of_name_level_and_limit(event: LogEvent) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", event.name)
    assert event.level in LEVELS
    assert event.meaning.endswith(".")
    assert event.limit is not None or not event.by_peer, "what a peer can cause at will needs a limit"
    if event.limit is not None:
        assert set(event.limit.by) <= set(event.fields), "a line is limited by what it has"
        # Peers choose their keys, so a total limit is required.
        assert event.limit.total is not None or not event.limit.by


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ('log.info("no.such_event")', "not in the catalogue: add it to zcproto/observe/events.py"),
        ('self.log_soon.add("no.such_event")', "not in the catalogue"),
        ('self._log.warning("server.ended", cut_off=1)', "as warning; the catalogue says info"),
        ('log.info("server.ended", cut_off=1, colour=2)', "fields that are not listed: colour"),
        ("log.info(name)", "not written out"),
        ('log.info(f"server.{what}")', "not written out"),
        ('log.info("server.ended", **values)', "not written out"),
        ("getattr(log, level)(name)", "not written out"),
    ],
)
def test_log_call_outside_the_catalogue_is_reported_with_cure(source: str, message: str) -> None:
    (place,) = places("zcproto/x.py", source)
    (fault,) = faults_of(place, EVENTS)
    assert fault.startswith("zcproto/x.py:1 ")
    assert message in fault


@pytest.mark.parametrize(
    "source",
    [
        'log.info("server.ended", cut_off=1)',
        'log.error("listener.exhausted", reason="x")',
        'import logging\nlog = logging.getLogger("x")\nlog.info("anything")',
        "math.log(2.0)",
    ],
)
def test_log_call_matching_the_catalogue_is_accepted(source: str) -> None:
    assert [fault for place in places("zcproto/x.py", source) for fault in faults_of(place, EVENTS)] == []


# --- limits ------------------------------------------------------------------------------------------------------

LIMITED = [event for event in EVENTS.values() if event.limit is not None]
STRANGERS = 400
TRIES = 2


class LogHarness:
    """A log with a manual clock."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.clock = FakeClock()
        self.path = path
        self._read = 0
        configure_logging(LogConfig(level="debug", file=path, **settings), clock=self.clock)
        self.log = get_logger("zcproto.test")

    def write(self, event: LogEvent, key: str) -> None:
        values = dict.fromkeys(event.fields, key)
        getattr(self.log, event.level)(event.name, **values)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines written since the last call."""
        text = self.path.read_text()
        new, self._read = text[self._read :], len(text)
        return [json.loads(line) for line in new.splitlines()]


@pytest.mark.parametrize("event", LIMITED, ids=[event.name for event in LIMITED])
def test_flood_of_an_event_is_limited_and_suppressed_lines_are_reported(
    event: LogEvent, tmp_path: Path
) -> None:
    harness = LogHarness(tmp_path / "log")
    limit = event.limit
    assert limit is not None
    for _ in range(limit.lines + 7):
        harness.write(event, "192.0.2.1")
    assert len(harness.lines()) == limit.lines
    harness.clock.advance(MINUTE_S)
    harness.write(event, "192.0.2.1")
    (line,) = harness.lines()
    assert (line["event"], line["suppressed"]) == (event.name, 7)


@pytest.mark.parametrize("event", LIMITED, ids=[event.name for event in LIMITED])
def test_many_addresses_together_are_limited(event: LogEvent, tmp_path: Path) -> None:
    harness = LogHarness(tmp_path / "log")
    limit = event.limit
    assert limit is not None
    for number in range(STRANGERS):
        for _ in range(TRIES):
            harness.write(event, f"10.0.{number // 256}.{number % 256}")
    written = len(harness.lines())
    most = limit.total or limit.lines
    assert written == min(most, STRANGERS * min(TRIES, limit.lines))
    harness.clock.advance(MINUTE_S)
    report_suppressed()
    reports = harness.lines()
    assert sum(line["count"] for line in reports) == STRANGERS * TRIES - written
    assert len(reports) <= 1
    assert all((line["event"], line["of"]) == ("log.suppressed", event.name) for line in reports)
    report_suppressed()
    assert harness.lines() == []


def test_addresses_of_one_ipv6_site_share_a_limit(tmp_path: Path) -> None:
    harness = LogHarness(tmp_path / "log")
    for number in range(100):
        harness.log.info("login.failed", peer=f"2001:db8::{number:x}", scheme="api_key")
    assert len(harness.lines()) == 10


def test_bound_values_count_for_the_limit(tmp_path: Path) -> None:
    harness = LogHarness(tmp_path / "log")
    for peer in ("192.0.2.1", "192.0.2.2"):
        bound = harness.log.bind(peer=peer)
        for _ in range(20):
            bound.info("login.failed")
    assert len(harness.lines()) == 20


@pytest.mark.parametrize("peer", [None, 5, b"x", "y" * 1_000_000, ["z"]])
def test_unusual_key_is_limited(tmp_path: Path, peer: Any) -> None:
    harness = LogHarness(tmp_path / "log")
    for _ in range(50):
        harness.log.info("login.failed", peer=peer)
    assert len(harness.lines()) == 10


def test_event_of_disabled_level_does_not_use_the_limit(tmp_path: Path) -> None:
    harness = LogHarness(tmp_path / "log")
    configure_logging(LogConfig(level="warning", file=harness.path), clock=harness.clock)
    for _ in range(50):
        harness.log.info("login.failed", peer="192.0.2.1")
    configure_logging(LogConfig(level="info", file=harness.path), clock=harness.clock)
    harness.log.info("login.failed", peer="192.0.2.1")
    (line,) = harness.lines()
    assert "suppressed" not in line


def test_unlimited_event_is_always_written(tmp_path: Path) -> None:
    harness = LogHarness(tmp_path / "log")
    for _ in range(500):
        harness.log.info("user.gone", user="ada", sessions=1)
    assert len(harness.lines()) == 500
