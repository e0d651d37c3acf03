"""`zcproto store`: where sessions are kept."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from zcproto.auth import UserFile
from zcproto.cli import home_options, read_config
from zcproto.cli.session_store import (
    CONFIGURED,
    StoreInUseError,
    has_no_sessions,
    is_in_use,
    opened_store,
    with_store,
)
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.errors import ConfigError, ZcprotoError
from zcproto.runtime.store_setup import MEMORY, SQLITE
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.stores.base import MAX_LISTED, LimitReached, SessionStore

if TYPE_CHECKING:
    from zcproto.config import Config

AT_ONCE = 256
"""Sessions that are on their way from one store to the other."""

EVERYBODY = UserLimit(2**31 - 1, "refuse", None)
MAX_FAULTS = 20


class MigrationError(ZcprotoError):
    """Not all sessions could be brought over. Those in the first store are as they were."""


@click.group()
@home_options
def store(home: Home, config_file: Path | None) -> None:
    """Check where sessions are kept, and bring them from one store to another."""


@store.command()
@click.argument("url", metavar="[STORE]", required=False)
@home_options
def check(home: Home, config_file: Path | None, url: str | None) -> int:
    """See whether the store works, and what is to be said of it. Nothing is changed.

    STORE is "configured", or written as store.url in the configuration: "sqlite", or the address of a Valkey or
    Redis server. [default: configured]

    Exit code 1 if there are sessions that cannot be read, or no answer.
    """
    config = with_store(read_config(home, config_file), CONFIGURED if url is None else url)
    url = config.store.url
    if url == MEMORY:
        click.echo("sessions are in the memory of the server, and end with it")
        return 0
    if url == SQLITE:
        return _check_file(config, home)
    count, warnings = asyncio.run(_look_at(config, home))
    for warning in warnings:
        click.echo(f"note: {escape_text(warning, 500)}", err=True)
    click.echo(f"the store answers; sessions: {count}")
    return 0


def _check_file(config: Config, home: Home) -> int:
    path = home.sessions
    shown = escape_text(str(path))
    if not path.exists():
        click.echo(f"{shown}: is not there yet; a server makes it")
        return 0
    if is_in_use(path):
        raise StoreInUseError([f"{shown}: a running server uses it; run zcproto status, or stop the server"])
    faults = damage_of(path)
    for fault in faults:
        click.echo(f"{shown}: {escape_text(fault, 500)}", err=True)
    if faults:
        click.echo(f"{shown}: is damaged; a server would set it aside and begin with none", err=True)
        return 1
    count, _ = asyncio.run(_look_at(config, home))
    click.echo(f"{shown}: is sound; sessions: {count}")
    return 0


def damage_of(path: Path) -> list[str]:
    """What SQLite finds wrong with a file."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            rows = database.execute(f"PRAGMA integrity_check({MAX_FAULTS})").fetchall()
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [str(said) for (said,) in rows if said != "ok"]


async def _look_at(config: Config, home: Home) -> tuple[int, Sequence[str]]:
    async with opened_store(config, home) as found:
        await found.ping()
        examine = getattr(found, "examine", None)
        return await found.count(), () if examine is None else await examine()


@store.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@home_options
def migrate(home: Home, config_file: Path | None, source: str, target: str) -> None:
    """Bring all sessions from one store to another. Stop all servers first, and set store.url afterwards.

    FROM and TO are "configured", or written as store.url in the configuration. An address with a password is best
    kept there, as all users of a machine can read a command line. What is in FROM stays there; what TO has already
    stays too, so this can be done again. Users go on with their tokens. Answers that are kept for idempotency keys
    stay behind, as does the memory of sessions that have ended: their tokens are unknown in TO.
    """
    config = read_config(home, config_file)
    old, new = with_store(config, source), with_store(config, target)
    if MEMORY in (old.store.url, new.store.url):
        raise ConfigError(["sessions in the memory of a server cannot be brought anywhere"])
    if old.store.url == new.store.url:
        raise ConfigError(["FROM and TO are the same store"])
    moved = 0 if has_no_sessions(old, home) else asyncio.run(_migrate(old, new, home))
    click.echo(f"sessions brought over: {moved}", err=True)


async def _migrate(source: Config, target: Config, home: Home) -> int:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(opened_store(source, home))
        new = await stack.enter_async_context(opened_store(target, home))
        seen: set[bytes] = set()
        async for records in _all_of(old, home):
            fresh = [record for record in records if record.id not in seen]
            seen.update(record.id for record in fresh)
            for first in range(0, len(fresh), AT_ONCE):
                await _bring(fresh[first : first + AT_ONCE], new)
        kept = await old.count()
        if len(seen) < kept:
            raise MigrationError(
                f"only {len(seen)} of {kept} sessions were found, as they are of users who are not in the file of"
                " users; the store has too many to list them all"
            )
        return len(seen)


async def _bring(records: Sequence[SessionRecord], new: SessionStore) -> None:
    created = await asyncio.gather(*(new.create(record, EVERYBODY) for record in records))
    if any(isinstance(each, LimitReached) for each in created):
        raise MigrationError("a user has more sessions than a store can hold")


async def _all_of(old: SessionStore, home: Home) -> AsyncIterator[Sequence[SessionRecord]]:
    """All sessions of a store, some of them twice."""
    if not old.shared:
        async for batch in old.load():
            yield [record for record in batch if isinstance(record, SessionRecord)]
        return
    listed = await old.list()
    yield listed
    if len(listed) >= MAX_LISTED:
        users = UserFile(home.users)
        users.load()
        for name in users.names:
            yield await old.list(name)
