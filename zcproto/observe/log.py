"""Write the log: one line per fact, as JSON for machines or as text for people.

Rules:
- An event is a fixed dotted name of the catalogue (`events`); `values` decides how its values are written.
- No value can begin a new line or move a cursor. As text, a traceback follows its line, indented.
- The limits of the catalogue apply to every caller.
- A disabled level costs one comparison.
- A line for systemd's journal begins with its priority.
- A line that cannot be written is counted; logging never waits and never raises (`output`).
- With a file for the audit trail, events of the trail are written there too (`audit`), whatever the level of the
  log. The limits drop only what a peer can cause at will.

Must not know: sessions, connections, the event loop.

Until `configure_logging` is called, as in a program that only uses the client, warnings and errors go to standard
error.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, MutableMapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from zcproto.common.clock import MS_PER_SECOND, Clock, system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.exceptions import message_of, summary, traceback_lines
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.observe.audit import audit_line
from zcproto.observe.events import EVENTS, LogEvent
from zcproto.observe.limits import EventLimits
from zcproto.observe.output import LogFile, Output, StandardError
from zcproto.observe.values import (
    TOKEN_LENGTH,
    Loggable,
    cut,
    is_secret_name,
    line_within,
    loggable,
    places,
)

if TYPE_CHECKING:
    from zcproto.config.model import LogConfig

MAX_LINE = 16_384
"""Maximum characters of a line; a longer one lacks its longest values. Log shippers commonly cut there."""

MAX_PLAIN_VALUES = 32
"""Maximum values of a line formatted in one step: more than any event has, and too few to exceed MAX_LINE."""

BATCH_DELAY = 0.25
"""Maximum delay of a line in seconds: unnoticeable for readers, and long enough to batch about a hundred logins."""

MAX_BATCH = 128
"""Lines that trigger writing at once, about two milliseconds of the loop."""

AUDIT_KEY = "log.audit_file"

TRACE_ATTRIBUTE = "_zcproto_trace"
"""Attribute of an exception: the ids of the trace and of the span through which it has passed, if any."""

_TRACEBACK = "traceback"
_AT = "_at"
"""Name of a value with the time of an event, in milliseconds since the Unix epoch; without it the time is now."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_PRIORITIES = {"debug": "<7>", "info": "<6>", "warning": "<4>", "error": "<3>"}
"""What systemd's journal reads as the priority of a line (sd-daemon(3))."""

_encode = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` makes an encoder per line
_EVENT = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_OWN_NAMES = frozenset({"timestamp", "level", "event", "text"})
_TEXT_ALONE = frozenset({str})
_BARE = re.compile(r"[A-Za-z0-9_.:/@+()\[\]-]+")


TraceIds = Callable[[Collection[Any]], dict[str, str]]
"""Returns the ids that apply to a line with these values, by their names."""

Copy = Callable[[str, int, dict[str, Any]], None]
"""Gets the level of a line, its milliseconds since the Unix epoch, and its loggable fields. It must not log."""


class Logger:
    """Write events. `bind(name=value)` returns a logger that adds these values to each of its events."""

    def __init__(
        self, write: Callable[[str], object], write_audit: Callable[[str], object], context: dict[str, Any]
    ) -> None:
        self._write = write
        self._write_audit = write_audit
        self._context = context

    def bind(self, **values: Any) -> Logger:
        return Logger(self._write, self._write_audit, {**self._context, **values})

    def debug(self, event: str, **values: Any) -> None:
        self._log(logging.DEBUG, "debug", event, values)

    def info(self, event: str, **values: Any) -> None:
        self._log(logging.INFO, "info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._log(logging.WARNING, "warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """Log an error. An exception among the values is written as `log.exceptions` says."""
        self._log(logging.ERROR, "error", event, values)

    def _log(self, level: int, method: str, event: str, values: dict[str, Any]) -> None:
        state = _state
        is_written = level >= state.level
        if not is_written and state.audit is None:
            return
        try:
            known = EVENTS.get(event) or (None if _EVENT.fullmatch(event) else EVENTS["log.misnamed"])
            audited = state.audit is not None and known is not None and known.audit != ""
            if not (is_written or audited):
                return
            suppressed: int | None = 0
            if known is not None and known.limit is not None:
                suppressed = state.limits.admit(known, values, self._context, state.clock.now())
                if suppressed is None and not (audited and not known.by_peer):
                    return
                if suppressed:
                    values["suppressed"] = suppressed
            shown = {**self._context, **values, **state.process}
            if audited:
                assert known is not None
                self._write_audit(_audit_line(known, shown))
            if is_written and suppressed is not None:
                if state.trace_ids is not None and _AT not in values:  # a line of now
                    shown |= state.trace_ids(values.values())
                if state.copy is not None:
                    _send_copy(state.copy, method, event, shown)
                self._write(_line(method, event, shown))
        except Exception:  # a failure in logging, such as a broken __str__, must not reach the caller
            state.lose(1)


def get_logger(name: str) -> Logger:
    """Return the logger of a part of the program, named after its module."""
    return Logger(_write_line, _write_audit, {"logger": name})


def configure_logging(log: LogConfig, *, clock: Clock = system_clock, processes: int = 1) -> None:
    """Set level, format and destination of the log for the process. Called again, it reopens the file.

    `processes` is how many write to the same log, which share its limits. Raises ConfigError if the file cannot be
    opened; then nothing changes.
    """
    audit = _audit_file(log)
    try:
        output = StandardError() if log.file is None else LogFile(log.file)
    except ConfigError:
        if audit is not None:
            audit.close()
        raise
    _state.replace_output(output)
    _state.replace_audit(audit)
    _state.level = _LEVELS[log.level]
    _state.format = log.format
    _state.exceptions = log.exceptions
    _state.clock = clock
    if processes > 1:
        _state.limits = EventLimits(processes)
    _state.is_configured = True


@contextmanager
def audit_trail(log: LogConfig) -> Iterator[None]:
    """Write the audit trail meanwhile, in a process that has no log of its own, such as a command.

    Raises ConfigError if the file cannot be opened.
    """
    before, _state.audit = _state.audit, _audit_file(log)
    try:
        yield
    finally:
        if _state.audit is not None:
            _state.lose_audit(_state.audit.finish())
            _state.lose_audit(_state.audit.close())
        _state.audit = before


def _audit_file(log: LogConfig) -> LogFile | None:
    return None if log.audit_file is None else LogFile(log.audit_file, AUDIT_KEY)


def name_process(name: str) -> None:
    """Add `worker` to every line of this process: the name of a process among those of its server."""
    _state.process = {"worker": name}


def add_trace_ids(trace_ids: TraceIds | None) -> None:
    """Add the `trace_id` and `span_id` that a function returns to each line; with None nothing any more."""
    _state.trace_ids = trace_ids


def copy_lines(copy: Copy | None) -> None:
    """Pass each line that is written to a function, too; with None no more."""
    _state.copy = copy


def is_configured() -> bool:
    """Return whether `configure_logging` has been called in this process."""
    return _state.is_configured


class LogChange:
    """Prepared new settings of the log: everything that can fail has been done.

    Call either `apply` or `drop`, once.
    """

    def __init__(self, old: LogConfig, new: LogConfig) -> None:
        """Raises ConfigError if a file cannot be opened."""
        self._output: Output | None = None
        self._audit: LogFile | None = None
        self._has_audit = new.audit_file != old.audit_file
        if self._has_audit:
            self._audit = _audit_file(new)
        try:
            if new.file != old.file:
                self._output = StandardError() if new.file is None else LogFile(new.file)
        except ConfigError:
            self.drop()
            raise
        self._new = new
        self._level = new.level if new.level != old.level else None

    def apply(self) -> None:
        """Apply the settings. An unchanged level keeps the one set by `set_level`."""
        if self._output is not None:
            _state.replace_output(self._output)
        if self._has_audit:
            _state.replace_audit(self._audit)
        _state.format = self._new.format
        _state.exceptions = self._new.exceptions
        if self._level is not None:
            set_level(self._level)

    def drop(self) -> None:
        """Close the prepared files without applying the settings."""
        for output in (self._output, self._audit):
            if output is not None:
                output.close()


def set_level(level: str) -> None:
    """Set the lowest level (debug, info, warning, error) that is written. Raises ConfigError for any other."""
    if level not in _LEVELS:
        raise ConfigError([f"unknown log level {cut(level)!r}; use {', '.join(_LEVELS)}"])
    old, _state.level = _state.level, min(_LEVELS[level], logging.INFO)
    if old != _LEVELS[level]:
        _log.info("log.level_changed", new_level=level)  # written even if the new level is higher
    _state.level = _LEVELS[level]


def level() -> str:
    """Return the current level."""
    return next(name for name, number in _LEVELS.items() if number == _state.level)


def is_on(level: str) -> bool:
    """Return True if events of this level are written, to avoid preparing expensive values."""
    return _LEVELS[level] >= _state.level


def reopen_log() -> bool:
    """Reopen log and audit trail after rotation. Return False, and log it, if that fails; an old file stays in use.

    Does nothing for standard error.
    """
    reopened = _reopen(_state.output, _state.replace_output)
    return _reopen(_state.audit, _state.replace_audit) and reopened


def _reopen(old: Output | None, replace: Callable[[LogFile], object]) -> bool:
    if not isinstance(old, LogFile):
        return True
    try:
        replace(LogFile(old.path, old.key))
    except ConfigError as error:
        _log.error("log.not_reopened", faults=error.faults)
        return False
    _log.info("log.reopened", path=old.path)
    return True


def flush_log() -> None:
    """Write waiting lines as far as possible without blocking."""
    _state.lose(_state.output.flush())
    audit = _state.audit
    if audit is not None and audit.waiting:
        _state.lose_audit(audit.flush())
        _state.audit_failures += bool(audit.waiting)


def finish_log() -> None:
    """Write waiting lines at the end of a process, within a second for each of log and audit trail."""
    _state.lose(_state.output.finish())
    if _state.audit is not None:
        _state.lose_audit(_state.audit.finish())


def report_suppressed() -> None:
    """Log the number of suppressed lines that no later line has reported. Call it once a minute."""
    for event, lines, keys in _state.limits.expired(_state.clock.now()):
        _log.info("log.suppressed", of=event, count=lines, keys=keys)


def lost_lines() -> int:
    """Return the number of lines lost since the start of the process."""
    return _state.lost


def lost_audit_lines() -> int:
    """Return the number of lines of the audit trail lost since the start of the process."""
    return _state.audit_lost


def audit_failures() -> int:
    """Return the lines of the audit trail that were lost, and how often lines that waited could not be written."""
    return _state.audit_lost + _state.audit_failures


class _LogState:
    """The settings of `configure_logging`, one per process."""

    def __init__(self) -> None:
        self.is_configured = False
        self.process: dict[str, str] = {}
        self.trace_ids: TraceIds | None = None
        self.copy: Copy | None = None
        self.level = logging.WARNING
        self.output: Output = StandardError()
        self.audit: LogFile | None = None
        self.format = "auto"
        self.exceptions = "full"
        self.clock: Clock = system_clock
        self.limits = EventLimits()
        self.lost = 0
        self.lost_unreported = 0
        self.audit_lost = 0
        self.audit_lost_unreported = 0
        self.audit_failures = 0

    def write(self, lines: str) -> None:
        try:
            lost = self.output.write(lines)
        except Exception:  # a stream in place of standard error may raise anything
            lost = lines.count("\n")
        self.lose(lost)
        if not lost and self.lost_unreported and not self.output.waiting:
            count, self.lost_unreported = self.lost_unreported, 0
            _log.error("log.lost", lines=count)

    def replace_output(self, output: Output) -> None:
        old, self.output = self.output, output
        self.lose(old.flush() + old.close())

    def replace_audit(self, audit: LogFile | None) -> None:
        old, self.audit = self.audit, audit
        if old is not None:
            self.lose_audit(old.flush() + old.close())

    def write_audit(self, lines: str) -> None:
        if self.audit is None:  # replaced by another thread
            return
        lost = self.audit.write(lines)
        self.lose_audit(lost)
        if not lost and self.audit_lost_unreported and not self.audit.waiting:
            count, self.audit_lost_unreported = self.audit_lost_unreported, 0
            _log.error("audit.lost", lines=count)

    def lose(self, lines: int) -> None:
        self.lost += lines
        self.lost_unreported += lines

    def lose_audit(self, lines: int) -> None:
        self.audit_lost += lines
        self.audit_lost_unreported += lines


_state = _LogState()


def _write_line(line: str) -> None:
    _state.write(line)


def _write_audit(line: str) -> None:
    _state.write_audit(line)


class LogBatch:
    """Batch the lines of routine events of one loop.

    When 10,000 clients connect, each opens a session and gets a line. A single line costs four times as much as one
    in a batch, because its code and data are cold. Lines carry the time of their event, not of writing. Do not use
    this for events that need attention.
    """

    def __init__(self, log: Logger, wheel: DeadlineWheel, clock: Clock) -> None:
        self._log = log
        self._wheel = wheel
        self._clock = clock
        self._lines: list[tuple[str, dict[str, Any]]] = []
        self.deadline_tick = 0

    def add(self, event: str, values: dict[str, Any]) -> None:
        """Queue a line at the level info. The values are the batch's from then on."""
        values[_AT] = self._clock.wall()
        lines = self._lines
        lines.append((event, values))
        if len(lines) == 1:
            self._wheel.set(self, self._wheel.now() + BATCH_DELAY)
        elif len(lines) >= MAX_BATCH:
            self.write()

    def write(self) -> None:
        """Write the waiting lines."""
        self._wheel.discard(self)
        lines, self._lines = self._lines, []
        if lines:
            written: list[str] = []
            audited: list[str] = []
            logger = Logger(written.append, audited.append, self._log._context)
            for event, values in lines:
                logger._log(logging.INFO, "info", event, values)
            _state.write("".join(written))
            if audited:
                _state.write_audit("".join(audited))

    def handle_deadline(self, now: float) -> None:
        self.write()


def _audit_line(event: LogEvent, values: dict[str, Any]) -> str:
    wall = values.get(_AT)
    return audit_line(event, _timestamp(_state.clock.wall() if wall is None else wall), values)


def _line(method: str, event: str, values: dict[str, Any]) -> str:
    wall = values.pop(_AT, None)
    timestamp = _timestamp(_state.clock.wall() if wall is None else wall)
    as_text = _state.format == "console" or (_state.format == "auto" and _state.output.is_terminal())
    line = None
    if not as_text and _are_plain(values.values()):  # most lines of a busy server
        form = _json_form(method, event, tuple(values))
        line = None if form is None else form % (timestamp, *values.values())
    if line is None:
        line = _render(_prepare(method, event, timestamp, values), as_text)
    if _state.output.is_journal():
        line = re.sub("^(?=.)", _PRIORITIES[method], line, flags=re.MULTILINE)
    return line


def _send_copy(copy: Copy, method: str, event: str, shown: dict[str, Any]) -> None:
    values = dict(shown)
    wall = values.pop(_AT, None)
    if wall is None:
        wall = _state.clock.wall()
    copy(method, wall, _prepare(method, event, _timestamp(wall), values))


def _are_plain(values: Collection[Any]) -> bool:
    """Return True if all values are strings that need no escaping or masking in JSON."""
    if {*map(type, values)} != _TEXT_ALONE or max(map(len, values)) >= TOKEN_LENGTH:
        return False
    text = "".join(values)
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


@lru_cache(maxsize=256)
def _json_form(method: str, event: str, names: tuple[str, ...]) -> str | None:
    """Return a format string for lines of plain values, equal to `_prepare` and `_render`; None if not possible."""
    if len(names) > MAX_PLAIN_VALUES or not (event in EVENTS or _EVENT.fullmatch(event)):
        return None
    if any(is_secret_name(name) or name in _OWN_NAMES for name in names):
        return None
    fields = {"timestamp": "%s", "level": method, "event": event, **dict.fromkeys(names, "%s")}
    pairs = [f"{_encode(name).replace('%', '%%')}:{_encode(value)}" for name, value in fields.items()]
    return "{" + ",".join(pairs) + "}\n"


def _prepare(method: str, event: str, timestamp: str, values: dict[str, Any]) -> dict[str, Loggable]:
    """Return the fields of a line in order, each loggable."""
    fields: dict[str, Loggable] = {"timestamp": timestamp, "level": method}
    if event in EVENTS or _EVENT.fullmatch(event):
        fields["event"] = event
    else:
        # A bug, or text from outside in the wrong place: do not use it as a name.
        fields |= {"event": "log.misnamed", "text": cut(event)}
    for name, value in values.items():
        if value is None:
            continue
        fields[f"{name}_" if name in fields else name] = loggable(name, value)
        if method == "error" and isinstance(value, BaseException):
            fields |= _exception(event, name, value, values.get("what"))
    return fields


def _exception(event: str, name: str, error: BaseException, what: object) -> dict[str, Loggable]:
    """Return the fields of an exception: its message and traceback, or its frames alone."""
    if _state.exceptions == "full" and _state.limits.admit_traceback(event, what, error, _state.clock.now()):
        return {name: cut(summary(error)), _TRACEBACK: [*traceback_lines(error)]}
    return {f"{name}_at": places(error)}


def shown_message(error: BaseException) -> str:
    """Return the message of an exception, masked; empty if `log.exceptions` is "frames"."""
    return message_of(error) if _state.exceptions == "full" else ""


def shown_stack(error: BaseException) -> str:
    """Return the stack of an exception as `log.exceptions` says."""
    lines = traceback_lines(error) if _state.exceptions == "full" else map(str, places(error))
    return "\n".join(lines)


def _timestamp(wall: int) -> str:
    return _second(wall // MS_PER_SECOND) % (wall % MS_PER_SECOND)


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    """Return a format string for the timestamps of a second, which takes their milliseconds."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.%03dZ"


def _render(fields: dict[str, Loggable], as_text: bool) -> str:
    return f"{line_within(MAX_LINE, fields, _as_text if as_text else _as_json)}\n"


def _as_json(fields: MutableMapping[str, Any]) -> str:
    # The encoder escapes non-ASCII and control characters except DEL.
    return _encode(fields).replace("\x7f", "\\u007f")


def _as_text(fields: MutableMapping[str, Any]) -> str:
    head = f"{fields['timestamp']} {fields['level']:7} {fields['event']}"
    values = [f"{name}={_value_as_text(fields[name])}" for name in list(fields)[3:] if name != _TRACEBACK]
    line = " ".join([head, *map(escape_text, values)])
    return "\n    ".join([line, *map(escape_text, fields.get(_TRACEBACK, ()))])


def _value_as_text(value: Loggable) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)


_log = get_logger(__name__)
