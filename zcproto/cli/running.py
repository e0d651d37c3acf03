"""`zcproto reload`, `drain` and `log level`: what a running server is told. It is asked by its control socket."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from zcproto.cli import home_options
from zcproto.cli.control import ControlError, control_of, needed_control
from zcproto.cli.table import table
from zcproto.common.home import Home

LEVELS = ("debug", "info", "warning", "error")
LOOK_S = 0.2
MARGIN_S = 30.0
"""Seconds beyond the limit of a drain in which a server ends."""

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command()
@as_json_option
@home_options
def reload(home: Home, config_file: Path | None, as_json: bool) -> None:
    """Have the server read its configuration again, and put it in force: all that can be, or nothing.

    Prints what changed, and what takes a restart. No connection is closed. Exit code 2 if there are faults; then
    nothing has changed. SIGHUP does the same, and tells the log.
    """
    done = needed_control(home).post("/v1/reload")
    if as_json:
        click.echo(json.dumps(done, indent=2))
        return
    if not done["changed"] and not done["restart"]:
        click.echo("nothing has changed")
        return
    rows = [
        [each["key"], *_values(each), "restart needed" if each["effect"] == "restart" else each["effect"]]
        for each in [*done["changed"], *done["restart"]]
    ]
    click.echo(table(["KEY", "WAS", "IS", "HOLDS FOR"], rows))
    if done["restart"]:
        click.echo(
            f"{len(done['restart'])} of these are as they were until the server is restarted", err=True
        )


def _values(change: dict[str, str]) -> list[str]:
    if not change["old"] and not change["new"]:
        return ["(not shown)", "(not shown)"]
    return [change["old"], change["new"]]


@click.command()
@click.option(
    "--timeout",
    type=click.FloatRange(0, 3600),
    metavar="S",
    help="Seconds for what still runs. [default: server.drain_timeout]",
)
@click.option("--wait", is_flag=True, help="Wait until the server has ended.")
@as_json_option
@home_options
def drain(home: Home, config_file: Path | None, timeout: float | None, wait: bool, as_json: bool) -> None:
    """Have the server finish what runs, and end: it accepts nothing more. SIGTERM does the same."""
    done = needed_control(home).post("/v1/drain", timeout=timeout)
    if wait:
        _wait_for_end(home, done["timeout"] + MARGIN_S)
    if as_json:
        click.echo(json.dumps({**done, "ended": wait}))
    elif wait:
        click.echo("the server has ended", err=True)
    else:
        click.echo(
            f"the server drains {done['connections']} connections, for {done['timeout']:g} s at most",
            err=True,
        )


def _wait_for_end(home: Home, seconds: float) -> None:
    looks = int(seconds / LOOK_S)
    for _ in range(looks):
        found = control_of(home)
        if found is None:
            return
        found.close()
        time.sleep(LOOK_S)
    raise ControlError(f"the server is still there after {seconds:g} s; its log says what it does")


@click.group()
@home_options
def log(home: Home, config_file: Path | None) -> None:
    """See and set how much the running server logs."""


@log.command()
@click.argument("wanted", metavar="[LEVEL]", required=False, type=click.Choice(LEVELS))
@as_json_option
@home_options
def level(home: Home, config_file: Path | None, wanted: str | None, as_json: bool) -> None:
    """Print the level of the server's log, or set it until the server ends or log.level is changed.

    LEVEL is debug, info, warning or error: what is less severe is not written.
    """
    server = needed_control(home)
    done: dict[str, Any] = server.get("/v1/log") if wanted is None else server.post("/v1/log", level=wanted)
    if as_json:
        click.echo(json.dumps(done))
    elif wanted is None:
        click.echo(done["level"])
    else:
        click.echo(f"the log has {done['level']} and above now; it had {done['before']}", err=True)
