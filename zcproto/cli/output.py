"""Output of commands: JSON, tables, times, and private files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import click

from zcproto.cli import instance_options
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.files import new_file, replaced_file
from zcproto.common.text import aligned, escape_text
from zcproto.errors import ZcprotoError

MAX_CELL = 128

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def report_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and the options of an instance: `function` gets `as_json` and `instance`."""
    return as_json_option(instance_options(function))


def print_report(as_json: bool, value: Any, text: str) -> None:
    """Print what a command has read, as indented JSON or as text."""
    click.echo(json_text(value, indent=2) if as_json else text)


def print_result(as_json: bool, value: Any, note: str) -> None:
    """Print what a command has done, as one line of JSON, or as a note on standard error."""
    click.echo(json_text(value) if as_json else note, err=not as_json)


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON in which every character that could control a terminal is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns under their heads. Cells are escaped for a terminal."""
    return aligned([head, *([escape_text(cell, MAX_CELL) or "-" for cell in row] for row in rows)])


def utc(ms: int | None = None) -> datetime:
    """Return a time in milliseconds since the Unix epoch, or the current time, in UTC."""
    return datetime.fromtimestamp((system_clock.wall() if ms is None else ms) / MS_PER_SECOND, UTC)


@contextmanager
def private_file(path: Path, *, replace: bool) -> Iterator[TextIO]:
    """Write a file of mode 0600; keep what was there if the body raises. A link is never followed.

    Raises ZcprotoError for an existing file unless `replace` is set.
    """
    with ExitStack() as stack:
        try:
            data = stack.enter_context(replaced_file(path, is_locked=False) if replace else new_file(path))
        except FileExistsError:
            raise ZcprotoError(f"{escape_text(str(path))}: already exists; --force replaces it") from None
        text = io.TextIOWrapper(data, encoding="utf-8")
        try:
            yield text
        finally:
            text.detach()
