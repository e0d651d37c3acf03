"""`zcproto pair` and `zcproto device`: devices, which open sessions with keys of their own.

Rules: a server that runs with this home folder makes the change; otherwise the file is changed and the sessions end
in the store. A list is read from the file. A pairing code is shown once, alone on standard output: the file has
only its digest, and a running server accepts it at once.
"""

from __future__ import annotations

import io
import sys

import click

from zcproto.auth import DeviceFile, PairingFile, UserFile
from zcproto.cli import Instance, command_group, instance_options, number_option
from zcproto.cli.backends import local_backend
from zcproto.cli.output import as_json_option, print_json, table
from zcproto.cli.user import ended_text
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.sessions.token import token_text

MAX_MINUTES = 24 * 60
_SECONDS_PER_MINUTE = 60


@click.command()
@click.option("--user", metavar="NAME", help="The user of the device. Required if there are several users.")
@number_option("--minutes", click.IntRange(1, MAX_MINUTES), 10, "N", "How long the code is valid.")
@instance_options
def pair(instance: Instance, user: str | None, minutes: int) -> None:
    """Print a one-time code with which a device of a user is enrolled (`device.enroll`).

    On a terminal it is also shown as a QR code.
    """
    instance.home.ensure()
    name = _user(UserFile(instance.home.users), user)
    life_ms = minutes * _SECONDS_PER_MINUTE * MS_PER_SECOND
    code = PairingFile(instance.home.pairing).make(name, life_ms, system_clock.wall())
    click.echo(
        f"This code enrolls one device of {escape_text(name)} within {minutes} min; five wrong attempts end it."
        " It is shown once:",
        err=True,
    )
    click.echo(code.reveal())
    if sys.stdout.isatty():
        click.echo(_qr_code(code.reveal()) or 'For a QR code, run: pip install "zcproto[qr]"', err=True)


def _user(users: UserFile, name: str | None) -> str:
    """Return the user of the device. Raises ConfigError if it is unknown or not clear."""
    users.load()
    if name is None:
        names = [each for each in users.entries if users.find(each) is not None]
        if not names:
            raise ConfigError(["there is no user yet; add one with zcproto user add NAME"])
        if len(names) > 1:
            raise ConfigError(["there are several users; choose one with --user NAME"])
        return names[0]
    if users.find(name) is None:
        raise ConfigError([f"{escape_text(name)} is unknown or disabled; zcproto user list shows the users"])
    return name


def _qr_code(text: str) -> str | None:
    """Return a QR code for a terminal, or None without the package for it."""
    try:
        from qrcode import QRCode  # noqa: PLC0415 - it comes with an extra
    except ImportError:
        return None
    code = QRCode(border=2)
    code.add_data(text)
    drawn = io.StringIO()
    code.print_ascii(out=drawn, invert=True)
    return drawn.getvalue().rstrip("\n")


device = command_group("device", "List and remove devices. `zcproto pair` enrolls one.")


@device.command("list")
@click.option("--user", metavar="NAME", help="Only devices of this user.")
@as_json_option
@instance_options
def list_devices(instance: Instance, user: str | None, as_json: bool) -> None:
    """List the devices in the order of their enrollment."""
    file = DeviceFile(instance.home.devices)
    file.load()
    devices = [(name, each) for name, each in file.entries.items() if user in (None, each.user)]
    if as_json:
        print_json([each.as_dict(name) for name, each in devices], indent=2)
        return
    rows = [
        (name, each.user, f"{each.added:%Y-%m-%d %H:%M} UTC", token_text(each.public_key))
        for name, each in devices
    ]
    click.echo(table(("DEVICE", "USER", "ADDED", "PUBLIC KEY"), rows))


@device.command()
@click.argument("name")
@as_json_option
@instance_options
def remove(instance: Instance, name: str, as_json: bool) -> None:
    """Remove a device, and end its open sessions."""
    backend = local_backend(instance)
    removed = backend.run("devices/remove", name=name)
    user, ended = removed["user"], removed["sessions"]
    if as_json:
        print_json({"name": name, "user": user, "sessions": ended})
    else:
        click.echo(f"{escape_text(name)} of {escape_text(user)} is removed; {ended_text(ended)}.", err=True)
