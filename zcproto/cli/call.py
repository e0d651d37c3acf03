"""`zcproto call`: one call from the command line."""

from __future__ import annotations

import base64
import binascii
import json
import math
from pathlib import Path
from typing import Any

import click

from zcproto.cli import Instance, file_option, instance_options, number_option
from zcproto.cli.connect import (
    EXIT_CANNOT_CONNECT,
    MAX_CONNECT_TIMEOUT,
    TrustChoice,
    key_option,
    opened,
    read_key,
    run,
    trust_options,
)
from zcproto.cli.output import json_text
from zcproto.common.text import escape_text


@click.command()
@click.argument("address", metavar="HOST:PORT")
@click.argument("method")
@click.argument("params", metavar="[JSON]", required=False)
@click.option(
    "--user",
    metavar="NAME",
    help="Open a session of this user. Without it only public methods can be called.",
)
@key_option("user")
@trust_options
@number_option(
    "--timeout",
    click.FloatRange(min=0, min_open=True, max=86_400),
    30.0,
    "SECONDS",
    "The deadline of the call.",
)
@file_option(
    "--key-log",
    text="Append the TLS secrets of the connection, with which Wireshark can decrypt it (spec/wireshark).",
)
@instance_options
def call(
    instance: Instance,
    address: str,
    method: str,
    params: str | None,
    user: str | None,
    key_file: Path | None,
    trust: TrustChoice,
    timeout: float,
    key_log: Path | None,
) -> int:
    """Call METHOD of the server at HOST:PORT and print the result as JSON.

    JSON is an object with the params. Bytes are written {"base64": "..."}, both ways; in a result, floats that JSON
    cannot express are {"float": "nan"}, "inf" or "-inf".

    \b
    Exit codes: 0  the result is printed
                1  the server answered with an error, or the connection was lost
                2  wrong usage, or an unusable file; nothing was sent
                3  no connection: no server there, or not a trusted one
    """
    arguments = parse_params(params)
    key = read_key(key_file) if user is not None else None
    if user is None and key_file is not None:
        raise click.UsageError("--key-file goes with --user.")
    options = {"user": user, "key": key, "timeout": timeout, "key_log_file": key_log}

    async def work() -> int:
        connect_timeout = min(timeout, MAX_CONNECT_TIMEOUT)
        client = trust.make_client(instance.home, address, connect_timeout=connect_timeout, **options)
        if not await opened(client):
            return EXIT_CANNOT_CONNECT
        try:
            result = await client.call(method, arguments)
        finally:
            await client.close()
        click.echo(to_json(result))
        return 0

    return run(work())


def parse_params(text: str | None) -> dict[str, Any]:
    """Return the params of a JSON text. Raises click.UsageError."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"JSON: {escape_text(str(error), 200)}.") from error
    if not isinstance(value, dict):
        raise click.UsageError('JSON must be an object with the params, such as {"name": "value"}.')
    converted: dict[str, Any] = {name: _from_json(each) for name, each in value.items()}
    return converted


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"base64"} and isinstance(value["base64"], str):
        try:
            return base64.b64decode(value["base64"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise click.UsageError(f"JSON: {escape_text(value['base64'], 60)!r} is not base64.") from error
    return {name: _from_json(each) for name, each in value.items()}


def to_json(value: Any) -> str:
    """Return a result as JSON that is safe on a terminal."""
    return json_text(_to_json(value), indent=2)


def _to_json(value: Any) -> Any:
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, list):
        return [_to_json(each) for each in value]
    if isinstance(value, dict):
        return {name: _to_json(each) for name, each in value.items()}
    return value
