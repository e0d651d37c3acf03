"""`zcproto config`: create, check and show the configuration."""

from __future__ import annotations

import re

import click

from zcproto.cli import Instance, command_group, instance_options
from zcproto.cli.output import private_file
from zcproto.common.text import escape_text
from zcproto.config import config_as_toml, default_config_file
from zcproto.errors import ConfigError

_PASSWORD = re.compile(r'(?m)^(url = "[a-z+]+://[^"/@:]*):[^"@]*@')

_WEBHOOK = re.compile(r'(?m)^(webhook = "https?://[^"/?]+[/?])[^"]+"')


config = command_group("config", "Create, check and show the configuration.")


@config.command()
@click.option("--force", is_flag=True, help="Replace an existing file.")
@instance_options
def init(instance: Instance, force: bool) -> None:
    """Write a commented file with every key and its default."""
    path = instance.config_file or instance.home.config
    if instance.config_file is None:
        instance.home.ensure()
    with private_file(path, replace=force) as file:
        file.write(default_config_file(instance.home.path))
    click.echo(f"{escape_text(str(path))}: written; uncomment the keys that you want to set")


@config.command()
@instance_options
def check(instance: Instance) -> None:
    """Report every fault of the file and of the environment. Exit code 2 if there is one."""
    faults: list[str] = []
    try:
        if instance.home.path.exists():
            instance.home.ensure()
    except ConfigError as error:
        faults += error.faults
    try:
        instance.read_config()
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError(faults)
    path = instance.config_file or instance.home.config
    subject = escape_text(str(path)) if path.exists() else "no file, all keys have their defaults"
    click.echo(f"{subject}: valid")


@config.command()
@instance_options
def show(instance: Instance) -> None:
    """Print the effective settings, from the file, the environment and the defaults.

    Passwords in addresses are hidden, and so is the path of a webhook, which may be a secret too.
    """
    text = config_as_toml(instance.read_config())
    text = _WEBHOOK.sub(r'\1(hidden)"', text)
    click.echo(_PASSWORD.sub(r"\1:(hidden)@", text), nl=False)
