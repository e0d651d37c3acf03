"""`zcproto serve`: run a server."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zcproto.cli import home_options, read_config
from zcproto.common.home import Home
from zcproto.errors import ConfigError

if TYPE_CHECKING:
    from zcproto.app.app import App
    from zcproto.config import Config
    from zcproto.runtime.server import Server


@click.command()
@home_options
@click.argument("app", required=False, metavar="[MODULE:APP]")
@click.option("--host", multiple=True, metavar="ADDRESS", help="An address to listen on; may be given again.")
@click.option("--port", type=int, metavar="N", help="The TCP port; 0 is any free one.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
def serve(
    app: str | None,
    host: tuple[str, ...],
    port: int | None,
    log_level: str | None,
    home: Home,
    config_file: Path | None,
) -> None:
    """Run a server: an application of yours, or a built-in one with echo, sleep and time.

    MODULE:APP names an App object, for example `shop.api:app`. SIGTERM and Ctrl-C drain the server: what runs
    is finished within server.drain_timeout. A second one ends it at once.
    """
    overrides = {"server.host": list(host) or None, "server.port": port, "log.level": log_level}
    config = read_config(home, config_file, overrides)
    application = None if app is None else load_app(app)

    from zcproto.runtime.run import serve as run  # noqa: PLC0415 - after the faults of the configuration are told

    def read_again() -> Config:
        return read_config(home, config_file, overrides)

    run(
        application,
        config,
        home=home.path,
        ready=_tell,
        progress=_tell_progress,
        read_config=read_again,
    )


def load_app(name: str) -> App:
    """The App object that MODULE:APP names. Raises ConfigError that says what is wrong."""
    from zcproto.app.app import App  # noqa: PLC0415 - see above

    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute or not all(module_name.split(".")):  # no part is empty: no relative name
        raise ConfigError([f"{name!r}: name the application as MODULE:APP, for example shop.api:app"])
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"{name!r}: there is no module {error.name!r} here or among the installed ones"]
        ) from error
    except Exception as error:  # whatever the application's own code raises
        raise ConfigError(
            [
                f"{name!r}: {module_name} cannot be imported: it raises {type(error).__name__};"
                " with ZCPROTO_DEBUG=1 it tells where"
            ]
        ) from error
    application = getattr(module, attribute, None)
    if not isinstance(application, App):
        raise ConfigError([f"{name!r}: {module_name} has no App object named {attribute!r}"])
    return application


def _tell(server: Server) -> None:
    for host, port in server.addresses:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"zcproto: listening on {shown}:{port}")
    sys.stdout.flush()


def _tell_progress(sentence: str) -> None:
    click.echo(f"zcproto: {sentence}", err=True)
