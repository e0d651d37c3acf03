"""`zcproto reload`, `drain` and `log level`: requests to a running server through its control socket."""

from __future__ import annotations

import time

import click

from zcproto.cli import Instance, command_group, instance_options
from zcproto.cli.control import ControlError, find_control, require_control
from zcproto.cli.output import as_json_option, print_json, table
from zcproto.common.home import Home

LEVELS = ("debug", "info", "warning", "error")
POLL_S = 0.2
MARGIN_S = 30.0
"""Seconds beyond the limit of a drain within which a server ends."""


@click.command()
@as_json_option
@instance_options
def reload(instance: Instance, as_json: bool) -> None:
    """Read the configuration again and apply all changes that need no restart, or nothing.

    Prints what changed, and what needs a restart. No connection is closed. Exit code 2 if the configuration has
    faults; then nothing has changed. SIGHUP does the same, and logs the result.
    """
    done = require_control(instance.home).post("/v1/reload")
    if as_json:
        print_json(done, indent=2)
        return
    if not done["changed"] and not done["restart"]:
        click.echo("nothing has changed")
        return
    rows = [
        [each["key"], *_values(each), "restart needed" if each["effect"] == "restart" else each["effect"]]
        for each in [*done["changed"], *done["restart"]]
    ]
    click.echo(table(["KEY", "OLD", "NEW", "APPLIES TO"], rows))
    if done["restart"]:
        click.echo(f"{len(done['restart'])} of these apply after a restart of the server", err=True)


def _values(change: dict[str, str]) -> list[str]:
    if not change["old"] and not change["new"]:
        return ["(hidden)", "(hidden)"]
    return [change["old"], change["new"]]


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds for running requests to finish. [default: server.drain_timeout]",
)
@click.option("--wait", is_flag=True, help="Wait until the server has ended.")
@as_json_option
@instance_options
def drain(instance: Instance, timeout: float | None, wait: bool, as_json: bool) -> None:
    """Stop accepting connections, finish running requests, and end the server. SIGTERM does the same."""
    done = require_control(instance.home).post("/v1/drain", timeout=timeout)
    if wait:
        _wait_for_end(instance.home, done["timeout"] + MARGIN_S)
    if as_json:
        print_json({**done, "ended": wait})
    elif wait:
        click.echo("the server has ended", err=True)
    else:
        click.echo(
            f"the server drains {done['connections']} connections within {done['timeout']:g} s", err=True
        )


def _wait_for_end(home: Home, seconds: float) -> None:
    for _ in range(int(seconds / POLL_S)):
        found = find_control(home)
        if found is None:
            return
        found.close()
        time.sleep(POLL_S)
    raise ControlError(f"the server still runs after {seconds:g} s; see its log")


log = command_group("log", "Show and set the log level of a running server.")


@log.command()
@click.argument("wanted", metavar="[LEVEL]", required=False, type=click.Choice(LEVELS))
@as_json_option
@instance_options
def level(instance: Instance, wanted: str | None, as_json: bool) -> None:
    """Print the log level of the server, or set it until the server ends or log.level is changed.

    LEVEL is debug, info, warning or error; less severe events are not written.
    """
    server = require_control(instance.home)
    done = server.get("/v1/log") if wanted is None else server.post("/v1/log", level=wanted)
    if as_json:
        print_json(done)
    elif wanted is None:
        click.echo(done["level"])
    else:
        click.echo(f"the log level is {done['level']} now; it was {done['before']}", err=True)
