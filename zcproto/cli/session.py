"""`zcproto session`: list, open and end sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from zcproto.cli import Instance, command_group, instance_options
from zcproto.cli.backends import TIMEOUT_S, RemoteServer, local_backend, server_options
from zcproto.cli.connect import TrustChoice, call_once, key_option, read_key, trust_options, user_option
from zcproto.cli.output import print_report, print_result, report_options, table, utc
from zcproto.common.clock import system_clock
from zcproto.common.secret import SecretText
from zcproto.common.text import counted, escape_text
from zcproto.errors import NotFound
from zcproto.server.protocol_methods import REVOKED_AT_ONCE
from zcproto.sessions.token import id_from_text, token_text

session = command_group(
    "session",
    "List, open and end sessions.\n\n"
    "If a server runs with this home folder, it is asked through its control socket; otherwise the store is read."
    " A server elsewhere is asked as an operator: --server HOST:PORT --operator NAME --key-file FILE.",
)


@session.command("list")
@click.option("--user", metavar="NAME", help="Only sessions of this user.")
@report_options
@server_options
def list_sessions(instance: Instance, user: str | None, as_json: bool, remote: RemoteServer | None) -> None:
    """List sessions, oldest first."""
    result = (remote or local_backend(instance)).run("sessions", user=user)
    found = result["sessions"]
    head = ("ID", "USER", "OPENED", "LAST USED", "EXPIRES", "CLIENT", "ADDRESS", "STATE")
    print_report(as_json, found, table(head, [_row(each) for each in found]))
    if result["more"] and not as_json:
        click.echo(
            f"the list ends after {len(found)} sessions; --user NAME lists those of one user", err=True
        )


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    now = system_clock.wall()
    if now < found["expires_at"]:
        state = "open"
    elif now < (found["refresh_expires_at"] or 0):
        state = "to be refreshed"
    else:
        state = "over"
    kinds = [*(["bound"] if found["bound"] else []), *found["roles"]]
    return (
        found["id"],
        found["user"],
        *(f"{utc(found[key]):%Y-%m-%d %H:%M:%SZ}" for key in ("created_at", "last_used_at", "expires_at")),
        found["client"],
        found["address"],
        ", ".join([state, *kinds]),
    )


@session.command("open")
@click.argument("address", metavar="HOST:PORT")
@user_option("The user of the session.", required=True)
@key_option("user")
@trust_options
@instance_options
def open_session(
    instance: Instance, address: str, user: str, key_file: Path | None, trust: TrustChoice
) -> None:
    """Open a session at HOST:PORT and print its token: for the status page, or for Prometheus.

    Anyone with the token can use the session. It ends when it expires, or by `zcproto session revoke`. Only the
    token goes to standard output.
    """
    from zcproto.client.client import default_client  # noqa: PLC0415

    key = SecretText(read_key(key_file))
    params = {"scheme": "api_key", "user": user, "key": key, "client": default_client()}
    found = call_once(trust, instance.home, address, "session.open", params, timeout=TIMEOUT_S)
    click.echo(token_text(found["token"]))
    until = utc(found["expires_at"])
    click.echo(f"session {escape_text(found['id'], 60)}, until {until:%Y-%m-%d %H:%M} UTC", err=True)


class _DashedIds(click.Command):
    """A command whose arguments are IDs of sessions: one in 64 begins with a dash, as options do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        dashed = [each for each in args if each.startswith("-") and id_from_text(each) is not None]
        others = [each for each in args if each not in (*dashed, "--")] if dashed else args
        return super().parse_args(ctx, [*others, *(["--"] if dashed else []), *dashed])


@session.command(cls=_DashedIds)
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--user", metavar="NAME", help="End all sessions of this user.")
@click.option("--all", "all_users", is_flag=True, help="End all sessions of all users.")
@report_options
@server_options
def revoke(
    instance: Instance,
    ids: tuple[str, ...],
    user: str | None,
    all_users: bool,
    as_json: bool,
    remote: RemoteServer | None,
) -> None:
    """End sessions: those with the IDs, or all of one user, or all."""
    if sum((bool(ids), user is not None, all_users)) != 1:
        raise click.UsageError("Give IDs, or --user NAME, or --all.")
    ids = tuple(dict.fromkeys(ids))
    if len(ids) > REVOKED_AT_ONCE:
        raise click.UsageError(f"At most {REVOKED_AT_ONCE} IDs.")
    backend = remote or local_backend(instance)
    ended = backend.run("sessions/revoke", ids=list(ids) or None, user=user, all=all_users or None)["revoked"]
    if ids and ended < len(ids):
        missing = (
            "no session has this ID" if len(ids) == 1 else f"{len(ids) - ended} of these IDs are unknown"
        )
        raise NotFound(f"{missing}, {counted(ended, 'session')} ended; zcproto session list shows the IDs")
    print_result(as_json, {"revoked": ended}, f"{counted(ended, 'session')} ended")
