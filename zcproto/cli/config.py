"""`zcproto config`: create, check and show the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import click

from zcproto.cli import home_options, read_config
from zcproto.cli.output import private_file
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.config import config_as_toml, default_config_file
from zcproto.errors import ConfigError

_PASSWORD = re.compile(r'(?m)^(url = "[a-z+]+://[^"/@:]*):[^"@]*@')

_WEBHOOK = re.compile(r'(?m)^(webhook = "https?://[^"/?]+[/?])[^"]+"')


@click.group()
@home_options
def config(home: Home, config_file: Path | None) -> None:
    """Create, check and show the configuration."""


@config.command()
@click.option("--force", is_flag=True, help="Replace an existing file.")
@home_options
def init(home: Home, config_file: Path | None, force: bool) -> None:
    """Write a commented file with every key and its default."""
    path = config_file or home.config
    if config_file is None:
        home.ensure()
    with private_file(path, replace=force) as file:
        file.write(default_config_file(home.path))
    click.echo(f"{escape_text(str(path))}: written; uncomment the keys that you want to set")


@config.command()
@home_options
def check(home: Home, config_file: Path | None) -> None:
    """Report every fault of the file and of the environment. Exit code 2 if there is one."""
    faults: list[str] = []
    try:
        if home.path.exists():
            home.ensure()
    except ConfigError as error:
        faults += error.faults
    try:
        read_config(home, config_file)
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    path = config_file or home.config
    subject = escape_text(str(path)) if path.exists() else "no file, all keys have their defaults"
    click.echo(f"{subject}: valid")


@config.command()
@home_options
def show(home: Home, config_file: Path | None) -> None:
    """Print the effective settings, from the file, the environment and the defaults.

    Passwords in addresses are hidden, and so is the path of a webhook, which may be a secret too.
    """
    text = config_as_toml(read_config(home, config_file))
    text = _WEBHOOK.sub(r'\1(hidden)"', text)
    click.echo(_PASSWORD.sub(r"\1:(hidden)@", text), nl=False)
