"""`zcproto config` and `zcproto deploy`: the files from which an operator sets up a server."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import click

from zcproto.cli import Instance, command_group, force_option, instance_options, out_option
from zcproto.cli.output import private_file
from zcproto.common.text import escape_text
from zcproto.config import config_as_toml, default_config_file
from zcproto.errors import ConfigError, ZcprotoError

TOOLS = ("systemd", "container", "compose", "kubernetes", "prometheus", "grafana")
"""The folders of zcproto/deploy."""

_PASSWORD = re.compile(r'(?m)^(url = "[a-z+]+://[^"/@:]*):[^"@]*@')

_WEBHOOK = re.compile(r'(?m)^(webhook = "https?://[^"/?]+[/?])[^"]+"')


config = command_group("config", "Create, check and show the configuration.")


@config.command()
@force_option
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
        instance.existing_config()
    except ConfigError as error:
        faults += error.faults
    if faults:
        raise ConfigError([*dict.fromkeys(faults)])  # the file may be in the home folder
    path = instance.config_file or instance.home.config
    subject = escape_text(str(path)) if path.exists() else "no file, all keys have their defaults"
    click.echo(f"{subject}: valid")


@config.command()
@instance_options
def show(instance: Instance) -> None:
    """Print the effective settings, from the file, the environment and the defaults.

    Passwords in addresses are hidden, and so is the path of a webhook, which may be a secret too.
    """
    text = config_as_toml(instance.existing_config())
    text = _WEBHOOK.sub(r'\1(hidden)"', text)
    click.echo(_PASSWORD.sub(r"\1:(hidden)@", text), nl=False)


@click.command()
@click.argument("tool", type=click.Choice(TOOLS), metavar="|".join(TOOLS))
@out_option("Write the files into this folder.", is_folder=True)
@force_option
def deploy(tool: str, out: Path | None, force: bool) -> None:
    """Print the files for a tool, or write them with --out.

    systemd: a hardened service, a socket and a system user. container: a Containerfile. compose: a server and
    Valkey in containers. kubernetes: replicas of a server, with Valkey. prometheus: alert rules. grafana: a
    dashboard.
    """
    texts = read_files(tool)
    if out is None:
        for name, text in texts.items():
            click.echo(f"# {name}\n{text}" if len(texts) > 1 else text, nl=False)
        return
    for name, text in texts.items():
        path = out / name
        try:
            out.mkdir(parents=True, exist_ok=True)
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise ZcprotoError(f"{escape_text(str(path))}: already exists; --force replaces it") from None
        except OSError as error:
            raise ZcprotoError(f"{escape_text(str(path))}: cannot be written: {error.strerror}") from error
        click.echo(path)


def read_files(tool: str) -> dict[str, str]:
    """Return the files for one of TOOLS: their names with their text, sorted."""
    paths = sorted((files("zcproto") / "deploy" / tool).iterdir(), key=lambda path: path.name)
    return {path.name: path.read_text(encoding="utf-8") for path in paths}
