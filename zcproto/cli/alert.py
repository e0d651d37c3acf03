"""`zcproto alert`: the alerts of a running server, their delivery, and the signature of a message."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any, BinaryIO

import click

from zcproto.alerts.service import LEAST_SECRET, sinks_of, try_sinks
from zcproto.alerts.sinks import check_signature
from zcproto.cli import EXIT_FAILED, Instance, command_group, file_option, instance_options
from zcproto.cli.control import find_control, require_control
from zcproto.cli.output import json_text, print_report, report_options, table, utc
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.files import read_secret
from zcproto.common.secret import Secret
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError

MAX_BODY = 1_048_576


alert = command_group("alert", "List alerts, test their delivery, and verify the signature of a message.")


@alert.command("list")
@report_options
def list_alerts(instance: Instance, as_json: bool) -> None:
    """List the open alerts of the running server, and those that closed in the last 24 hours."""
    found = require_control(instance.home).get("/v1/alerts")
    rows = [_row(each, "open") for each in found["open"]] + [_row(each, "closed") for each in found["over"]]
    head = ("SINCE", "STATE", "SEVERITY", "KIND", "COUNT", "TITLE")
    text = table(head, rows) if rows else "No open alerts; none closed in the last 24 h."
    print_report(as_json, found, text)
    for sink in () if as_json else found["sinks"]:
        if sink["down"]:
            click.echo(f"note: the {sink['name']} does not accept alerts; {sink['waiting']} wait", err=True)


def _row(found: dict[str, Any], state: str) -> tuple[str, ...]:
    columns = (state, found["severity"], found["kind"], str(found["count"]), found["title"])
    return (f"{utc(found['began_at']):%Y-%m-%d %H:%M:%SZ}", *columns)


@alert.command()
@report_options
def test(instance: Instance, as_json: bool) -> int:
    """Send a test alert to the webhook and the command of [alerts], once each.

    A running server sends it, with its active configuration; without one, this command does.

    Exit code 1 if a delivery failed, or if neither is configured.
    """
    control = find_control(instance.home)
    if control is not None:
        results = control.post("/v1/alerts/test")["sinks"]
    else:
        sinks = sinks_of(instance.existing_config().alerts, system_clock)
        results = asyncio.run(try_sinks(sinks, system_clock, system_entropy, socket.gethostname()))
    rows = [
        (
            each["sink"],
            each["where"],
            "arrived" if each["arrived"] else "FAILED",
            f"{each['ms']} ms",
            each["said"],
        )
        for each in results
    ]
    file = escape_text(str(instance.config_file or instance.home.config))
    text = f"alerts are only logged; to send them, set alerts.webhook or alerts.command in {file}"
    if rows:
        text = table(("SINK", "WHERE", "RESULT", "TIME", "RESPONSE"), rows)
    click.echo(json_text(results) if as_json else text)
    return 0 if results and all(each["arrived"] for each in results) else EXIT_FAILED


@alert.command()
@click.option(
    "--signature", required=True, metavar="TEXT", help="The Zcproto-Signature header of the message."
)
@file_option("--secret-file", text="The file with the secret. [default: alerts.webhook_secret_file]")
@click.argument("body", type=click.File("rb"), default="-")
@instance_options
def verify(instance: Instance, signature: str, secret_file: Path | None, body: BinaryIO) -> int:
    """Verify the signature of a message that a webhook received.

    BODY is a file with the exact bytes of the message; standard input by default. Exit code 1 if the signature is
    not valid.
    """
    key = "--secret-file"
    if secret_file is None:
        key = "alerts.webhook_secret_file"
        secret_file = instance.existing_config().alerts.webhook_secret_file
        if secret_file is None:
            raise ConfigError([f"{key} is not set; use --secret-file"])
    secret = Secret(read_secret(secret_file, key, least=LEAST_SECRET))
    data = body.read(MAX_BODY + 1)
    if len(data) > MAX_BODY:
        raise ConfigError([f"the message has more than {MAX_BODY} bytes: it is not from zcproto"])
    fault = check_signature(secret, data, signature, system_clock.wall())
    click.echo(fault or "valid: signed with the secret, and recent")
    return EXIT_FAILED if fault else 0
