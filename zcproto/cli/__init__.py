"""The command line: `zcproto COMMAND`.

Rules: a command's module is imported when the command is used, so that `zcproto --help` is quick and only the
commands that need an extra import it. An error is one message on standard error and an exit code, never a traceback
(ZCPROTO_DEBUG=1 shows it):

    0    done
    1    failed
    2    wrong usage, configuration or certificates; nothing was started
    3    no connection to a server
    130  ended by Ctrl-C
    141  the reader of the output has closed it
"""

from __future__ import annotations

import errno
import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem, shell_complete

from zcproto.common.home import Home, resolve_home
from zcproto.common.text import escape_text, extra_cure
from zcproto.errors import CertificateError, ConfigError, ZcprotoError

if TYPE_CHECKING:
    from zcproto.config import Config

__all__ = ["Instance", "command_group", "group", "instance_options", "main"]

COMMANDS = {
    "new": ("zcproto.cli.config:new", "Write a small application with a test and a configuration."),
    "serve": ("zcproto.cli.serve:serve", "Run a server for your application, or a built-in one."),
    "status": ("zcproto.cli.status:status", "Show the status of a running server, once or continuously."),
    "health": ("zcproto.cli.health:health", "Check that a running server answers, for containers."),
    "reload": ("zcproto.cli.control:reload", "Apply a changed configuration to a running server."),
    "drain": ("zcproto.cli.control:drain", "Let a running server finish its requests and end."),
    "upgrade": (
        "zcproto.cli.control:upgrade",
        "Replace a running server by a new one, without a lost request.",
    ),
    "calls": ("zcproto.cli.control:calls", "List and answer calls that wait for a user."),
    "topic": ("zcproto.cli.control:topic", "Publish events in the topics of a running server."),
    "log": ("zcproto.cli.control:log", "Show and set the log level of a running server."),
    "call": ("zcproto.cli.connect:call", "Call a method of a server and print the result."),
    "login": ("zcproto.cli.login:login", "Log in at an identity provider, for `zcproto call --login`."),
    "stubs": ("zcproto.cli.stubs:stubs", "Write a typed client for the methods of a server."),
    "user": ("zcproto.cli.user:user", "Add, list and change users."),
    "session": ("zcproto.cli.session:session", "List, open and end sessions."),
    "store": ("zcproto.cli.store:store", "Check the session store, and migrate to another one."),
    "cert": ("zcproto.cli.cert:cert", "Show, check, renew and issue certificates."),
    "device": ("zcproto.cli.user:device", "List and remove devices."),
    "pair": ("zcproto.cli.user:pair", "Print a one-time code that enrolls a device."),
    "token": ("zcproto.cli.token:token", "Create, list and revoke tokens for machines such as Prometheus."),
    "alert": ("zcproto.cli.alert:alert", "List alerts, test their delivery, verify a signature."),
    "doctor": ("zcproto.cli.doctor:doctor", "Diagnose a server, or the connection to one."),
    "deploy": ("zcproto.cli.config:deploy", "Print files for systemd, containers, Kubernetes, Prometheus."),
    "config": ("zcproto.cli.config:config", "Create, check and show the configuration."),
    "demo": ("zcproto.cli.bench:demo", "Open 10,000 verified connections to a server of its own."),
    "bench": ("zcproto.cli.bench:bench", "Measure a server under load."),
}
"""Module and purpose of each command."""

OTHER_NAMES = {
    **dict.fromkeys(("run", "start", "up", "runserver", "server"), "serve"),
    **dict.fromkeys(("stop", "shutdown", "down", "quit"), "drain"),
    **dict.fromkeys(("restart",), "upgrade"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
    **dict.fromkeys(("ping",), "health"),
}
"""Names that people try for commands, by those of other programs."""

EXTRAS = {
    "acme": "acme",
    "hdrh": "hdr",
    "jwt": "oidc",
    "redis": "valkey",
    "watchfiles": "reload",
}
"""Packages of the extras of zcproto."""

EXIT_FAILED = 1
EXIT_UNUSABLE = 2
EXIT_INTERRUPTED = 130
EXIT_NO_READER = 141

COMPLETION = "_ZCPROTO_COMPLETE"
"""The variable by which a shell asks for completions, or for its script (docs/commands.md)."""

MAX_MESSAGE = 2000
MAX_FAULTS = 200

_META = "zcproto."

Function = TypeVar("Function", bound=Callable[..., Any])


class Group(click.Group):
    """A group whose commands have an example, and whose help shows what they do in full."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = self._find_command(ctx, cmd_name)
        if command is not None:
            from zcproto.cli.examples import EXAMPLES  # noqa: PLC0415 - `--help` alone needs none

            example = EXAMPLES.get(" ".join([*ctx.command_path.split()[1:], cmd_name]))
            command.epilog = f"\b\nExample:\n  {example}" if example else None
        return command

    def _find_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return super().get_command(ctx, name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(self._purposes(ctx))

    def _purposes(self, ctx: click.Context) -> list[tuple[str, str]]:
        return [(name, command.get_short_help_str(MAX_MESSAGE)) for name, command in self.commands.items()]


class _LazyGroup(Group):
    """A group that imports its commands from `COMMANDS` on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def _find_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in COMMANDS:
            meant = OTHER_NAMES.get(args[0]) or next(iter(get_close_matches(args[0][:60], COMMANDS, 1)), None)
            hint = f"did you mean {meant}?" if meant else f"commands: {', '.join(COMMANDS)}."
            raise click.UsageError(f"No command {escape_text(args[0], 60)!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete the name of a command without importing any."""
        found = [
            CompletionItem(name, help=purpose)
            for name, (_, purpose) in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]

    def _purposes(self, ctx: click.Context) -> list[tuple[str, str]]:
        return [(name, purpose) for name, (_, purpose) in COMMANDS.items()]


def _print_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from importlib import metadata  # noqa: PLC0415 - rarely used, and slow to import

        from zcproto import accelerator  # noqa: PLC0415

        try:
            version = metadata.version("zcproto")
        except metadata.PackageNotFoundError:
            version = "(not installed)"
        click.echo(f"zcproto {version}")
        click.echo(f"accelerator: {accelerator.describe()}")
        ctx.exit()


def _remember(ctx: click.Context, param: click.Parameter, value: Path | None) -> None:
    # Nested contexts share `meta`, so an option after the command overrides the same option before it.
    if value is not None:
        ctx.meta[f"{_META}{param.name}"] = value


_FLAGS = (
    click.option(
        "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
        help="Print the version and exit.",
    ),
    click.option(
        "--config", type=click.Path(path_type=Path), metavar="FILE", expose_value=False, callback=_remember,
        help="The configuration. [default: config.toml in the home folder, if it exists]",
    ),
    click.option(
        "--home", type=click.Path(path_type=Path), metavar="DIR", expose_value=False, callback=_remember,
        help="The home folder. [default: $ZCPROTO_HOME, else ~/.zeroclaw]",
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Instance:
    """What a command works on: the server that runs with these, or their files."""

    home: Home
    """It may not exist yet."""
    config_file: Path | None
    """The value of --config."""

    def read_config(self, overrides: Mapping[str, Any] | None = None) -> Config:
        """Read the configuration of this process. `overrides` are settings by dotted keys. Raises ConfigError."""
        from zcproto.config import load_config  # noqa: PLC0415 - importing pydantic takes longer than `--help` may

        settings = overrides or {}
        return load_config(self.config_file, home=self.home.path, environ=os.environ, overrides=settings)

    def existing_config(self) -> Config:
        """Read the configuration for a command that reads files. Raises ConfigError if there is no home folder."""
        if self.config_file is None:
            self.home.require()
        return self.read_config()


def instance_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --home, --config and --version to a command, which gets `instance`. They may also stand before it."""

    @functools.wraps(function)
    def with_instance(*args: Any, **kwargs: Any) -> Any:
        meta = click.get_current_context().meta
        home = resolve_home(meta.get(f"{_META}home"), os.environ)
        return function(*args, instance=Instance(home, meta.get(f"{_META}config")), **kwargs)

    for flag in _FLAGS:
        flag(with_instance)
    return with_instance


def command_group(name: str, text: str) -> click.Group:
    """Return a group of commands. `text` is its help."""
    return click.group(name, cls=Group, help=text)(instance_options(lambda instance: None))


def number_option(
    name: str, kind: click.ParamType[Any], default: float, metavar: str, text: str
) -> Callable[[Function], Function]:
    """Return an option whose help shows its default."""
    return click.option(name, type=kind, default=default, show_default=True, metavar=metavar, help=text)


def file_option(
    *names: str, text: str, metavar: str = "FILE", envvar: str | None = None, **path: bool
) -> Callable[[Function], Function]:
    """Return an option whose value is a path. `path` are settings of click.Path."""
    kind = click.Path(path_type=Path, **path)
    return click.option(
        *names, type=kind, metavar=metavar, envvar=envvar, show_envvar=envvar is not None, help=text
    )


def out_option(text: str, *, is_folder: bool = False) -> Callable[[Function], Function]:
    """Return the option of the file or the folder that a command writes."""
    metavar = "DIR" if is_folder else "FILE"
    return file_option("--out", "-o", text=text, metavar=metavar, file_okay=not is_folder, dir_okay=is_folder)


force_option = click.option("--force", is_flag=True, help="Replace existing files.")


@click.group("zcproto", cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@instance_options
def group(instance: Instance) -> None:
    """RPC over TLS 1.3, with sessions and certificates that renew themselves."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code. `args` are those of the process by default."""
    try:
        code = _run(list(sys.argv[1:] if args is None else args))
        if sys.stdout is not None:
            sys.stdout.flush()
    except (KeyboardInterrupt, click.Abort):
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes again when it ends, and would report the error.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        return EXIT_NO_READER
    except click.ClickException as error:
        _show(error)
        return error.exit_code
    except Exception as error:  # the last resort: show one message
        if os.environ.get("ZCPROTO_DEBUG") == "1":
            traceback.print_exception(error)
        _report(_explain(error))
        return EXIT_UNUSABLE if isinstance(error, ConfigError | CertificateError) else EXIT_FAILED
    return code


def _run(args: list[str]) -> int:
    shell = os.environ.get(COMPLETION)
    if shell:
        return shell_complete(group, {}, "zcproto", COMPLETION, shell)
    try:
        with group.make_context("zcproto", args) as context:
            result = group.invoke(context)
    except click.exceptions.Exit as end:
        return end.exit_code
    return result if isinstance(result, int) else 0


def _show(error: click.ClickException) -> None:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    if isinstance(error, click.UsageError) and error.ctx is not None:
        path = error.ctx.command_path
        _report(f"{error.ctx.get_usage()}\nTry '{path} --help' for help.\n")
    _report(f"zcproto: {error.format_message()}")


def _report(text: str) -> None:
    """Print an error. The journal of systemd gets it with the priority of errors (sd-daemon(3))."""
    if "JOURNAL_STREAM" in os.environ:
        from zcproto.observe.output import is_journal  # noqa: PLC0415 - services only

        if is_journal(sys.stderr):
            text = "\n".join(f"<3>{line}" for line in text.splitlines())
    click.echo(text, err=True)


def _explain(error: Exception) -> str:
    if isinstance(error, ConfigError):
        more = len(error.faults) - MAX_FAULTS
        shown = [*error.faults[:MAX_FAULTS], *([f"and {more} more"] if more > 0 else [])]
        return "\n".join(f"zcproto: {fault}" for fault in shown)
    if isinstance(error, ZcprotoError):
        # A message can come from the peer.
        return f"zcproto: {escape_text(str(error) or type(error).__name__, MAX_MESSAGE)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        cure = f"; {extra_cure(EXTRAS[package])}" if package in EXTRAS else ""
        return f"zcproto: the Python package {error.name} is required and not installed{cure}"
    if isinstance(error, OSError) and error.strerror:
        where = f"{escape_text(str(error.filename))}: " if error.filename is not None else ""
        cure = "; raise the limit with ulimit -n" if error.errno == errno.EMFILE else ""
        return f"zcproto: {where}{error.strerror}{cure}"
    # The message of any other exception may contain a secret.
    return f"zcproto: internal error ({type(error).__name__}); ZCPROTO_DEBUG=1 shows the traceback"
