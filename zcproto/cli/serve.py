"""`zcproto serve`: run a server."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from zcproto.cli import Instance, instance_options
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError
from zcproto.runtime.serve import serve as run_server

if TYPE_CHECKING:
    from zcproto.app.app import App
    from zcproto.config import Config


@click.command()
@instance_options
@click.argument("app", required=False, metavar="[MODULE:APP]")
@click.option("--host", multiple=True, metavar="ADDRESS", help="An address to listen on; may be repeated.")
@click.option("--port", type=int, metavar="N", help="The TCP port; 0 is any free port.")
@click.option(
    "--workers", metavar="N", help='Processes that serve; "auto" is one for each core. [default: 1]'
)
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
@click.option(
    "--dev", is_flag=True, help="For development: print requests, tracebacks and hints, and check results."
)
@click.option("--reload", is_flag=True, help="Start again when a Python file has changed: for development.")
@click.option(
    "--reload-dir",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    metavar="DIR",
    help="A folder that --reload watches; may be repeated. [default: the current one]",
)
def serve(
    app: str | None,
    host: tuple[str, ...],
    port: int | None,
    workers: str | None,
    log_level: str | None,
    dev: bool,
    reload: bool,
    folders: tuple[Path, ...],
    instance: Instance,
) -> None:
    """Run a server for your application, or for a built-in one with echo, sleep and time.

    MODULE:APP is an App object, for example `shop.api:app`. SIGTERM and Ctrl-C drain the server: running requests
    finish within server.drain_timeout. A second signal ends it at once.
    """
    overrides: dict[str, Any] = {
        "server.host": list(host) or None,
        "server.port": port,
        "server.workers": int(workers) if workers is not None and workers.isdecimal() else workers,
        "log.level": log_level or ("error" if dev else None),
        "log.format": "console" if dev else None,
    }
    config = instance.read_config(overrides)
    if folders and not reload:
        raise click.UsageError("--reload-dir goes with --reload.")
    if reload:
        from zcproto.cli.autoreload import serve_reloading  # noqa: PLC0415 - for development only
        from zcproto.server.listener import bind  # noqa: PLC0415 - as below

        listen = partial(bind, config.server.host, config.server.port)
        serve_reloading(_arguments(instance, overrides, app, dev=dev), folders or (Path(),), listen)
        return
    application = None if app is None else load_app(app)

    options: dict[str, Any] = {"listening": _print_addresses, "progress": _report_progress}
    if dev:
        from zcproto.cli.dev import Development  # noqa: PLC0415 - as above

        development = Development(application, app)
        application = development.app
        options = {"listening": development.print_banner, "ready": development.ready}
    run_server(
        application,
        config,
        home=instance.home.path,
        read_config=partial(_read_again, instance, overrides),
        **options,
    )


def _report_progress(sentence: str) -> None:
    """Print what happens to certificates for people; a program reads one format."""
    from zcproto.server.state import log  # noqa: PLC0415 - as above

    if sys.stderr.isatty():
        click.echo(f"zcproto: {sentence}", err=True)
    elif sentence.startswith("ATTENTION"):
        log.warning("certificate.attention", message=sentence)
    else:
        log.info("certificate.progress", message=sentence)


def _read_again(instance: Instance, overrides: Mapping[str, Any]) -> Config:
    """Read the configuration for a reload. Log the keys of the file that an option of this command overrides."""
    from zcproto.config.checks import split_key, value_of  # noqa: PLC0415 - as above
    from zcproto.server.state import log  # noqa: PLC0415 - as above

    config = in_file = instance.read_config(overrides)
    with contextlib.suppress(ConfigError):  # the file may need the options
        in_file = instance.read_config()
    hidden = []
    for key, value in overrides.items():
        section, name = split_key(key)
        is_set = name in getattr(in_file, section).model_fields_set
        if value is not None and is_set and value_of(config, key) != value_of(in_file, key):
            hidden.append(key)
    if hidden:
        log.warning("config.overridden", restart=hidden, cure="restart without these options")
    return config


def _arguments(instance: Instance, overrides: Mapping[str, Any], app: str | None, *, dev: bool) -> list[str]:
    """Return the arguments of this command for a process that gets its sockets."""
    arguments = ["--home", str(instance.home.path)]
    if instance.config_file is not None:
        arguments += ["--config", str(instance.config_file)]
    arguments += ["serve", "--dev"] if dev else ["serve"]
    for option, key in (("--workers", "server.workers"), ("--log-level", "log.level")):
        if overrides[key] is not None:
            arguments += [option, str(overrides[key])]
    return arguments if app is None else [*arguments, app]


def load_app(name: str) -> App:
    """Return the App object of MODULE:APP. Raises ConfigError."""
    from zcproto.app.app import App  # noqa: PLC0415 - as above

    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute or not all(module_name.split(".")):  # an empty part is a relative name
        raise ConfigError([f"{name!r}: give the application as MODULE:APP, for example shop.api:app"])
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except (
        Exception
    ) as error:  # raised by the application's code, unless it is about the module or its package
        if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
            cure = "check the name, or install it"
            if module_name.endswith(".py"):
                cure = f"write {module_name.removesuffix('.py')}:{attribute}"
            raise ConfigError(
                [f"{name!r}: no module {error.name!r} in this folder or installed; {cure}"]
            ) from error
        raised = "".join(f"\n{line}" for line in _own_lines(error))
        raise ConfigError(
            [f"{name!r}: {module_name} cannot be imported; correct what it raises:{raised}"]
        ) from error
    application = getattr(module, attribute, None)
    if not isinstance(application, App):
        names = ", ".join(each for each, value in vars(module).items() if isinstance(value, App))
        has = f"; it has: {names}" if names else ""
        raise ConfigError([f"{name!r}: {module_name} has no App object named {attribute!r}{has}"])
    return application


def _own_lines(error: Exception) -> list[str]:
    """Return the traceback of an import from the first line of the application on, without secrets."""
    from zcproto.common.exceptions import traceback_lines  # noqa: PLC0415 - only if it fails

    entry = error.__traceback__
    while entry is not None and _is_importing(entry.tb_frame.f_code.co_filename):
        entry = entry.tb_next
    return [escape_text(line) for line in traceback_lines(error.with_traceback(entry))]


def _is_importing(file: str) -> bool:
    return file in (__file__, importlib.__file__) or file.startswith("<frozen importlib")


def _print_addresses(addresses: Sequence[tuple[str, int]]) -> None:
    for host, port in addresses:
        url_host = f"[{host}]" if ":" in host else host
        click.echo(f"zcproto: listening on {url_host}:{port}")
    sys.stdout.flush()
