"""`zcproto user`: the users, who may open sessions.

Rules: commands work on the file, under its lock; a running server looks at it twice a second, and ends the sessions
of whoever is gone. Where no server runs, the sessions that its store keeps are ended here.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zcproto.auth import UserFile
from zcproto.auth.users import User
from zcproto.cli import home_options, read_config
from zcproto.cli.kept_sessions import end_sessions_of
from zcproto.cli.private_file import private_file
from zcproto.cli.table import table
from zcproto.home import Home
from zcproto.printable import printable

if TYPE_CHECKING:
    from zcproto.config import Config

MAX_COUNT = 1_000_000


@click.group()
@home_options
def user(home: Home, config_file: Path | None) -> None:
    """Add, list and change users, who may open sessions."""


@user.command()
@click.argument("name")
@click.option("--operator", is_flag=True, help="A user who may also look into the server.")
@click.option("--no-key", is_flag=True, help="A user who comes by devices and client certificates only.")
@click.option("--count", type=click.IntRange(1, MAX_COUNT), metavar="N", help="Add NAME-1 to NAME-N.")
@click.option(
    "--keys-out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the keys of --count here, a name, a tab and a key on each line. The file is yours alone.",
)
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@home_options
def add(
    home: Home,
    config_file: Path | None,
    name: str,
    operator: bool,
    no_key: bool,
    count: int | None,
    keys_out: Path | None,
    force: bool,
) -> None:
    """Add a user and print the key, this once. A running server knows the user at once."""
    if (count is None) != (keys_out is None):
        raise click.UsageError("--count and --keys-out go together.")
    if no_key and count is not None:
        raise click.UsageError("--no-key and --count do not go together.")
    home.ensure()
    users = UserFile(home.users)
    role = "an operator" if operator else "a user"
    if no_key:
        users.add_without_key(name, operator=operator)
        click.echo(f"{printable(name)} is {role} now, without a key.", err=True)
        return
    if count is None or keys_out is None:
        key = users.add(name, operator=operator)
        click.echo(f"{printable(name)} is {role} now. Keep this key; it is shown this once:", err=True)
        click.echo(key.reveal())
        return
    # The file comes first: keys that cannot be written down would be lost.
    with private_file(keys_out, replace=force) as file:
        added = users.add_many([f"{name}-{number}" for number in range(1, count + 1)], operator=operator)
        file.writelines(f"{each}\t{key.reveal()}\n" for each, key in added)
    click.echo(f"{count} users are added; their keys are in {printable(str(keys_out))}", err=True)


@user.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@home_options
def list_users(home: Home, config_file: Path | None, as_json: bool) -> None:
    """List the users, in the order of their file."""
    file = UserFile(home.users)
    file.load()
    users = [(name, user) for name in file.names if (user := file.get(name)) is not None]
    if as_json:
        rows = [
            {
                "name": name,
                "operator": user.operator,
                "key": user.has_key,
                "disabled": user.disabled,
            }
            for name, user in users
        ]
        click.echo(json.dumps(rows, ensure_ascii=False, indent=2))
    else:
        click.echo(table(("USER", "ROLE", "KEY", "STATE"), [_row(name, user) for name, user in users]))


def _row(name: str, user: User) -> tuple[str, ...]:
    return (
        name,
        "operator" if user.operator else "user",
        "yes" if user.has_key else "no",
        "disabled" if user.disabled else "enabled",
    )


@user.command()
@click.argument("name")
@home_options
def disable(home: Home, config_file: Path | None, name: str) -> None:
    """Let a user open no more sessions, and end those there are."""
    config = read_config(home, config_file)
    UserFile(home.users).disable(name)
    _end_sessions(home, config, name, "is disabled now")


@user.command()
@click.argument("name")
@home_options
def enable(home: Home, config_file: Path | None, name: str) -> None:
    """Let a user open sessions again."""
    UserFile(home.users).enable(name)
    click.echo(f"{printable(name)} is enabled now.", err=True)


@user.command()
@click.argument("name")
@home_options
def remove(home: Home, config_file: Path | None, name: str) -> None:
    """Remove a user, and end the sessions there are."""
    config = read_config(home, config_file)
    UserFile(home.users).remove(name)
    _end_sessions(home, config, name, "is removed")


@user.command("new-key")
@click.argument("name")
@home_options
def new_key(home: Home, config_file: Path | None, name: str) -> None:
    """Give a user another key, print it this once, and end the sessions that the old one has opened."""
    config = read_config(home, config_file)
    key = UserFile(home.users).new_key(name)
    click.echo(f"{printable(name)} has a new key. Keep it; it is shown this once:", err=True)
    click.echo(key.reveal())
    _end_sessions(home, config, name, "has a new key")


def _end_sessions(home: Home, config: Config, name: str, what: str) -> None:
    ended = asyncio.run(end_sessions_of(name, config, home))
    sessions = (
        "a running server ends the sessions within a second" if ended is None else f"sessions ended: {ended}"
    )
    click.echo(f"{printable(name)} {what}; {sessions}.", err=True)
