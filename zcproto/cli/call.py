"""`zcproto call`: one call from the command line."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import math
import os
import stat
import sys
from pathlib import Path
from typing import Any

import click

from zcproto.cli import home_options
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ConnectionClosed, ProtocolError, TlsError

EXIT_CANNOT_CONNECT = 3
KEY_VARIABLE = "ZCPROTO_KEY"
MAX_KEY = 4_096
"""Characters read of a key file: a key is much shorter, and a wrong file may be huge."""

MAX_CONNECT_TIMEOUT = 10.0
MAX_MESSAGE = 2_000


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.argument("method")
@click.argument("params", metavar="[JSON]", required=False)
@click.option("--user", metavar="NAME", help="Whose session to open. Without it only public methods answer.")
@click.option(
    "--key-file",
    type=click.Path(path_type=Path, allow_dash=True),
    metavar="FILE",
    help=f"Where the user's key is; - reads standard input. [default: the variable {KEY_VARIABLE}]",
)
@click.option(
    "--ca",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Whose certificates to believe. [default: certs/ca.crt in the home folder if there, else the system's]",
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="PIN",
    help="sha256/BASE64 of the server's public key; with --ca on top of it, else in its place. Several may do.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=86_400),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="For the call.",
)
@click.option(
    "--key-log",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Append the secrets of the connection, so that Wireshark can show its frames (spec/wireshark).",
)
@home_options
def call(
    home: Home,
    config_file: Path | None,
    address: str,
    method: str,
    params: str | None,
    user: str | None,
    key_file: Path | None,
    ca: Path | None,
    pins: tuple[str, ...],
    timeout: float,
    key_log: Path | None,
) -> int:
    """Call METHOD of the server at HOST:PORT and print the result as JSON.

    JSON is an object with the params. Bytes are written {"base64": "..."}, both ways; in a result, floats that JSON
    has no word for are {"float": "nan"}, "inf" or "-inf".

    \b
    Exit codes: 0  the result is printed
                1  the server answered with an error, or the connection was lost
                2  wrong usage, or a file that cannot be used; nothing was sent
                3  there is no connection: no server there, or not one to trust
    """
    arguments = parse_params(params)
    key = read_key(key_file) if user is not None else None
    if user is None and key_file is not None:
        raise click.UsageError("--key-file goes with --user.")
    if ca is None and not pins and (home.certs / "ca.crt").exists():
        ca = home.certs / "ca.crt"
    options = {"user": user, "key": key, "ca_file": ca, "pins": pins, "timeout": timeout, "home": home.path}
    options["key_log_file"] = key_log
    from zcproto.common.event_loop import new_event_loop  # noqa: PLC0415 - `--help` is quick without asyncio

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_call(address, method, arguments, options))


async def _call(address: str, method: str, arguments: dict[str, Any], options: dict[str, Any]) -> int:
    from zcproto.client import connect  # noqa: PLC0415

    try:
        client = connect(address, connect_timeout=min(options["timeout"], MAX_CONNECT_TIMEOUT), **options)
    except TlsError as error:  # a malformed pin
        raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error
    try:
        await client.open()
    except (ConnectionClosed, ProtocolError, TlsError) as error:
        click.echo(f"zcproto: no connection: {escape_text(str(error), MAX_MESSAGE)}", err=True)
        return EXIT_CANNOT_CONNECT
    try:
        result = await client.call(method, arguments)
    finally:
        await client.close()
    click.echo(to_json(result))
    return 0


def parse_params(text: str | None) -> dict[str, Any]:
    """The params that a JSON text names. Raises click.UsageError."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"JSON: {escape_text(str(error), 200)}.") from error
    if not isinstance(value, dict):
        raise click.UsageError('JSON must be an object with the params, such as {"name": "value"}.')
    converted: dict[str, Any] = {name: _from_json(each) for name, each in value.items()}
    return converted


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


def to_json(value: Any) -> str:
    """A result as JSON that is safe on a terminal."""
    text = json.dumps(_to_json(value), ensure_ascii=False, indent=2)
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, dict):
        return {name: _to_json(each) for name, each in value.items()}
    return value


def read_key(path: Path | None) -> str:
    """The key from where the user keeps it; never from the command line, which all users of a machine can read."""
    if path is None:
        key = os.environ.get(KEY_VARIABLE, "")
        where = f"the variable {KEY_VARIABLE}"
    elif str(path) == "-":
        key = (
            click.prompt("Key", hide_input=True, err=True) if sys.stdin.isatty() else sys.stdin.read(MAX_KEY)
        )
        where = "standard input"
    else:
        where = escape_text(str(path))
        key = _read_key_file(path, where)
    key = key.strip()
    if not key:
        hint = "; give it by --key-file FILE, or - for standard input" if path is None else ""
        raise ConfigError([f"{where} holds no key{hint}"])
    return key


def _read_key_file(path: Path, where: str) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                raise ConfigError([f"{where}: others can read this key; run: chmod 600 '{where}'"])
            return file.read(MAX_KEY)
    except OSError as error:
        raise ConfigError([f"{where}: {error.strerror}"]) from error
