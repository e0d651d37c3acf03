"""The log: one line for one fact, as JSON for machines or as text for people.

Rules: an event is a fixed dotted name, what varies are its values; `values` decides what of them may be
written. Nothing in a value can begin a new line or move a cursor. A level that is off costs one comparison. A
line that cannot be written is counted and never raises: the work that is told of goes on.

Must not know: sessions, connections, the event loop.

Until `configure_logging` is called, as in a program that only uses the client, warnings and errors go to
standard error. The configuration that a program has made for structlog itself is neither used nor changed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import structlog

from zcproto.clock import MS_PER_SECOND, Clock, system_clock
from zcproto.errors import ConfigError
from zcproto.observe.values import Loggable, cut, loggable, places
from zcproto.printable import printable

if TYPE_CHECKING:
    from zcproto.config import LogConfig

MAX_LINE = 16_384
"""Characters of a line; a longer one keeps its event and loses its values. Log shippers commonly cut there."""

AT = "_at"
"""The name of a value that is the time of an event, milliseconds since the Unix epoch, if that is not now."""

_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
_encode = json.JSONEncoder(separators=(",", ":")).encode  # `json.dumps` makes one for each line
_EVENT = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)+")
_BARE = re.compile(r"[A-Za-z0-9_.:/@+()\[\]-]+")


class Logger(structlog.BoundLoggerBase):
    """Writes events. `bind(name=value)` gives a logger that adds these values to each of its events."""

    def debug(self, event: str, **values: Any) -> None:
        self._log(logging.DEBUG, "debug", event, values)

    def info(self, event: str, **values: Any) -> None:
        self._log(logging.INFO, "info", event, values)

    def warning(self, event: str, **values: Any) -> None:
        self._log(logging.WARNING, "warning", event, values)

    def error(self, event: str, **values: Any) -> None:
        """An exception among the values is written with the places that it passed."""
        self._log(logging.ERROR, "error", event, values)

    def _log(self, level: int, method: str, event: str, values: dict[str, Any]) -> None:
        if level < _state.level:
            return
        try:
            self._proxy_to_logger(method, event, **values)
        except (
            Exception
        ):  # whatever fails in a log (a full disk, a strange __str__), the caller's work goes on
            _state.failed += 1


def get_logger(name: str) -> Logger:
    """The logger of a part of the program, named after its module."""
    return Logger(_Writer(), [_prepare, _render], {"logger": name})


def configure_logging(log: LogConfig, *, clock: Clock = system_clock) -> None:
    """Sets level, format and place of the log for the process. Called again, it opens the file anew.

    Raises ConfigError if the file cannot be opened; then all stays as it was.
    """
    output: _Output = _StandardError() if log.file is None else _File(log.file)
    old, _state.output = _state.output, output
    old.close()
    _state.level = _LEVELS[log.level]
    _state.format = log.format
    _state.clock = clock


def failed_lines() -> int:
    """How many lines could not be written since the start of the process."""
    return _state.failed


class _Output(Protocol):
    def write(self, line: str) -> None: ...

    def is_terminal(self) -> bool: ...

    def close(self) -> None: ...


class _StandardError:
    """Standard error as it is at each line: a program, or a test, may replace it."""

    def write(self, line: str) -> None:
        sys.stderr.write(line)
        sys.stderr.flush()

    def is_terminal(self) -> bool:
        return sys.stderr.isatty()

    def close(self) -> None:
        """It is not ours to close."""


class _File:
    def __init__(self, path: Path) -> None:
        # Non-blocking is for a named pipe: without a reader it fails here, and a full one loses lines, counted.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError([f'log.file = "{path}": cannot be opened: {error.strerror}']) from error
        self._torn = False

    def write(self, line: str) -> None:
        data = line.encode("ascii", "backslashreplace")
        if self._torn:
            data = b"\n" + data
        written = os.write(self._descriptor, data)
        self._torn = written < len(data)
        if self._torn:
            raise OSError("a line was written in part, as the disk is full")

    def is_terminal(self) -> bool:
        return False

    def close(self) -> None:
        os.close(self._descriptor)


class _State:
    """What `configure_logging` sets. One for the process: its standard error is one."""

    __slots__ = ("clock", "failed", "format", "level", "output")

    def __init__(self) -> None:
        self.level = logging.WARNING
        self.output: _Output = _StandardError()
        self.format = "auto"
        self.clock: Clock = system_clock
        self.failed = 0


_state = _State()


class _Writer:
    """The end of structlog's chain; it calls the method named as the level."""

    def debug(self, line: str) -> None:
        _state.output.write(line)

    info = warning = error = debug


def _prepare(_: Any, method: str, values: MutableMapping[str, Any]) -> dict[str, Loggable]:
    """The fields of a line, in their order, each fit to be written."""
    event = str(values.pop("event"))
    wall = values.pop(AT, None)
    if wall is None:
        wall = _state.clock.wall()
    fields: dict[str, Loggable] = {"timestamp": _timestamp(wall), "level": method}
    if _EVENT.fullmatch(event):
        fields["event"] = event
    else:
        # A mistake of ours, or a text from outside in the wrong place: it is not taken for a name.
        fields |= {"event": "log.misnamed", "text": cut(event)}
    for name, value in values.items():
        fields[f"{name}_" if name in fields else name] = loggable(name, value)
        if method == "error" and isinstance(value, BaseException):
            fields[f"{name}_at"] = places(value)
    return fields


def _timestamp(wall: int) -> str:
    seconds, ms = divmod(wall, MS_PER_SECOND)
    return f"{_second(seconds)}.{ms:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def _render(_: Any, method: str, fields: MutableMapping[str, Any]) -> str:
    text = _state.format == "console" or (_state.format == "auto" and _state.output.is_terminal())
    form = _as_text if text else _as_json
    line = form(fields)
    if len(line) > MAX_LINE:
        head = {name: fields[name] for name in ("timestamp", "level", "event")}
        line = form(head | {"oversize": len(line)})
    return f"{line}\n"


def _as_json(fields: MutableMapping[str, Any]) -> str:
    # The encoder escapes all beyond ASCII, and the control characters but DEL.
    return _encode(fields).replace("\x7f", "\\u007f")


def _as_text(fields: MutableMapping[str, Any]) -> str:
    head = f"{fields['timestamp']} {fields['level']:7} {fields['event']}"
    values = (f"{name}={_value_as_text(fields[name])}" for name in list(fields)[3:])
    return " ".join([head, *map(printable, values)])


def _value_as_text(value: Loggable) -> str:
    if isinstance(value, str) and _BARE.fullmatch(value):
        return value
    return json.dumps(value, ensure_ascii=False)
