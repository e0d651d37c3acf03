"""`zcproto status`: what a running server does, once or all the time."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from zcproto.cli import home_options
from zcproto.cli.control import CONNECT_S, Control, needed_control
from zcproto.cli.status_view import lines_of
from zcproto.common.home import Home

STATUS_S = 2 * CONNECT_S
"""For an answer: it takes a millisecond."""

USUAL_SIZE = (100, 40)
_ALTERNATE, _BACK = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_TOP, _REST_OF_LINE, _REST = "\x1b[H", "\x1b[K", "\x1b[J"
_BOLD, _RED, _PLAIN = "\x1b[1m", "\x1b[31m", "\x1b[0m"


@click.command()
@click.option("--watch", is_flag=True, help="Go on showing it, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(0.2, 3600),
    default=1.0,
    show_default=True,
    metavar="S",
    help="Seconds between two looks of --watch.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: one object a line with --watch.")
@home_options
def status(home: Home, config_file: Path | None, watch: bool, interval: float, as_json: bool) -> None:
    """Show what the server of this home folder does: connections, sessions, requests, certificates, alerts.

    It is asked by its control socket. Exit code 1 if none runs.
    """
    server = needed_control(home, STATUS_S)
    if not watch:
        found = server.get("/v1/status")
        click.echo(json.dumps(found, indent=2) if as_json else _plain(found))
    elif as_json or not sys.stdout.isatty():
        for found in _looks(server, interval):
            click.echo(json.dumps(found) if as_json else f"{_plain(found)}\n")
            sys.stdout.flush()
    else:
        _show(server, interval)


def _looks(server: Control, interval: float) -> Iterator[dict[str, Any]]:
    while True:
        yield server.get("/v1/status")
        time.sleep(interval)


def _plain(found: dict[str, Any]) -> str:
    return "\n".join(text for text, _ in lines_of(found))


def _show(server: Control, interval: float) -> None:
    """Show it on a terminal, which is as it was before when this ends."""
    out = sys.stdout
    out.write(_ALTERNATE)
    try:
        for found in _looks(server, interval):
            out.write(frame(found, *shutil.get_terminal_size(USUAL_SIZE)))
            out.flush()
    finally:
        out.write(_BACK)
        out.flush()


def frame(found: dict[str, Any], width: int, height: int) -> str:
    """One picture for a terminal: lines that fit, over those of the picture before."""
    colours = {"head": _BOLD, "bad": _RED}
    shown = [
        f"{colours.get(style, '')}{text[:width]}{_PLAIN if style in colours else ''}{_REST_OF_LINE}"
        for text, style in lines_of(found)[: max(1, height - 1)]
    ]
    return _TOP + "\r\n".join(shown) + _REST
