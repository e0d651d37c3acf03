"""Options and steps of commands that connect to a server: its trust, the user's key, the connection.

Rules: a key is never taken from the command line, which every user of a machine can read.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ConnectionClosed, ProtocolError, TlsError

if TYPE_CHECKING:
    from zcproto.client import Client

EXIT_CANNOT_CONNECT = 3
KEY_VARIABLE = "ZCPROTO_KEY"
MAX_KEY = 4_096
"""Characters read from a key file: a key is much shorter, and a wrong file may be huge."""

MAX_CONNECT_TIMEOUT = 10.0
MAX_MESSAGE = 2_000

Function = TypeVar("Function", bound=Callable[..., Any])
T = TypeVar("T")


def key_option(owner: str) -> Callable[[Function], Function]:
    """Add --key-file; its value is `key_file`."""
    return click.option(
        "--key-file",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="FILE",
        help=f"The file with the {owner}'s key; - reads standard input. [default: the variable {KEY_VARIABLE}]",
    )


def trust_options(function: Function) -> Function:
    """Add --ca and --pin; their values are `ca` and `pins`."""
    function = click.option(
        "--pin",
        "pins",
        multiple=True,
        metavar="PIN",
        help="sha256/BASE64 of the server's public key: beside --ca or instead of a CA. May be repeated.",
    )(function)
    return click.option(
        "--ca",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="The CA to trust. [default: certs/ca.crt in the home folder if it exists, else the system's store]",
    )(function)


def ca_file(home: Home, ca: Path | None, pins: tuple[str, ...] = ()) -> Path | None:
    """Return the CA to trust by the options; None is the system's store, or no CA beside pins."""
    own = home.certs / "ca.crt"
    return own if ca is None and not pins and own.exists() else ca


def read_key(path: Path | None) -> str:
    """Return the key of --key-file, or of the environment without one. Raises ConfigError."""
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
    # Not common.files.read_secret: a pipe such as <(pass show key) is a valid key file.
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
                raise ConfigError([f"{where}: others can read this key; run: chmod 600 '{where}'"])
            return file.read(MAX_KEY)
    except OSError as error:
        raise ConfigError([f"{where}: {error.strerror}"]) from error


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run asynchronous work of a command."""
    from zcproto.common.event_loop import new_event_loop  # noqa: PLC0415 - `--help` is quick without asyncio

    async def start() -> T:
        return await work()

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(start())


def make_client(address: str, home: Home, ca: Path | None, pins: tuple[str, ...], **options: Any) -> Client:
    """Return a client that has not connected yet. Raises ConfigError for a malformed pin."""
    from zcproto.client import connect  # noqa: PLC0415

    options.setdefault("connect_timeout", MAX_CONNECT_TIMEOUT)
    try:
        return connect(address, home=home.path, ca_file=ca_file(home, ca, pins), pins=pins, **options)
    except TlsError as error:
        raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error


async def opened(client: Client) -> bool:
    """Connect. Return False, after a message, if that fails."""
    try:
        await client.open()
    except (ConnectionClosed, ProtocolError, TlsError) as error:
        click.echo(f"zcproto: no connection: {escape_text(str(error), MAX_MESSAGE)}", err=True)
        return False
    return True
