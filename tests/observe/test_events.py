"""The catalogue of events is the truth: all places that log are read from the source and held against it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import FakeClock
from zcproto.certs.maintainer import NoticeKind
from zcproto.config import LogConfig
from zcproto.observe.events import EVENTS, FIELDS, Event
from zcproto.observe.log import configure_logging, get_logger, tell_suppressed
from zcproto.observe.rate import WINDOW_S
from zcproto.observe.values import loggable

ROOT = Path(__file__).resolve().parents[2]

LEVELS = ("debug", "info", "warning", "error")

HELPERS: dict[tuple[str, str], tuple[str, set[str]]] = {
    ("zcproto/server/protocol_methods.py", "told"): ("info", {"session", "user", "peer", "connection"}),
}
"""Functions, by file, that log the event which they are given first: their level, and the fields that they add."""

INDIRECT: dict[str, tuple[str, list[str]]] = {
    "zcproto/observe/log_batch.py": ("what its callers give `add`, which are read", []),
    "zcproto/server/protocol_methods.py": ("what the callers of `told` give it, which are read", []),
    "zcproto/certs/keeper.py": (
        "the name is made of the kind of a notice",
        [f"certificate.{kind.value}" for kind in NoticeKind],
    ),
    "zcproto/alerts/service.py": ("the fields are those of an alert, in one place", []),
    "zcproto/runtime/run.py": (
        "the name is that of a risk which was found",
        ["server.traceable", "server.key_log_ignored", "server.runs_as_root"],
    ),
    "zcproto/runtime/store_setup.py": (
        "the name is that of a store's notice, such as store_damaged",
        ["store.damaged", "store.missing", "store.close_failed"],
    ),
}
"""Files in which a name, or fields, are not written out: the reason, and the names that there can be. A file with
no such place any more is a fault, too. Anywhere else names and fields are literals."""

HOW_TO_ADD = (
    "add it to zcproto/observe/events.py, by _event(name, level, meaning, fields, limit, by_peer=...), and what is"
    " new to FIELDS; then: python -m docs.generate"
)


class Place(NamedTuple):
    """A place that logs. None where the source does not say it."""

    where: str
    name: str | None
    level: str | None
    fields: set[str]
    all_fields: bool


def places(path: str, source: str) -> Iterator[Place]:
    """All places in a file that log an event."""
    if "logging.getLogger" in source:  # the logger of Python, for users of the library
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
            called == "write" and isinstance(function, ast.Name) and path.endswith("certs/keeper.py")
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


def faults_of(place: Place, known: dict[str, Event]) -> list[str]:
    """What is wrong at a place."""
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


def test_every_event_that_is_logged_is_in_the_catalogue_as_it_is() -> None:
    faults = [fault for place in all_places() for fault in faults_of(place, EVENTS)]
    assert not faults, "\n" + "\n".join(faults)


def test_every_event_of_the_catalogue_is_logged() -> None:
    logged = {place.name for place in all_places()} | {
        name for _, names in INDIRECT.values() for name in names
    }
    logged.add("log.misnamed")  # what any other text becomes
    assert set(EVENTS) - logged == set(), "listed in zcproto/observe/events.py and never logged"
    assert logged - set(EVENTS) - {None} == set()


def test_every_field_that_is_listed_is_given_somewhere() -> None:
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


def test_every_reason_for_a_name_that_is_not_written_out_is_still_needed() -> None:
    indirect = {
        place.where.partition(":")[0] for place in all_places() if place.name is None or not place.all_fields
    }
    assert set(INDIRECT) - indirect == set()


def test_every_field_has_its_meaning_and_every_meaning_a_field() -> None:
    used = {field for event in EVENTS.values() for field in event.fields}
    used |= {"suppressed", "oversize", "exc_info_at"}  # the log adds them itself
    assert used == set(FIELDS)


def test_no_field_is_one_that_is_masked_by_its_name() -> None:
    assert [name for name in FIELDS if loggable(name, "x") != "x"] == []


@pytest.mark.parametrize("event", EVENTS.values(), ids=list(EVENTS))
def test_an_event_is_named_levelled_and_limited_as_all(event: Event) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z][a-z0-9_]*)+", event.name)
    assert event.level in LEVELS
    assert event.meaning.endswith(".")
    assert event.limit is not None or not event.by_peer, "what a peer can cause at will needs a limit"
    if event.limit is not None:
        assert set(event.limit.by) <= set(event.fields), "a line is limited by what it has"
        # Peers choose what they are limited by, so that there is a limit for all of them, too.
        assert event.limit.total is not None or not event.limit.by


@pytest.mark.parametrize(
    ("source", "said"),
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
def test_a_place_that_logs_otherwise_is_found_and_told_what_to_do(source: str, said: str) -> None:
    (place,) = places("zcproto/x.py", source)
    (fault,) = faults_of(place, EVENTS)
    assert fault.startswith("zcproto/x.py:1 ")
    assert said in fault


@pytest.mark.parametrize(
    "source",
    [
        'log.info("server.ended", cut_off=1)',
        'log.error("listener.exhausted", reason="x")',
        'import logging\nlog = logging.getLogger("x")\nlog.info("anything")',
        "math.log(2.0)",
    ],
)
def test_a_place_that_logs_as_the_catalogue_says_is_good(source: str) -> None:
    assert [fault for place in places("zcproto/x.py", source) for fault in faults_of(place, EVENTS)] == []


# --- limits ------------------------------------------------------------------------------------------------------

LIMITED = [event for event in EVENTS.values() if event.limit is not None]
STRANGERS = 400
TRIES = 2


class Desk:
    """A log whose clock is turned by hand."""

    def __init__(self, path: Path, **settings: Any) -> None:
        self.clock = FakeClock()
        self.path = path
        self._read = 0
        configure_logging(LogConfig(level="debug", file=path, **settings), clock=self.clock)
        self.log = get_logger("zcproto.test")

    def write(self, event: Event, key: str) -> None:
        values = dict.fromkeys(event.fields, key)
        getattr(self.log, event.level)(event.name, **values)

    def lines(self) -> list[dict[str, Any]]:
        """What was written since this was last called."""
        text = self.path.read_text()
        new, self._read = text[self._read :], len(text)
        return [json.loads(line) for line in new.splitlines()]


@pytest.mark.parametrize("event", LIMITED, ids=[event.name for event in LIMITED])
def test_a_flood_of_an_event_is_bounded_and_what_was_left_out_is_told(event: Event, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    limit = event.limit
    assert limit is not None
    for _ in range(limit.lines + 7):
        desk.write(event, "192.0.2.1")
    assert len(desk.lines()) == limit.lines
    desk.clock.advance(WINDOW_S)
    desk.write(event, "192.0.2.1")
    (line,) = desk.lines()
    assert (line["event"], line["suppressed"]) == (event.name, 7)


@pytest.mark.parametrize("event", LIMITED, ids=[event.name for event in LIMITED])
def test_many_strangers_get_no_more_lines_than_all_may_have(event: Event, tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    limit = event.limit
    assert limit is not None
    for number in range(STRANGERS):
        for _ in range(TRIES):
            desk.write(event, f"10.0.{number // 256}.{number % 256}")
    written = len(desk.lines())
    most = limit.total or limit.lines
    assert written == min(most, STRANGERS * min(TRIES, limit.lines))
    desk.clock.advance(WINDOW_S)
    tell_suppressed()
    told = desk.lines()
    assert sum(line["count"] for line in told) == STRANGERS * TRIES - written
    assert len(told) <= 1
    assert all((line["event"], line["of"]) == ("log.suppressed", event.name) for line in told)
    tell_suppressed()
    assert desk.lines() == []


def test_addresses_of_one_ipv6_site_are_one(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    for number in range(100):
        desk.log.info("login.failed", peer=f"2001:db8::{number:x}", scheme="api_key")
    assert len(desk.lines()) == 10


def test_values_that_are_bound_count_as_given(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    for peer in ("192.0.2.1", "192.0.2.2"):
        bound = desk.log.bind(peer=peer)
        for _ in range(20):
            bound.info("login.failed")
    assert len(desk.lines()) == 20


@pytest.mark.parametrize("peer", [None, 5, b"x", "y" * 1_000_000, ["z"]])
def test_a_strange_key_is_limited_as_any(tmp_path: Path, peer: Any) -> None:
    desk = Desk(tmp_path / "log")
    for _ in range(50):
        desk.log.info("login.failed", peer=peer)
    assert len(desk.lines()) == 10


def test_an_event_of_a_level_that_is_off_uses_up_nothing(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    configure_logging(LogConfig(level="warning", file=desk.path), clock=desk.clock)
    for _ in range(50):
        desk.log.info("login.failed", peer="192.0.2.1")
    configure_logging(LogConfig(level="info", file=desk.path), clock=desk.clock)
    desk.log.info("login.failed", peer="192.0.2.1")
    (line,) = desk.lines()
    assert "suppressed" not in line


def test_what_is_not_limited_is_written_each_time(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "log")
    for _ in range(500):
        desk.log.info("user.gone", user="ada", sessions=1)
    assert len(desk.lines()) == 500
