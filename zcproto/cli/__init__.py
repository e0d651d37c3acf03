"""The command line: `zcproto COMMAND`.

Rules: a command's module is imported when the command is used, so that `zcproto --help` is quick and an extra
is needed only by whoever uses it. An error is one clear text on standard error and an exit code, never a
traceback (ZCPROTO_DEBUG=1 shows it):

    0    done
    1    it did not work
    2    wrong usage, configuration or certificates; nothing was started
    130  ended by Ctrl-C
    141  nobody reads the output any more
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import click

from zcproto.common.home import resolve_home
from zcproto.common.text import escape_text
from zcproto.errors import CertificateError, ConfigError, ZcprotoError

if TYPE_CHECKING:
    from zcproto.common.home import Home
    from zcproto.config import Config

__all__ = ["group", "home_options", "main", "read_config"]

COMMANDS = {
    "serve": ("zcproto.cli.serve:serve", "Run a server: an application of yours, or a built-in one."),
    "status": ("zcproto.cli.status:status", "Show what a running server does, once or live."),
    "reload": ("zcproto.cli.running:reload", "Have a running server read its configuration again."),
    "drain": ("zcproto.cli.running:drain", "Have a running server finish what runs, and end."),
    "log": ("zcproto.cli.running:log", "See and set how much a running server logs."),
    "call": ("zcproto.cli.call:call", "Call a method of a server and print the result."),
    "user": ("zcproto.cli.user:user", "Add, list and change users, who may open sessions."),
    "session": ("zcproto.cli.session:session", "See who has sessions, and end them."),
    "store": ("zcproto.cli.store:store", "Check where sessions are kept, and bring them elsewhere."),
    "cert": ("zcproto.cli.cert:cert", "See, check, renew and hand out certificates."),
    "device": ("zcproto.cli.device:device", "List and remove devices, which open sessions by a key."),
    "pair": ("zcproto.cli.pair:pair", "Print a one-time code that lets in a device."),
    "alert": ("zcproto.cli.alert:alert", "List alerts, try whether they arrive, and check a signature."),
    "doctor": (
        "zcproto.cli.doctor:doctor",
        "See what is wrong with a server or the way to it, and what to do.",
    ),
    "deploy": ("zcproto.cli.deploy:deploy", "Print the files that systemd, Prometheus and Grafana need."),
    "config": ("zcproto.cli.config:config", "Begin, check and show the configuration."),
    "demo": ("zcproto.cli.demo:demo", "See 10,000 verified connections to a server of its own."),
    "bench": ("zcproto.cli.bench:bench", "Measure a server under load."),
}
"""Each command with where it is and what it is for."""

EXTRAS = {"hdrh": "bench", "matplotlib": "bench", "redis": "valkey", "rich": "bench"}
"""Packages that come with an extra of this one."""

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

MAX_MESSAGE = 2000
MAX_FAULTS = 200

_META = "zcproto."
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class _LazyGroup(click.Group):
    """A group whose commands come from `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            near = get_close_matches(args[0][:60], COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
            raise click.UsageError(f"No command {escape_text(args[0], 60)!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, purpose) for name, (_, purpose) in COMMANDS.items()])


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib import metadata  # noqa: PLC0415 - rarely used, and slow to import

        try:
            version = metadata.version("zcproto")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"zcproto {version}")
        ctx.exit()


def _remember(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    # `meta` is one for all nested contexts, so what stands after a command overrides what stands before it.
    if value is not None:
        ctx.meta[f"{_META}{param.name}"] = value


_FLAGS = (
    click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
        help="Print the version and exit.",
    ),
    click.option(
        "--config", type=click.Path(path_type=Path), metavar="FILE", expose_value=False, callback=_remember,
        help="The configuration. [default: config.toml in the home folder, if there]",
    ),
    click.option(
        "--home", type=click.Path(path_type=Path), metavar="DIR", expose_value=False, callback=_remember,
        help="The home folder. [default: $ZCPROTO_HOME, else ~/.zeroclaw]",
    ),
)  # fmt: skip


def home_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Gives a command --home, --config and --version, which may stand before the command as well.

    `function` is called with `home: Home`, not yet made, and `config_file: Path | None`.
    """

    @functools.wraps(function)
    def with_home(*args: Any, **kwargs: Any) -> Any:
        meta = click.get_current_context().meta
        home = resolve_home(meta.get(f"{_META}home"), os.environ)
        return function(*args, home=home, config_file=meta.get(f"{_META}config"), **kwargs)

    for flag in _FLAGS:
        flag(with_home)
    return with_home


def read_config(home: Home, config_file: Path | None, overrides: Mapping[str, Any] = _NOTHING) -> Config:
    """The configuration of this process. `overrides` are settings from options, by their dotted keys.

    Raises ConfigError.
    """
    from zcproto.config import load_config  # noqa: PLC0415 - pydantic takes longer to import than `--help` may last

    return load_config(config_file, home=home.path, environ=os.environ, overrides=overrides)


@click.group("zcproto", cls=_LazyGroup)
@home_options
def group(home: Home, config_file: Path | None) -> None:
    """Calls over TLS 1.3, with sessions and certificates that look after themselves."""


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line `args`, that of the process by default. Returns the exit code."""
    try:
        code = _run(list(sys.argv[1:] if args is None else args))
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain then.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return EXIT_NO_READER
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:  # the last resort: whatever it is, a person reads one clear text
        if os.environ.get("ZCPROTO_DEBUG") == "1":
            traceback.print_exception(error)
        click.echo(_explain(error), err=True)
        return EXIT_UNUSABLE if isinstance(error, ConfigError | CertificateError) else EXIT_FAILED
    return code


def _run(args: list[str]) -> int:
    try:
        with group.make_context("zcproto", args) as context:
            result = group.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return result if isinstance(result, int) else 0


def _explain(error: Exception) -> str:
    if isinstance(error, ConfigError):
        more = len(error.faults) - MAX_FAULTS
        return "\n".join([*error.faults[:MAX_FAULTS], *([f"and {more} more"] if more > 0 else [])])
    if isinstance(error, ZcprotoError):
        # A message can come from the peer.
        return f"zcproto: {escape_text(str(error) or type(error).__name__, MAX_MESSAGE)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        cure = f'; run: pip install "zcproto[{EXTRAS[package]}]"' if package in EXTRAS else ""
        return f"zcproto: this needs the Python package {error.name}, which is not installed{cure}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{escape_text(str(error.filename))}: " if error.filename is not None else ""
        return f"zcproto: {where}{error.strerror}"
    # The message of any other exception can hold anything, a secret too.
    return f"zcproto: a fault of this program ({type(error).__name__}); with ZCPROTO_DEBUG=1 it tells where"
