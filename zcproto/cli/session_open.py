"""`zcproto session open`: a session for a program that speaks no ZCP/1, or for the status page in a browser.

The token is all that goes to standard output, so that it can be sent on to a file or a clipboard.
"""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from zcproto.cli import home_options
from zcproto.cli.call import EXIT_CANNOT_CONNECT, KEY_VARIABLE, MAX_CONNECT_TIMEOUT, MAX_MESSAGE, read_key
from zcproto.common.clock import MS_PER_SECOND
from zcproto.common.home import Home
from zcproto.common.secret import SecretText
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ConnectionClosed, ProtocolError, TlsError
from zcproto.sessions.token import token_text

TIMEOUT_S = 30.0
"""For the opening, logins that wait for their turn included."""


@click.command("open")
@click.argument("address", metavar="HOST:PORT")
@click.option("--user", metavar="NAME", required=True, help="Whose session to open.")
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
@click.option("--pin", "pins", multiple=True, metavar="PIN", help="sha256/BASE64 of the server's public key.")
@home_options
def open_session(
    home: Home,
    config_file: Path | None,
    address: str,
    user: str,
    key_file: Path | None,
    ca: Path | None,
    pins: tuple[str, ...],
) -> int:
    """Open a session at HOST:PORT and print its token: for the status page, or for Prometheus.

    Whoever has the token has the session. It ends when its time is over, or by `zcproto session revoke`.
    """
    key = SecretText(read_key(key_file))
    if ca is None and not pins and (home.certs / "ca.crt").exists():
        ca = home.certs / "ca.crt"
    options = {"ca_file": ca, "pins": pins, "timeout": TIMEOUT_S, "home": home.path}
    from zcproto.common.event_loop import new_event_loop  # noqa: PLC0415 - `--help` is quick without asyncio

    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(_open(address, user, key, options))


async def _open(address: str, user: str, key: SecretText, options: dict[str, Any]) -> int:
    from zcproto.client import connect  # noqa: PLC0415
    from zcproto.client.client import default_client  # noqa: PLC0415

    try:
        client = connect(address, connect_timeout=MAX_CONNECT_TIMEOUT, **options)
    except TlsError as error:  # a malformed pin
        raise ConfigError([escape_text(str(error), MAX_MESSAGE)]) from error
    try:
        await client.open()
    except (ConnectionClosed, ProtocolError, TlsError) as error:
        click.echo(f"zcproto: no connection: {escape_text(str(error), MAX_MESSAGE)}", err=True)
        return EXIT_CANNOT_CONNECT
    params = {"scheme": "api_key", "user": user, "key": key, "client": default_client()}
    try:
        opened = await client.call("session.open", params)
    finally:
        await client.close()
    click.echo(token_text(opened["token"]))
    until = datetime.fromtimestamp(opened["expires_at"] / MS_PER_SECOND, UTC)
    click.echo(f"session {escape_text(opened['id'], 60)}, until {until:%Y-%m-%d %H:%M} UTC", err=True)
    return 0
