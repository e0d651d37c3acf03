"""`zcproto device`: the devices that open sessions of their users by a key of their own.

Rules: a server that runs with this home folder does what is asked, by its control socket. Where none does, a
command works on the file, under its lock, and ends the sessions that the store keeps. A list is read from the file.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zcproto.auth import Device, DeviceFile
from zcproto.cli import home_options, read_config
from zcproto.cli.control import control_of
from zcproto.cli.kept_sessions import NotHereError, has_none, is_in_use, opened_store
from zcproto.cli.table import table
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import Code, ConfigError
from zcproto.runtime.store_setup import MEMORY, SQLITE
from zcproto.sessions.session import DEVICE_KEY
from zcproto.sessions.token import token_text
from zcproto.stores.base import StoreUnavailable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from zcproto.config import Config


@click.group()
@home_options
def device(home: Home, config_file: Path | None) -> None:
    """List and remove devices, which open sessions by a key of their own. `zcproto pair` lets one in."""


@device.command("list")
@click.option("--user", metavar="NAME", help="Those of one user.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")
@home_options
def list_devices(home: Home, config_file: Path | None, user: str | None, as_json: bool) -> None:
    """List the devices, in the order in which they came."""
    file = DeviceFile(home.devices)
    file.load()
    found = {name: each for name, each in file.entries.items() if user in (None, each.user)}
    click.echo(_json(found) if as_json else _table(found))


def _json(devices: Mapping[str, Device]) -> str:
    rows = [
        {
            "name": name,
            "user": each.user,
            "public_key": token_text(each.public_key),
            "added": f"{each.added:%Y-%m-%dT%H:%M:%SZ}",
        }
        for name, each in devices.items()
    ]
    return json.dumps(rows, ensure_ascii=False, indent=2)


def _table(devices: Mapping[str, Device]) -> str:
    rows = [
        (name, each.user, f"{each.added:%Y-%m-%d %H:%M} UTC", token_text(each.public_key))
        for name, each in devices.items()
    ]
    return table(("DEVICE", "USER", "ADDED", "PUBLIC KEY"), rows)


@device.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@home_options
def remove(home: Home, config_file: Path | None, name: str, as_json: bool) -> None:
    """Remove a device, and end the sessions there are."""
    config = read_config(home, config_file)
    control = control_of(home)
    ended: int | None
    if control is not None:
        done = control.post("/v1/devices/remove", name=name)
        user, ended = done["user"], done["sessions"]
    else:
        user = DeviceFile(home.devices).remove(name).user
        ended = asyncio.run(_end_sessions(user, DEVICE_KEY + name, home, config))
    if as_json:
        click.echo(json.dumps({"name": name, "user": user, "sessions": ended}, ensure_ascii=False))
        return
    sessions = (
        "a running server ends the sessions within a second" if ended is None else f"sessions ended: {ended}"
    )
    click.echo(f"{escape_text(name)} of {escape_text(user)} is removed; {sessions}.", err=True)


async def _end_sessions(user: str, key: str, home: Home, config: Config) -> int | None:
    """End the sessions that are bound to a key where no server does; how many. None: a server does, if one runs."""
    url = config.store.url
    if url == MEMORY or (url == SQLITE and is_in_use(home.sessions)):
        return None
    if has_none(config, home):
        return 0
    try:
        async with opened_store(config, home) as store:
            ids = [record.id for record in await store.list(user) if record.key == key]
            return len(await store.end(ids, Code.TOKEN_REVOKED, system_clock.wall(), user)) if ids else 0
    except NotHereError:  # a server was started just now
        return None
    except StoreUnavailable as error:
        raise ConfigError(
            [f"the device is removed; the store still has its sessions, which nobody can use. {error}"]
        ) from error
