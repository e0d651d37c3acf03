"""`zcproto alert`: see that alerts arrive, with no server running."""

from __future__ import annotations

import asyncio
import json
import socket
from pathlib import Path
from typing import Any, BinaryIO

import click

from zcproto.alerts import CATALOGUE, Alert, AlertKind, Message, Phase
from zcproto.alerts.signature import check_signature
from zcproto.cli import EXIT_FAILED, home_options, read_config
from zcproto.cli.table import table
from zcproto.clock import system_clock, system_entropy
from zcproto.errors import ConfigError
from zcproto.home import Home
from zcproto.printable import printable
from zcproto.secret import Secret
from zcproto.server.alert_sinks import Sink, Undelivered
from zcproto.server.alerts import LEAST_SECRET, sinks_of
from zcproto.server.secret_file import secret_line

MAX_BODY = 1_048_576
_ORIGIN_SIZE = 8
_MS = 1000


@click.group()
@home_options
def alert(home: Home, config_file: Path | None) -> None:
    """Try whether alerts arrive, and check a signature."""


@alert.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_options
def test(home: Home, config_file: Path | None, as_json: bool) -> int:
    """Send a test alert to the webhook and to the command of [alerts], one try each.

    Exit code 1 if it did not arrive somewhere, or if there is nowhere to send it to.
    """
    sinks = sinks_of(read_config(home, config_file).alerts, system_clock)
    body = _message().as_json(system_entropy(_ORIGIN_SIZE).hex(), socket.gethostname())
    results = asyncio.run(_deliver(sinks, body))
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
    secret = Secret(secret_line(secret_file, key, least=LEAST_SECRET))
    data = body.read(MAX_BODY + 1)
    if len(data) > MAX_BODY:
        raise ConfigError([f"the message has more than {MAX_BODY} bytes: no message of zcproto has"])
    fault = check_signature(secret, data, signature, system_clock.wall())
    click.echo(fault or "good: it is from whoever has the secret, and new")
    return EXIT_FAILED if fault else 0


def _message() -> Message:
    kind, wall = AlertKind.TEST, system_clock.wall()
    title = "a test of zcproto: alerts arrive here"
    return Message(1, Phase.BEGAN, Alert(kind, "", CATALOGUE[kind].severity, title, {}, wall, wall, None, 1))


async def _deliver(sinks: list[Sink], body: bytes) -> list[dict[str, Any]]:
    """Try each sink once, one after the other; what came of it."""
    results = []
    for sink in sinks:
        began = system_clock.now()
        try:
            said, arrived = await sink.deliver(body), True
        except Undelivered as error:
            said, arrived = str(error), False
        ms = round((system_clock.now() - began) * _MS)
        result = {
            "sink": sink.name,
            "where": sink.where,
            "arrived": arrived,
            "ms": ms,
            "said": printable(said),
        }
        results.append(result)
    return results
