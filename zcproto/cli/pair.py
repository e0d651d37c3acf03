"""`zcproto pair`: a one-time code, by which somebody makes a device of theirs known to the server.

Rules: the code alone goes to standard output, everything else to standard error. It is shown this once: the file
has a digest. A running server takes it at once.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import click

from zcproto.auth import PairingFile, UserFile
from zcproto.cli import home_options
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

MAX_MINUTES = 24 * 60
_SECONDS_PER_MINUTE = 60


@click.command()
@click.option("--user", metavar="NAME", help="Whose device it will be. Needed if there are several users.")
@click.option(
    "--minutes",
    type=click.IntRange(1, MAX_MINUTES),
    default=10,
    show_default=True,
    metavar="N",
    help="How long the code is good.",
)
@home_options
def pair(home: Home, config_file: Path | None, user: str | None, minutes: int) -> None:
    """Print a one-time code that lets in a device of a user's, by `device.enroll`.

    On a terminal it is shown as a QR code, too.
    """
    home.ensure()
    name = _user(UserFile(home.users), user)
    life_ms = minutes * _SECONDS_PER_MINUTE * MS_PER_SECOND
    code = PairingFile(home.pairing).make(name, life_ms, system_clock.wall())
    click.echo(
        f"This code is good once, for a device of {escape_text(name)}, for {minutes} min;"
        " five wrong tries end it. It is shown this once:",
        err=True,
    )
    click.echo(code.reveal())
    if sys.stdout.isatty():
        click.echo(_qr_code(code.reveal()) or 'For a QR code, run: pip install "zcproto[qr]"', err=True)


def _user(users: UserFile, name: str | None) -> str:
    """The user whom the device will be of. Raises ConfigError if there is none of this name, or no telling."""
    users.load()
    if name is None:
        names = [each for each in users.names if users.find(each) is not None]
        if len(names) != 1:
            whose = "there are several users: name one" if names else "there is no user yet: add one"
            raise ConfigError([f"{whose}, by " + ("--user NAME" if names else "zcproto user add NAME")])
        return names[0]
    if users.find(name) is None:
        raise ConfigError(
            [f"{escape_text(name)} is no user here, or disabled; add them by zcproto user add NAME"]
        )
    return name


def _qr_code(text: str) -> str | None:
    """The text as a QR code for a terminal; None if the package for it is not installed."""
    try:
        from qrcode import QRCode  # noqa: PLC0415 - it comes with an extra
    except ImportError:
        return None
    code = QRCode(border=2)
    code.add_data(text)
    drawn = io.StringIO()
    code.print_ascii(out=drawn, invert=True)
    return drawn.getvalue().rstrip("\n")
