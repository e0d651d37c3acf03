"""What an operator asks a running server, for commands that take its address.

zcproto session list --server HOST:PORT --operator NAME --key-file FILE
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from zcproto.cli.call import KEY_VARIABLE, MAX_CONNECT_TIMEOUT, MAX_MESSAGE, read_key
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, TlsError

TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Operator:
    """Where to ask, and as whom."""

    address: str
    name: str
    key_file: Path | None
    ca: Path | None
    pins: tuple[str, ...]

    def ask(self, home: Home, method: str, params: dict[str, Any]) -> Any:
        """The server's answer. Raises ConfigError, and the errors of `zcproto.connect`."""
        from zcproto.common.event_loop import new_event_loop  # noqa: PLC0415 - `--help` is quick without asyncio

        key = read_key(self.key_file)
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(self._ask(home, key, method, params))

    async def _ask(self, home: Home, key: str, method: str, params: dict[str, Any]) -> Any:
        from zcproto.client import connect  # noqa: PLC0415

        ca = self.ca
        if ca is None and not self.pins and (home.certs / "ca.crt").exists():
            ca = home.certs / "ca.crt"
        try:
            client = connect(
                self.address,
                user=self.name,
                key=key,
                ca_file=ca,
                pins=self.pins,
                timeout=TIMEOUT_S,
                connect_timeout=MAX_CONNECT_TIMEOUT,
                home=home.path,
            )
        except TlsError as error:  # a malformed pin
            raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error
        async with client:
            return await client.call(method, params)


_OPTIONS = (
    click.option("--server", "address", metavar="HOST:PORT", help="Ask this server, as an operator."),
    click.option("--operator", metavar="NAME", help="The operator who asks."),
    click.option(
        "--key-file",
        type=click.Path(path_type=Path, allow_dash=True),
        metavar="FILE",
        help=f"Where the operator's key is; - reads standard input. [default: the variable {KEY_VARIABLE}]",
    ),
    click.option(
        "--ca",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Whose certificates to believe. [default: certs/ca.crt in the home folder, else the system's]",
    ),
    click.option(
        "--pin", "pins", multiple=True, metavar="PIN", help="sha256/BASE64 of the server's public key."
    ),
)


def server_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command --server and who asks there: `function` is called with `server: Operator | None`."""

    @functools.wraps(function)
    def with_server(
        *args: Any,
        address: str | None,
        operator: str | None,
        key_file: Path | None,
        ca: Path | None,
        pins: tuple[str, ...],
        **kwargs: Any,
    ) -> Any:
        if address is None:
            if operator is not None or key_file is not None or ca is not None or pins:
                raise click.UsageError("--operator, --key-file, --ca and --pin go with --server.")
            return function(*args, server=None, **kwargs)
        if operator is None:
            raise click.UsageError("--server goes with --operator NAME: only operators may ask.")
        return function(*args, server=Operator(address, operator, key_file, ca, pins), **kwargs)

    for option in reversed(_OPTIONS):
        option(with_server)
    return with_server
