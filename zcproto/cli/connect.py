"""Options and steps of commands that connect to a server: its trust, the user's key, the connection.

Rules: a key is never taken from the command line, which every user of a machine can read.
"""

from __future__ import annotations

import asyncio
import functools
import os
import stat
import sys
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from zcproto.cli import Function, file_option
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

T = TypeVar("T")


def key_option(owner: str) -> Callable[[Function], Function]:
    """Add --key-file; its value is `key_file`."""
    return file_option(
        "--key-file",
        text=f"The file with the {owner}'s key; - reads standard input. [default: the variable {KEY_VARIABLE}]",
        allow_dash=True,
    )


@dataclass(frozen=True, slots=True)
class TrustChoice:
    """The options on which servers to trust."""

    ca: Path | None = None
    pins: tuple[str, ...] = ()

    def ca_file(self, home: Home) -> Path | None:
        """Return the CA to trust; None is the system's store, or no CA beside pins."""
        own = home.certs / "ca.crt"
        return own if self.ca is None and not self.pins and own.exists() else self.ca

    def make_client(self, home: Home, address: str, **options: Any) -> Client:
        """Return a client that has not connected yet. Raises ConfigError for a malformed pin."""
        from zcproto.client import connect  # noqa: PLC0415

        options.setdefault("connect_timeout", MAX_CONNECT_TIMEOUT)
        try:
            return connect(address, home=home.path, ca_file=self.ca_file(home), pins=self.pins, **options)
        except TlsError as error:
            raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error


def trust_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --ca and --pin: `function` gets `trust: TrustChoice`."""

    @functools.wraps(function)
    def with_trust(*args: Any, ca: Path | None, pins: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, trust=TrustChoice(ca, pins), **kwargs)

    with_pin = click.option(
        "--pin",
        "pins",
        multiple=True,
        metavar="PIN",
        help="sha256/BASE64 of the server's public key: beside --ca or instead of a CA. May be repeated.",
    )(with_trust)
    return file_option(
        "--ca",
        text="The CA to trust. [default: certs/ca.crt in the home folder if it exists, else the system's store]",
    )(with_pin)


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


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run asynchronous work of a command."""
    from zcproto.common.event_loop import new_event_loop  # noqa: PLC0415 - `--help` is quick without asyncio

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(work)


async def opened(client: Client) -> bool:
    """Connect. Return False, after a message, if that fails."""
    try:
        await client.open()
    except (ConnectionClosed, ProtocolError, TlsError) as error:
        click.echo(f"zcproto: no connection: {escape_text(str(error), MAX_MESSAGE)}", err=True)
        return False
    return True
