"""`zcproto alert`: which alerts a running server has, and whether they arrive."""

from __future__ import annotations

import asyncio
import json
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import click

from zcproto.alerts.service import LEAST_SECRET, sinks_of
from zcproto.alerts.signature import check_signature
from zcproto.alerts.trial import try_sinks
from zcproto.cli import EXIT_FAILED, home_options, read_config
from zcproto.cli.control import control_of, needed_control
from zcproto.cli.table import table
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.files import read_secret
from zcproto.common.home import Home
from zcproto.common.secret import Secret
from zcproto.errors import ConfigError

MAX_BODY = 1_048_576
_ORIGIN_SIZE = 8
_MS = 1000


@click.group()
@home_options
def alert(home: Home, config_file: Path | None) -> None:
    """List the alerts of a running server, try whether they arrive, and check a signature."""


@alert.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_options
def list_alerts(home: Home, config_file: Path | None, as_json: bool) -> None:
    """List the alerts of the running server: those that are open, and those of the last day that are over."""
    found = needed_control(home).get("/v1/alerts")
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    rows = [_row(each, "open") for each in found["open"]] + [_row(each, "over") for each in found["over"]]
    if rows:
        click.echo(table(["SINCE", "STATE", "SEVERITY", "KIND", "COUNT", "WHAT"], rows))
    else:
        click.echo("no alert is open, and none is over since a day")
    for sink in found["sinks"]:
        if sink["down"]:
            click.echo(f"note: alerts do not reach the {sink['name']}; {sink['waiting']} wait", err=True)


def _row(found: dict[str, Any], state: str) -> tuple[str, ...]:
    began = datetime.fromtimestamp(found["began_at"] / _MS, UTC)
    return (
        f"{began:%Y-%m-%d %H:%M:%SZ}",
        state,
        found["severity"],
        found["kind"],
        str(found["count"]),
        found["title"],
    )


@alert.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_options
def test(home: Home, config_file: Path | None, as_json: bool) -> int:
    """Send a test alert to the webhook and to the command of [alerts], one try each.

    A running server sends it, by the configuration that it has. Where none runs, this command does.

    Exit code 1 if it did not arrive somewhere, or if there is nowhere to send it to.
    """
    control = control_of(home)
    if control is not None:
        results = control.post("/v1/alerts/test")["sinks"]
    else:
        sinks = sinks_of(read_config(home, config_file).alerts, system_clock)
        origin = system_entropy(_ORIGIN_SIZE).hex()
        results = asyncio.run(try_sinks(sinks, system_clock, origin, socket.gethostname()))
    if as_json:
        click.echo(json.dumps(results))
    elif not results:
        click.echo("no webhook and no command is configured in [alerts]: alerts are in the log alone")
    else:
        rows = [
            [
                each["sink"],
                each["where"],
                "arrived" if each["arrived"] else "FAILED",
                f"{each['ms']} ms",
                each["said"],
            ]
            for each in results
        ]
        click.echo(table(["SINK", "WHERE", "RESULT", "TIME", "WHAT IT SAID"], rows))
    return 0 if results and all(each["arrived"] for each in results) else EXIT_FAILED


@alert.command()
@click.option(
    "--signature", required=True, metavar="TEXT", help="The header Zcproto-Signature of the message."
)
@click.option(
    "--secret-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The secret. [default: alerts.webhook_secret_file]",
)
@click.argument("body", type=click.File("rb"), default="-")
@home_options
def verify(
    home: Home, config_file: Path | None, signature: str, secret_file: Path | None, body: BinaryIO
) -> int:
    """Check the signature of a message that a webhook has received, as a receiver should.

    BODY is a file with the very bytes of the message; standard input by default. Exit code 1 if it is not good.
    """
    key = "--secret-file"
    if secret_file is None:
        key = "alerts.webhook_secret_file"
        secret_file = read_config(home, config_file).alerts.webhook_secret_file
        if secret_file is None:
            raise ConfigError([f"{key}: none is configured; name one by --secret-file"])
    secret = Secret(read_secret(secret_file, key, least=LEAST_SECRET))
    data = body.read(MAX_BODY + 1)
    if len(data) > MAX_BODY:
        raise ConfigError([f"the message has more than {MAX_BODY} bytes: no message of zcproto has"])
    fault = check_signature(secret, data, signature, system_clock.wall())
    click.echo(fault or "good: it is from whoever has the secret, and new")
    return EXIT_FAILED if fault else 0
