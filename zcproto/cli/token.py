"""`zcproto token`: tokens with which machines, such as Prometheus, read figures of a server.

Rules: the file is changed, and a running server looks at it for each request. A token is shown once: the file has
only its digest. It is alone on standard output.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import click

from zcproto.auth.tokens import SCOPES, MachineToken, TokenFile
from zcproto.cli import Instance, command_group, force_option, out_option
from zcproto.cli.audit import recorded
from zcproto.cli.output import print_report, print_result, private_file, report_options, table
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.text import escape_text

SHORTEST = timedelta(minutes=1)
LONGEST = timedelta(days=397)

token = command_group("token", "Create, list and revoke tokens for machines such as Prometheus.")


def _life(ctx: click.Context, param: click.Parameter, text: str) -> timedelta:
    from zcproto.config.types import parse_duration  # noqa: PLC0415 - importing pydantic takes longer than `--help` may

    try:
        life = timedelta(seconds=parse_duration(text))
    except (ValueError, OverflowError):
        life = timedelta(0)
    if not SHORTEST <= life <= LONGEST:
        raise click.BadParameter(f'a duration such as "90d" or "12h", from 1m to {LONGEST.days}d.')
    return life


@token.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    required=True,
    help="What it may read: metrics is /metrics, status is /status.json. May be repeated.",
)
@click.option(
    "--expires",
    "life",
    default="90d",
    show_default=True,
    metavar="TIME",
    callback=_life,
    help="How long it is valid.",
)
@out_option("Write the token to this private file, for credentials_file of Prometheus.")
@force_option
@report_options
def create(
    instance: Instance,
    name: str,
    scopes: tuple[str, ...],
    life: timedelta,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Create a token and print it, once. It is valid at once, also with a running server."""
    instance.home.ensure()
    http = instance.read_config().http
    if not http.enabled:
        cure = "set it to true and restart the server"
        click.echo(
            f"zcproto: http.enabled = false: the server has nothing to read by a token; {cure}", err=True
        )
    elif "metrics" in scopes and http.metrics != "token":
        cure = 'set it to "token" and run zcproto reload'
        click.echo(
            f'zcproto: http.metrics = "{http.metrics}": /metrics takes no machine token; {cure}', err=True
        )
    added = _now()
    expires = added + life
    file = TokenFile(instance.home.tokens)
    what = {"name": name, "scopes": sorted({*scopes}), "expires": f"{expires:%Y-%m-%dT%H:%M:%SZ}"}
    if out is None:
        with recorded(instance, "tokens.create", machine=name):
            made = file.add(name, scopes, added, expires)
        note = (
            f"{escape_text(name)} has a token until {expires:%Y-%m-%d %H:%M} UTC. Keep it; it is shown once:"
        )
        print_result(as_json, {**what, "token": made.reveal()}, note)
        if not as_json:
            click.echo(made.reveal())
        return
    with private_file(out, replace=force) as written:  # first: a token that cannot be written would be lost
        with recorded(instance, "tokens.create", machine=name):
            made = file.add(name, scopes, added, expires)
        written.write(f"{made.reveal()}\n")
    note = f"{escape_text(name)} has a token until {expires:%Y-%m-%d %H:%M} UTC, in {escape_text(str(out))}"
    print_result(as_json, {**what, "file": str(out)}, note)


@token.command("list")
@report_options
def list_tokens(instance: Instance, as_json: bool) -> None:
    """List the tokens in the order of their creation."""
    instance.home.require()
    file = TokenFile(instance.home.tokens)
    file.load()
    now = _now()
    head = ("TOKEN", "SCOPES", "CREATED", "EXPIRES", "LAST USED", "STATE")
    text = table(head, [_row(name, entry, now) for name, entry in file.entries.items()])
    listed = [{**each.as_dict(name), "expired": now >= each.expires} for name, each in file.entries.items()]
    print_report(as_json, listed, text)


def _row(name: str, entry: MachineToken, now: datetime) -> tuple[str, ...]:
    used = "-" if entry.last_used is None else f"{entry.last_used:%Y-%m-%d %H}h UTC"
    state = "expired" if now >= entry.expires else "valid"
    times = (f"{moment:%Y-%m-%d %H:%M} UTC" for moment in (entry.added, entry.expires))
    return name, ", ".join(entry.scopes), *times, used, state


@token.command()
@click.argument("name")
@report_options
def revoke(instance: Instance, name: str, as_json: bool) -> None:
    """Revoke a token. A running server refuses its next request."""
    instance.home.require()
    with recorded(instance, "tokens.revoke", machine=name):
        TokenFile(instance.home.tokens).remove(name)
    print_result(as_json, {"name": name}, f"{escape_text(name)} is revoked.")


def _now() -> datetime:
    return datetime.fromtimestamp(system_clock.wall() // MS_PER_SECOND, UTC)
