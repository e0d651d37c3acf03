"""`zcproto user`: the users, who may open sessions."""

from __future__ import annotations

from pathlib import Path

import click

from zcproto.auth import UserFile
from zcproto.cli import home_options
from zcproto.cli.private_file import private_file
from zcproto.home import Home
from zcproto.printable import printable

MAX_COUNT = 1_000_000


@click.group()
@home_options
def user(home: Home, config_file: Path | None) -> None:
    """Add users, who may open sessions."""


@user.command()
@click.argument("name")
@click.option("--operator", is_flag=True, help="A user who may also look into the server.")
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
    count: int | None,
    keys_out: Path | None,
    force: bool,
) -> None:
    """Add a user and print the key, this once. A running server knows the user at once."""
    if (count is None) != (keys_out is None):
        raise click.UsageError("--count and --keys-out go together.")
    home.ensure()
    users = UserFile(home.users)
    role = "an operator" if operator else "a user"
    if count is None or keys_out is None:
        key = users.add(name, operator=operator)
        click.echo(f"{printable(name)} is {role} now. Keep this key; it is shown this once:", err=True)
        click.echo(key)
        return
    # The file comes first: keys that cannot be written down would be lost.
    with private_file(keys_out, replace=force) as file:
        added = users.add_many([f"{name}-{number}" for number in range(1, count + 1)], operator=operator)
        file.writelines(f"{each}\t{key}\n" for each, key in added)
    click.echo(f"{count} users are added; their keys are in {printable(str(keys_out))}", err=True)
