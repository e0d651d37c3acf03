"""Values of calls as JSON: bytes are {"base64": "..."}, floats that JSON cannot express {"float": "nan"}."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import math
import sys
import threading
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import click

from zcproto.common.text import escape_text

_EXAMPLE = """such as '{"name": "value"}'"""


def params_of(words: Sequence[str]) -> dict[str, Any]:
    """Return the params of the words of a command line: one JSON text, or none. Raises click.UsageError."""
    pairs = [word.partition("=") for word in words]
    if words and words[0][:1] not in ("{", "@") and all(equals and name for name, equals, _ in pairs):
        meant = {name: _value_of(value) for name, _, value in pairs}
        raise click.UsageError(
            f"The params are one JSON object; write: '{escape_text(json.dumps(meant), 300)}'."
        )
    if len(words) > 1:
        raise click.UsageError(f"The params are one JSON object in single quotes, {_EXAMPLE}.")
    return parse_params(words[0] if words else None)


def _value_of(text: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    return text


def parse_params(text: str | None) -> dict[str, Any]:
    """Return the params of a JSON text. Raises click.UsageError."""
    try:
        value = {} if text is None else read_json(text)
    except click.UsageError as error:
        if text is not None and text.startswith("@"):
            raise
        raise click.UsageError(f"{error.message} Write an object in single quotes, {_EXAMPLE}.") from error
    if not isinstance(value, dict):
        raise click.UsageError(f"JSON must be an object with the params, {_EXAMPLE}.")
    return value


def json_value(argument: str) -> Any:
    """Return a value of any type like `read_json`."""
    try:
        return read_json(argument)
    except click.UsageError as error:
        raise click.UsageError(
            f"""{error.message} Write a text as '"text"', in quotes of both kinds."""
        ) from error


def read_json(argument: str) -> Any:
    """Return the value of a JSON text, or of the file that @FILE names. Raises click.UsageError."""
    if not argument.startswith("@"):
        return parse_json(argument)
    try:
        return parse_json(Path(argument[1:]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror or "cannot be read") if isinstance(error, OSError) else "is not a text file"
        raise click.UsageError(f"{escape_text(argument[1:], 300)}: {reason}; check the path.") from error


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raises click.UsageError."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"JSON: {escape_text(str(error), 200)}.") from error
    return _from_json(value)


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"base64"} and isinstance(value["base64"], str):
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise click.UsageError(f"JSON: {escape_text(value['base64'], 60)!r} is not base64.") from error
    return {name: _from_json(each) for name, each in value.items()}


def to_json(value: Any) -> Any:
    """Return a result as data that JSON can express."""
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if isinstance(value, dict):
        return {name: to_json(each) for name, each in value.items()}
    return value


async def stdin_items() -> AsyncGenerator[Any, None]:
    """Yield the JSON value of each line. Raises click.ClickException for another line."""
    number = 0
    async for line in _lines(sys.stdin.fileno()):
        number += 1
        if line.strip():
            try:
                yield parse_json(line)
            except click.UsageError as error:
                raise click.ClickException(f"line {number} of standard input: {error.message}") from error


async def _lines(descriptor: int) -> AsyncGenerator[str, None]:
    """Yield lines as they come, reading one ahead.

    They are read in a daemon thread: Ctrl-C does not wait for the next line. Not by the event loop, which would
    make the terminal non-blocking for other programs, and not from `sys.stdin`, whose lock the thread would hold
    when the interpreter ends.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[str | None] = asyncio.Queue()
    wanted = threading.Semaphore(0)

    def read() -> None:
        with (
            contextlib.suppress(RuntimeError),  # the loop was closed
            open(descriptor, encoding="utf-8", errors="replace", closefd=False) as lines,
        ):
            for line in lines:
                loop.call_soon_threadsafe(found.put_nowait, line)
                wanted.acquire()
            loop.call_soon_threadsafe(found.put_nowait, None)

    threading.Thread(target=read, name="standard input", daemon=True).start()
    while (line := await found.get()) is not None:
        wanted.release()
        yield line
