"""`zcproto serve`: run a server."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from typing import TYPE_CHECKING

import click

from zcproto.cli import Instance, instance_options
from zcproto.errors import ConfigError

if TYPE_CHECKING:
    from zcproto.app.app import App
    from zcproto.runtime.server import Server


@click.command()
@instance_options
@click.argument("app", required=False, metavar="[MODULE:APP]")
@click.option("--host", multiple=True, metavar="ADDRESS", help="An address to listen on; may be repeated.")
@click.option("--port", type=int, metavar="N", help="The TCP port; 0 is any free port.")
@click.option("--log-level", metavar="LEVEL", help="debug, info, warning or error.")
def serve(
    app: str | None, host: tuple[str, ...], port: int | None, log_level: str | None, instance: Instance
) -> None:
    """Run a server for your application, or for a built-in one with echo, sleep and time.

    MODULE:APP is an App object, for example `shop.api:app`. SIGTERM and Ctrl-C drain the server: running requests
    finish within server.drain_timeout. A second signal ends it at once.
    """
    overrides = {"server.host": list(host) or None, "server.port": port, "log.level": log_level}
    config = instance.read_config(overrides)
    application = None if app is None else load_app(app)

    from zcproto.runtime.run import serve as run  # noqa: PLC0415 - after the faults of the configuration are reported

    run(
        application,
        config,
        home=instance.home.path,
        ready=_print_addresses,
        progress=lambda message: click.echo(f"zcproto: {message}", err=True),
        read_config=partial(instance.read_config, overrides),
    )


def load_app(name: str) -> App:
    """Return the App object of MODULE:APP. Raises ConfigError."""
    from zcproto.app.app import App  # noqa: PLC0415 - as above

    module_name, colon, attribute = name.partition(":")
    if not colon or not attribute or not all(module_name.split(".")):  # an empty part is a relative name
        raise ConfigError([f"{name!r}: give the application as MODULE:APP, for example shop.api:app"])
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            [f"{name!r}: no module {error.name!r} in this folder or installed; check the name, or install it"]
        ) from error
    except Exception as error:  # raised by the application's code
        raise ConfigError(
            [
                f"{name!r}: {module_name} cannot be imported: it raises {type(error).__name__};"
                " ZCPROTO_DEBUG=1 shows the traceback"
            ]
        ) from error
    application = getattr(module, attribute, None)
    if not isinstance(application, App):
        raise ConfigError([f"{name!r}: {module_name} has no App object named {attribute!r}"])
    return application


def _print_addresses(server: Server) -> None:
    for host, port in server.addresses:
        url_host = f"[{host}]" if ":" in host else host
        click.echo(f"zcproto: listening on {url_host}:{port}")
    sys.stdout.flush()
