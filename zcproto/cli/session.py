"""`zcproto session`: the sessions that there are, one more, and their end."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import click

from zcproto.cli import home_options, read_config
from zcproto.cli.control import control_of
from zcproto.cli.kept_sessions import CONFIGURED, has_none, opened_store, with_store
from zcproto.cli.operator import Operator, server_options
from zcproto.cli.session_open import open_session
from zcproto.cli.table import table
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.errors import Code, NotFound
from zcproto.server.operators import LISTED, REVOKED_AT_ONCE, describe
from zcproto.sessions.token import id_from_text
from zcproto.stores.base import MAX_LISTED

if TYPE_CHECKING:
    from zcproto.config import Config


@click.group()
@home_options
def session(home: Home, config_file: Path | None) -> None:
    """See who has sessions, and end them.

    A server that runs with this home folder is asked by its control socket. Where none does, these work on the
    store. A server elsewhere is asked as an operator: --server HOST:PORT --operator NAME --key-file FILE.
    """


session.add_command(open_session)


@session.command("list")
@click.option("--user", metavar="NAME", help="Whose sessions. [default: everybody's]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@server_options
@home_options
def list_sessions(
    home: Home, config_file: Path | None, user: str | None, as_json: bool, server: Operator | None
) -> None:
    """List sessions, the oldest first."""
    control = None if server is not None else control_of(home)
    if server is not None:
        found = server.ask(home, "server.sessions", {} if user is None else {"user": user})
    elif control is not None:
        query = "" if user is None else f"?{urlencode({'user': user})}"
        found = control.get(f"/v1/sessions{query}")["sessions"]
    else:
        config = with_store(read_config(home, config_file), CONFIGURED)
        found = [] if has_none(config, home) else asyncio.run(_list(config, home, user))
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False, indent=2))
        return
    click.echo(
        table(
            ("ID", "USER", "OPENED", "LAST USED", "EXPIRES", "CLIENT", "ADDRESS", "STATE"),
            [_row(each) for each in found],
        )
    )
    if len(found) >= (MAX_LISTED if server is None and control is None else LISTED):
        click.echo(
            f"there may be more; these are {len(found)}. --user NAME lists those of one user", err=True
        )


@session.command(context_settings={"ignore_unknown_options": True})  # one ID in 64 begins with a dash
@click.argument("ids", metavar="[ID]...", nargs=-1)
@click.option("--user", metavar="NAME", help="End all sessions of this user.")
@click.option("--all", "everybody", is_flag=True, help="End all sessions of everybody.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@server_options
@home_options
def revoke(
    home: Home,
    config_file: Path | None,
    ids: tuple[str, ...],
    user: str | None,
    everybody: bool,
    as_json: bool,
    server: Operator | None,
) -> None:
    """End sessions: those with the IDs, or all of a user, or all there are."""
    for each in ids:
        if each.startswith("-") and id_from_text(each) is None:
            raise click.NoSuchOption(each)
    if sum((bool(ids), user is not None, everybody)) != 1:
        raise click.UsageError("Give IDs, or --user NAME, or --all.")
    ids = tuple(dict.fromkeys(ids))
    if len(ids) > REVOKED_AT_ONCE:
        raise click.UsageError(f"At most {REVOKED_AT_ONCE} IDs.")
    control = None if server is not None else control_of(home)
    if server is not None:
        ended = _ask_to_revoke(server, home, ids, user)
    elif control is not None:
        revoked = control.post(
            "/v1/sessions/revoke", ids=list(ids) or None, user=user, all=True if everybody else None
        )
        ended = revoked["revoked"]
    else:
        config = with_store(read_config(home, config_file), CONFIGURED)
        ended = 0 if has_none(config, home) else asyncio.run(_revoke(config, home, ids, user))
    if ids and ended < len(ids):
        missing = (
            "no session has this ID" if len(ids) == 1 else f"{len(ids) - ended} of these are no sessions"
        )
        raise NotFound(f"{missing}; sessions ended: {ended}")
    if as_json:
        click.echo(json.dumps({"revoked": ended}))
    else:
        click.echo(f"sessions ended: {ended}", err=True)


# --- in the store --------------------------------------------------------------------------------------------


async def _list(config: Config, home: Home, user: str | None) -> list[dict[str, Any]]:
    async with opened_store(config, home) as store:
        return [describe(record) for record in await store.list(user)]


async def _revoke(config: Config, home: Home, ids: Sequence[str], user: str | None) -> int:
    wall = system_clock.wall()
    async with opened_store(config, home) as store:
        if ids:
            raw = [each for each in map(id_from_text, ids) if each is not None]
            return len(await store.end(raw, Code.TOKEN_REVOKED, wall))
        if user is not None:
            return len(await store.end_user(user, Code.TOKEN_REVOKED, wall))
        return await store.end_all(Code.TOKEN_REVOKED, wall)


# --- at a server ---------------------------------------------------------------------------------------------


def _ask_to_revoke(server: Operator, home: Home, ids: Sequence[str], user: str | None) -> int:
    if user is not None:
        params: dict[str, Any] = {"user": user}
    elif ids:
        params = {"ids": list(ids)}
    else:
        params = {"all": True}
    revoked: int = server.ask(home, "server.revoke", params)["revoked"]
    return revoked


# --- for people ----------------------------------------------------------------------------------------------


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    now = system_clock.wall()
    if now < found["expires_at"]:
        state = "open"
    elif now < (found["refresh_expires_at"] or 0):
        state = "to be refreshed"
    else:
        state = "over"
    kinds = [kind for kind in ("bound", "operator") if found[kind]]
    return (
        found["id"],
        found["user"],
        *(_moment(found[key]) for key in ("created_at", "last_used_at", "expires_at")),
        found["client"],
        found["address"],
        ", ".join([state, *kinds]),
    )


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / MS_PER_SECOND, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
