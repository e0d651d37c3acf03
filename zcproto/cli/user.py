"""`zcproto user`: the users, who may open sessions.

Rules: a server that runs with this home folder does what is asked, by its control socket. Where none does, commands
work on the file, under its lock, and end the sessions that the store keeps. Lists are of the file, and it is to the
file that many users at once are added: a running server looks at it twice a second.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from zcproto.auth import UserFile
from zcproto.auth.users import User
from zcproto.cli import home_options, read_config
from zcproto.cli.control import control_of
from zcproto.cli.kept_sessions import end_sessions_of
from zcproto.cli.private_file import private_file
from zcproto.cli.table import table
from zcproto.common.clock import system_entropy
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_text

MAX_COUNT = 1_000_000

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


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
@as_json_option
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
    as_json: bool,
) -> None:
    """Add a user and print the key, this once. A running server knows the user at once."""
    if (count is None) != (keys_out is None):
        raise click.UsageError("--count and --keys-out go together.")
    if no_key and count is not None:
        raise click.UsageError("--no-key and --count do not go together.")
    home.ensure()
    users = UserFile(home.users)
    role = "an operator" if operator else "a user"
    if count is None or keys_out is None:
        key = _add(home, users, name, operator=operator, with_key=not no_key)
        if as_json:
            click.echo(json.dumps({"name": name, "key": key}, ensure_ascii=False))
        elif key is None:
            click.echo(f"{escape_text(name)} is {role} now, without a key.", err=True)
        else:
            click.echo(f"{escape_text(name)} is {role} now. Keep this key; it is shown this once:", err=True)
            click.echo(key)
        return
    # The file comes first: keys that cannot be written down would be lost.
    with private_file(keys_out, replace=force) as file:
        added = users.add_many([f"{name}-{number}" for number in range(1, count + 1)], operator=operator)
        file.writelines(f"{each}\t{key.reveal()}\n" for each, key in added)
    if as_json:
        click.echo(json.dumps({"added": count, "keys": str(keys_out)}))
    else:
        click.echo(f"{count} users are added; their keys are in {escape_text(str(keys_out))}", err=True)


def _add(home: Home, users: UserFile, name: str, *, operator: bool, with_key: bool) -> str | None:
    control = control_of(home)
    if control is not None:
        key, digest = _made_key() if with_key else (None, None)
        control.post("/v1/users/add", name=name, operator=operator, key_digest=digest)
        return key
    if with_key:
        return users.add(name, operator=operator).reveal()
    users.add_without_key(name, operator=operator)
    return None


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
@as_json_option
@home_options
def disable(home: Home, config_file: Path | None, name: str, as_json: bool) -> None:
    """Let a user open no more sessions, and end those there are."""
    config = read_config(home, config_file)
    control = control_of(home)
    if control is not None:
        ended = control.post("/v1/users/disable", name=name)["sessions"]
    else:
        UserFile(home.users).disable(name)
        ended = asyncio.run(end_sessions_of(name, config, home))
    _tell_ended(name, "is disabled now", ended, as_json)


@user.command()
@click.argument("name")
@as_json_option
@home_options
def enable(home: Home, config_file: Path | None, name: str, as_json: bool) -> None:
    """Let a user open sessions again."""
    control = control_of(home)
    if control is not None:
        control.post("/v1/users/enable", name=name)
    else:
        UserFile(home.users).enable(name)
    if as_json:
        click.echo(json.dumps({"name": name}, ensure_ascii=False))
    else:
        click.echo(f"{escape_text(name)} is enabled now.", err=True)


@user.command()
@click.argument("name")
@as_json_option
@home_options
def remove(home: Home, config_file: Path | None, name: str, as_json: bool) -> None:
    """Remove a user, and end the sessions there are."""
    config = read_config(home, config_file)
    control = control_of(home)
    if control is not None:
        ended = control.post("/v1/users/remove", name=name)["sessions"]
    else:
        UserFile(home.users).remove(name)
        ended = asyncio.run(end_sessions_of(name, config, home))
    _tell_ended(name, "is removed", ended, as_json)


@user.command("new-key")
@click.argument("name")
@as_json_option
@home_options
def new_key(home: Home, config_file: Path | None, name: str, as_json: bool) -> None:
    """Give a user another key, print it this once, and end the sessions that the old one has opened."""
    config = read_config(home, config_file)
    control = control_of(home)
    if control is not None:
        key, digest = _made_key()
        ended = control.post("/v1/users/new-key", name=name, key_digest=digest)["sessions"]
    else:
        key = UserFile(home.users).new_key(name).reveal()
    if not as_json:
        click.echo(f"{escape_text(name)} has a new key. Keep it; it is shown this once:", err=True)
        click.echo(key)
    if control is None:  # last: it may fail, and the key must have been shown by then
        ended = asyncio.run(end_sessions_of(name, config, home))
    _tell_ended(name, "has a new key", ended, as_json, key=key)


def _made_key() -> tuple[str, str]:
    """A new key as text, and its digest, which is all that a server is sent of it."""
    key = system_entropy(TOKEN_SIZE)
    return token_text(key), token_text(digest_of(key))


def _tell_ended(name: str, what: str, ended: int | None, as_json: bool, **more: str) -> None:
    """`ended` is None if a running server ends the sessions, which could not be asked how many there are."""
    if as_json:
        click.echo(json.dumps({"name": name, "sessions": ended, **more}, ensure_ascii=False))
        return
    sessions = (
        "a running server ends the sessions within a second" if ended is None else f"sessions ended: {ended}"
    )
    click.echo(f"{escape_text(name)} {what}; {sessions}.", err=True)
