"""`zcproto config`, `zcproto deploy` and `zcproto new`: the files from which a server is set up."""

from __future__ import annotations

import contextlib
import os
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from zcproto.cli import Instance, command_group, force_option, instance_options, out_option
from zcproto.cli.control import ControlError, find_control
from zcproto.cli.output import private_file
from zcproto.cli.serve import load_app
from zcproto.common.files import file_errors
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.config import Config, config_as_toml, default_config, default_config_file
from zcproto.errors import ConfigError, ZcprotoError

if TYPE_CHECKING:
    from zcproto.runtime.preflight import Fault

TOOLS = ("systemd", "container", "compose", "kubernetes", "prometheus", "grafana")
"""The folders of zcproto/deploy."""

_PASSWORD = re.compile(r'(?m)^(url = "[a-z+]+://[^"/@:]*):[^"@]*@')

_WEBHOOK = re.compile(r'(?m)^(webhook = "https?://[^"/?]+[/?])[^"]+"')


CONTROL_S = 10.0
"""Seconds for which a running server may take to check its configuration."""

app_option = click.option(
    "--app", metavar="MODULE:APP", help="The application, whose methods auth.role must match."
)

config = command_group("config", "Create, check and show the configuration.")


@config.command()
@click.option(
    "--force", is_flag=True, help="Replace an existing file, and keep it beside the new one, as FILE~."
)
@instance_options
def init(instance: Instance, force: bool) -> None:
    """Write a commented file with every key and its default."""
    path = instance.config_file or instance.home.config
    copy = path.with_name(f"{path.name}~")
    if instance.config_file is None:
        instance.home.ensure()
    is_kept = _keep(path, copy, force)
    try:
        with file_errors(path, "written"), private_file(path, replace=force) as file:
            file.write(default_config_file(instance.home.path))
    except BaseException:
        if is_kept:
            copy.unlink(missing_ok=True)
        raise
    kept = f", the old one is {escape_text(str(copy))}" if is_kept else ""
    click.echo(f"{escape_text(str(path))}: written{kept}; uncomment the keys that you want to set")


def _keep(path: Path, copy: Path, force: bool) -> bool:
    """Give an existing file a second name; return whether there is one. Raises ZcprotoError without `force`."""
    file, kept = escape_text(str(path)), escape_text(str(copy))
    if not os.path.lexists(path):
        return False
    if not force:
        raise ZcprotoError(
            f"{file}: already exists; zcproto config check finds its faults, --force keeps it as {kept}"
        )
    try:
        os.link(path, copy, follow_symlinks=False)
    except FileExistsError:
        raise ZcprotoError(f"{kept}: is a replaced configuration; move it away first") from None
    except OSError as error:
        raise ZcprotoError(f"{file}: cannot be kept: {error.strerror}; move it away instead") from error
    return True


@config.command()
@app_option
@instance_options
def check(instance: Instance, app: str | None) -> None:
    """Report everything that would prevent the start of a server. Exit code 2 if there is something.

    It checks the file, the environment, and the files, programs and ports that they name. Run it as the server's
    user. A running server checks the file too, in its own environment.
    """
    faults: list[str] = []
    try:
        if instance.home.path.exists():
            instance.home.ensure()
    except ConfigError as error:
        faults += error.faults
    try:
        checked = check_start(instance.existing_config(), instance.home, app, CONTROL_S)
    except ConfigError as error:
        faults += error.faults
    else:
        faults += (fault.message for fault in checked.faults)
        for note in checked.notes:
            click.echo(f"zcproto: {note}", err=True)
    if faults:
        raise ConfigError([*dict.fromkeys(faults)])  # the file may be in the home folder
    path = instance.config_file or instance.home.config
    click.echo(f"{escape_text(str(path))}: valid" if path.exists() else f"valid: {no_file(path)}")


def no_file(path: Path) -> str:
    """Describe a configuration that does not exist, which is valid."""
    name = escape_text(str(path))
    return f"{name} does not exist, so all keys have their defaults; zcproto config init writes it"


class StartCheck(NamedTuple):
    """What would prevent the start of a server, and what could not be checked."""

    faults: list[Fault]
    notes: list[str]
    status: dict[str, Any] | None
    """Of the server that runs with this home folder; None if none does, or it cannot be asked."""
    is_running: bool


def check_start(config: Config, home: Home, app: str | None, timeout: float) -> StartCheck:
    """Return what would prevent the start of a server. One that runs checks the configuration that it would reload.

    `app` is the application as MODULE:APP. Raises ConfigError if it cannot be imported.
    """
    from zcproto.runtime.preflight import Fault, preflight  # noqa: PLC0415 - imports a whole server

    application = None if app is None else load_app(app)
    notes: list[str] = []
    status: dict[str, Any] | None = None
    refused: list[str] = []
    is_running = True
    try:
        with contextlib.ExitStack() as stack:
            server = find_control(home, timeout)
            if server is None:
                is_running = False
                if application is None and config.auth.role:
                    notes.append("auth.role is not checked; give the application with --app MODULE:APP")
            else:
                stack.callback(server.close)
                status = server.get("/v1/status")
                server.get("/v1/reload")
    except ConfigError as error:
        refused = error.faults
    except ControlError as error:
        notes.append(str(error))
    faults = preflight(config, home, application, running=config if is_running else None)
    known = {fault.message for fault in faults}
    faults += (Fault("reload", message) for message in refused if message not in known)
    return StartCheck(faults, notes, status, is_running)


@config.command()
@click.option("--changed", is_flag=True, help="Only those that differ from the defaults.")
@instance_options
def show(instance: Instance, changed: bool) -> None:
    """Print the effective settings, from the file, the environment and the defaults.

    Passwords in addresses are hidden, and so is the path of a webhook, which may be a secret too.
    """
    found = instance.existing_config()
    path = instance.config_file or instance.home.config
    if not path.exists():
        click.echo(f"zcproto: {no_file(path)}", err=True)
    text = config_as_toml(found, default_config(instance.home.path) if changed else None)
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
    else:
        write_files(texts, out, force=force)


@click.command()
@click.argument("folder", metavar="NAME", type=click.Path(path_type=Path, file_okay=False))
def new(folder: Path) -> None:
    """Write a small application with a test, a configuration and a Containerfile, into the new folder NAME.

    Nothing that exists is replaced.
    """
    write_files(read_files("application"), folder, force=False)


def write_files(texts: dict[str, str], out: Path, *, force: bool) -> None:
    """Write files into a folder and print their paths. Raises ZcprotoError if one exists, without `force`."""
    for name, text in texts.items():
        path = out / name
        try:
            out.mkdir(parents=True, exist_ok=True)
            with path.open("w" if force else "x", encoding="utf-8") as file:
                file.write(text)
            path.chmod(path.stat().st_mode & ~0o022)  # a configuration that others can change is refused
        except FileExistsError:
            raise ZcprotoError(f"{escape_text(str(path))}: already exists; --force replaces it") from None
        except OSError as error:
            raise ZcprotoError(f"{escape_text(str(path))}: cannot be written: {error.strerror}") from error
        click.echo(path)


def read_files(tool: str) -> dict[str, str]:
    """Return the files of a folder of zcproto/deploy: their names with their text, sorted."""
    paths = sorted((files("zcproto") / "deploy" / tool).iterdir(), key=lambda path: path.name)
    return {path.name.removesuffix(".in"): path.read_text(encoding="utf-8") for path in paths}
