"""`zcproto user`, `device` and `pair`: who may open sessions, and with which keys.

Rules: a running server of this home folder makes a change; otherwise the file is changed and the sessions end in
the store. Lists are read from the files. Many users at once are added to the file, which a running server reads
twice a second. A key or a pairing code is shown once: files and server have only its digest. A code is alone on
standard output, and a running server accepts it at once.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import click

from zcproto.auth import DeviceFile, PairingFile, User, UserFile
from zcproto.cli import Instance, command_group, force_option, instance_options, number_option, out_option
from zcproto.cli.audit import recorded
from zcproto.cli.backends import local_backend
from zcproto.cli.output import print_report, print_result, private_file, report_options, table
from zcproto.cli.store import SessionsNotEndedError
from zcproto.common.clock import MS_PER_SECOND, system_clock, system_entropy
from zcproto.common.roles import OPERATOR, roles_from
from zcproto.common.text import counted, escape_text, extra_cure
from zcproto.errors import ConfigError
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_text

MAX_COUNT = 1_000_000
MAX_MINUTES = 24 * 60


def _check_roles(ctx: click.Context, param: click.Parameter, roles: tuple[str, ...]) -> tuple[str, ...]:
    try:
        roles_from(roles)
    except ValueError as error:
        raise click.BadParameter(f"{str(error).removeprefix('roles: ')}.") from None
    return roles


user = command_group("user", "Add, list and change users.")


@user.command()
@click.argument("name")
@click.option(
    "--role", "roles", multiple=True, metavar="ROLE", callback=_check_roles, help="A role of the user."
)
@click.option(
    "--operator", is_flag=True, help="The same as --role operator: the user administers the server."
)
@click.option("--no-key", is_flag=True, help="No API key: only devices and client certificates.")
@click.option("--count", type=click.IntRange(1, MAX_COUNT), metavar="N", help="Add NAME-1 to NAME-N.")
@out_option("Write the key to this private file; with --count a name, a tab and a key on each line.")
@force_option
@report_options
def add(
    instance: Instance,
    name: str,
    roles: tuple[str, ...],
    operator: bool,
    no_key: bool,
    count: int | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Add a user and print the key, once. It can be used at once, also with a running server."""
    if count is not None and out is None:
        raise click.UsageError("--count goes with --out FILE.")
    if no_key and out is not None:
        raise click.UsageError("--no-key and --out do not go together.")
    instance.home.ensure()
    granted = sorted({*roles, *((OPERATOR,) if operator else ())})
    if out is None:
        key, digest = (None, None) if no_key else _new_key()
        local_backend(instance).run("users/add", name=name, roles=granted, key_digest=digest)
        hint = ", without a key." if key is None else ". Keep this key; it is shown once:"
        who = f"a user with {_roles_text(granted)}" if granted else "a user"
        note = f"{escape_text(name)} is {who} now{hint}"
        print_result(as_json, {"name": name, "key": key}, note)
        if key is not None and not as_json:
            click.echo(key)
        return
    # The file comes first: keys that cannot be written would be lost.
    with private_file(out, replace=force) as file:
        if count is None:
            key, digest = _new_key()
            local_backend(instance).run("users/add", name=name, roles=granted, key_digest=digest)
            file.write(f"{key}\n")
        else:
            names = [f"{name}-{number}" for number in range(1, count + 1)]
            with recorded(instance, "users.add", user=f"{names[0]} to {names[-1]}", roles=granted):
                added = UserFile(instance.home.users).add_many(names, frozenset(granted))
            file.writelines(f"{each}\t{secret.reveal()}\n" for each, secret in added)
    who, what = (name, "key is") if count is None else (counted(count, "user"), "keys are")
    note = f"{escape_text(who)} added; the {what} in {escape_text(str(out))}"
    print_result(as_json, {"added": count or 1, "keys": str(out)}, note)


def _new_key() -> tuple[str, str]:
    """Return a new key and its digest, both as text."""
    key = system_entropy(TOKEN_SIZE)
    return token_text(key), token_text(digest_of(key))


@user.command("list")
@report_options
def list_users(instance: Instance, as_json: bool) -> None:
    """List the users in the order of their file."""
    instance.home.require()
    file = UserFile(instance.home.users)
    file.load()
    users = file.entries.items()
    text = table(("USER", "ROLES", "KEY", "STATE"), [_row(name, user) for name, user in users])
    print_report(as_json, [user.as_dict(name) for name, user in users], text)


def _row(name: str, user: User) -> tuple[str, ...]:
    return (
        name,
        ", ".join(sorted(user.roles)) or "-",
        "yes" if user.has_key else "no",
        "disabled" if user.disabled else "enabled",
    )


def _add_command(operation: str, change: str, text: str) -> None:
    """Add the command of an operation that changes a user and ends the open sessions, if any."""

    @user.command(operation, help=text)
    @click.argument("name")
    @report_options
    def command(instance: Instance, name: str, as_json: bool) -> None:
        result = local_backend(instance).run(f"users/{operation}", name=name)
        ended = f"; {ended_text(result['sessions'])}" if "sessions" in result else ""
        print_result(as_json, {"name": name, **result}, f"{escape_text(name)} {change}{ended}.")


_add_command("disable", "is disabled now", "Refuse new sessions of a user, and end the open ones.")
_add_command("enable", "is enabled now", "Allow a disabled user to open sessions again.")
_add_command("remove", "is removed", "Remove a user, and end the open sessions.")


@user.command("new-key")
@click.argument("name")
@out_option("Write the key to this private file.")
@force_option
@report_options
def new_key(instance: Instance, name: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Replace the key of a user, print the new one, once, and end the sessions opened with the old one."""
    key, digest = _new_key()
    ended, failure = None, None
    with nullcontext() if out is None else private_file(out, replace=force) as file:
        try:
            ended = local_backend(instance).run("users/new-key", name=name, key_digest=digest)["sessions"]
        except SessionsNotEndedError as error:  # the key is replaced: it must not be lost
            failure = error
        if file is not None:
            file.write(f"{key}\n")
    where = "Keep it; it is shown once:" if out is None else f"It is in {escape_text(str(out))}."
    shown = {"key": key} if out is None else {"keys": str(out)}
    print_result(
        as_json, {"name": name, "sessions": ended, **shown}, f"{escape_text(name)} has a new key. {where}"
    )
    if out is None and not as_json:
        click.echo(key)
    if failure is not None:
        raise failure
    if not as_json:
        click.echo(f"{escape_text(name)} has a new key; {ended_text(ended)}.", err=True)


@user.command("roles")
@click.argument("name")
@click.argument("roles", nargs=-1, metavar="[ROLE]...", callback=_check_roles)
@report_options
def set_user_roles(instance: Instance, name: str, roles: tuple[str, ...], as_json: bool) -> None:
    """Replace the roles of a user, and end the open sessions: the next ones have the new roles. None: no role."""
    granted = sorted({*roles})
    result = local_backend(instance).run("users/roles", name=name, roles=granted)
    note = f"{escape_text(name)} has {_roles_text(granted)} now; {ended_text(result['sessions'])}."
    print_result(as_json, {"name": name, "roles": granted, **result}, note)


def _roles_text(roles: Sequence[str]) -> str:
    if not roles:
        return "no role"
    return f"the {'role' if len(roles) == 1 else 'roles'} {', '.join(roles)}"


def ended_text(ended: int | None) -> str:
    """Return a clause on the sessions that a change has ended. None: see zcproto/cli/backends.py."""
    return (
        "the running server ends the sessions within a second"
        if ended is None
        else f"{counted(ended, 'session')} ended"
    )


@click.command()
@click.option("--user", metavar="NAME", help="The user of the device. Required if there are several users.")
@number_option("--minutes", click.IntRange(1, MAX_MINUTES), 10, "N", "How long the code is valid.")
@instance_options
def pair(instance: Instance, user: str | None, minutes: int) -> None:
    """Print a one-time code with which a device of a user is enrolled (`device.enroll`).

    On a terminal it is also shown as a QR code.
    """
    instance.home.require()
    name = _device_user(UserFile(instance.home.users), user)
    life_ms = minutes * 60 * MS_PER_SECOND
    with recorded(instance, "pair", user=name):
        code = PairingFile(instance.home.pairing).make(name, life_ms, system_clock.wall())
    click.echo(
        f"This code enrolls one device of {escape_text(name)} within {minutes} min; five wrong attempts end it."
        " It is shown once:",
        err=True,
    )
    click.echo(code.reveal())
    if sys.stdout.isatty():
        click.echo(_qr_code(code.reveal()) or f"For a QR code, {extra_cure('qr')}", err=True)


def _device_user(users: UserFile, name: str | None) -> str:
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
@report_options
def list_devices(instance: Instance, user: str | None, as_json: bool) -> None:
    """List the devices in the order of their enrollment."""
    instance.home.require()
    file = DeviceFile(instance.home.devices)
    file.load()
    devices = [(name, each) for name, each in file.entries.items() if user in (None, each.user)]
    rows = [
        (
            name,
            each.user,
            "of the user" if each.roles is None else ", ".join(sorted(each.roles)) or "-",
            f"{each.added:%Y-%m-%d %H:%M} UTC",
            token_text(each.public_key),
        )
        for name, each in devices
    ]
    text = table(("DEVICE", "USER", "ROLES", "ADDED", "PUBLIC KEY"), rows)
    print_report(as_json, [each.as_dict(name) for name, each in devices], text)


@device.command("roles")
@click.argument("name")
@click.argument("roles", nargs=-1, metavar="[ROLE]...", callback=_check_roles)
@click.option("--all", "of_user", is_flag=True, help="All roles of its user, as after the enrollment.")
@report_options
def set_device_roles(
    instance: Instance, name: str, roles: tuple[str, ...], of_user: bool, as_json: bool
) -> None:
    """Narrow a device to some roles of its user, and end its open sessions. None: no role."""
    if of_user and roles:
        raise click.UsageError("--all and ROLE do not go together.")
    narrowed = None if of_user else sorted({*roles})
    result = local_backend(instance).run("devices/roles", name=name, roles=narrowed)
    what = (
        "all roles of its user"
        if narrowed is None
        else f"{_roles_text(narrowed)}, as far as its user has it,"
    )
    note = f"{escape_text(name)} has {what} now; {ended_text(result['sessions'])}."
    print_result(as_json, {"name": name, "roles": narrowed, **result}, note)


@device.command()
@click.argument("name")
@report_options
def remove(instance: Instance, name: str, as_json: bool) -> None:
    """Remove a device, and end its open sessions."""
    backend = local_backend(instance)
    removed = backend.run("devices/remove", name=name)
    user, ended = removed["user"], removed["sessions"]
    note = f"{escape_text(name)} of {escape_text(user)} is removed; {ended_text(ended)}."
    print_result(as_json, {"name": name, "user": user, "sessions": ended}, note)
