"""`zcproto store`, and the session store for all commands that need it without a server.

Decides: when a command may open the store, and its error while a server uses it.

Rules:
- A SQLite file belongs to one server: while it runs, its control socket or its operators are asked. Sessions in
  memory always belong to the server.
- Valkey is shared: running servers learn from it what changed.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import TypeVar

import click
from pydantic import ValidationError

from zcproto.auth import UserFile
from zcproto.cli import EXIT_FAILED, Instance, command_group, instance_options
from zcproto.common import files
from zcproto.common.clock import system_clock, system_entropy
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.config import Config
from zcproto.config.model import StoreConfig
from zcproto.errors import Code, ConfigError, ZcprotoError
from zcproto.runtime.store_setup import MEMORY, SQLITE, build_carrier, build_store
from zcproto.sessions.record import SessionRecord
from zcproto.stores.base import MAX_LISTED, NO_LIMIT, LimitReached, SessionStore, StoreUnavailable
from zcproto.stores.sqlite.file import may_pass

ASK_SERVER = "stop it, or ask it for its sessions: zcproto session list --server HOST:PORT --operator NAME"
CONFIGURED = "configured"
PATIENCE_S = 10.0
"""The timeout of one operation: longer than a server's, since a command keeps no caller waiting."""

BATCH = 256
"""Sessions copied concurrently."""

MAX_FAULTS = 20

T = TypeVar("T")


class StoreInUseError(ConfigError):
    """The sessions belong to a running server: only that can be asked."""


class SessionsNotEndedError(ConfigError):
    """A change was made, but the store did not answer when its sessions were to end."""


def with_store(config: Config, url: str) -> Config:
    """Return the configuration with another store; "configured" is the store that it has.

    Settings of one store, above all its password, are never sent to another. Raises ConfigError.
    """
    if url in (CONFIGURED, config.store.url):
        store = config.store.model_copy(update={"timeout": PATIENCE_S})
    else:
        try:
            store = StoreConfig(url=url, timeout=PATIENCE_S)
        except ValidationError as error:
            (refused,) = error.errors()
            raise ConfigError([f'the store {refused["msg"]}, or "{CONFIGURED}"']) from None
    return config.model_copy(update={"store": store})


@asynccontextmanager
async def opened_store(config: Config, home: Home) -> AsyncIterator[SessionStore]:
    """Open the configured store. Raises ConfigError, StoreInUseError and StoreUnavailable."""
    store = build_store(config, home)
    if store is None:
        raise StoreInUseError([f"store.url: sessions are in the memory of the server; {ASK_SERVER}"])
    if config.store.url == SQLITE and is_in_use(home.sessions):
        raise StoreInUseError([f"{home.sessions}: a server runs with these sessions; {ASK_SERVER}"])
    await store.open(lambda change: None)
    try:
        yield store
    finally:
        await store.close()


def has_no_sessions(config: Config, home: Home) -> bool:
    """Whether the store cannot hold any session. Avoids creating a file only to read it."""
    return config.store.url == SQLITE and not home.sessions.exists()


def run_in_store(config: Config, home: Home, work: Callable[[SessionStore], Awaitable[T]]) -> T:
    """Open the store, and return the result of `work` on it. Raises as `opened_store`."""

    async def run() -> T:
        async with opened_store(config, home) as store:
            return await work(store)

    return asyncio.run(run())


def end_sessions(config: Config, home: Home, user: str, key: str | None = None) -> int | None:
    """End the sessions of a user after a change, in the store of a server that does not run.

    Args:
        key: End only the sessions that were opened with it.

    Returns:
        The number of sessions that ended; None if a running server has the sessions, and ends them itself.

    Raises:
        SessionsNotEndedError: The store does not answer.
    """
    config = with_store(config, CONFIGURED)
    if config.store.url == MEMORY or (config.store.url == SQLITE and is_in_use(home.sessions)):
        return None
    if has_no_sessions(config, home):
        return 0

    async def end(store: SessionStore) -> int:
        wall = system_clock.wall()
        if key is None:
            return len(await store.end_user(user, Code.TOKEN_REVOKED, wall))
        ids = [record.id for record in await store.list(user) if record.key == key]
        return len(await store.end(ids, Code.TOKEN_REVOKED, wall, user)) if ids else 0

    try:
        return run_in_store(config, home, end)
    except StoreInUseError:  # a server has just been started
        return None
    except StoreUnavailable as error:
        raise SessionsNotEndedError(
            [
                f"the change is made, but the sessions could not be ended: {error}; end them when the store answers"
            ]
        ) from error


def examine_store(config: Config, home: Home) -> tuple[int, Sequence[str]]:
    """Return the number of sessions in the store, and warnings. Raises as `opened_store`."""

    async def examine(store: SessionStore) -> tuple[int, Sequence[str]]:
        await store.ping()
        return await store.count(), await store.examine(system_clock.wall())

    return run_in_store(config, home, examine)


def examine_carrier(config: Config, home: Home) -> None:
    """Reach the other servers of the store once, as topics and calls do. Raises ZcprotoError."""

    async def examine(store: SessionStore) -> None:
        carrier = build_carrier(store, config, home, system_entropy)
        if carrier is not None:
            await carrier.check()

    run_in_store(config, home, examine)


def is_in_use(path: Path) -> bool:
    """Whether a process uses this SQLite file of sessions."""
    return files.is_locked(path.with_name(f"{path.name}.lock"))


def damage_of(path: Path) -> list[str]:
    """Return the problems that SQLite finds in a file. Raises ZcprotoError if it cannot be read now."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as database:
            rows = database.execute(f"PRAGMA integrity_check({MAX_FAULTS})").fetchall()
    except sqlite3.DatabaseError as error:
        if may_pass(error):
            shown = escape_text(str(path))
            cure = "make room on its disk, and check the owner and mode of its folder"
            raise ZcprotoError(f"{shown}: cannot be read: {error}; {cure}") from error
        return [str(error)]
    return [str(problem) for (problem,) in rows if problem != "ok"]


# --- the commands ----------------------------------------------------------------------------------------


store = command_group("store", "Check the session store, and copy sessions to another one.")


@store.command()
@click.argument("url", metavar="[STORE]", required=False)
@instance_options
def check(instance: Instance, url: str | None) -> int:
    """Check the session store and report problems. Nothing is changed.

    STORE is "configured", or a value for store.url: "sqlite", or the URL of a Valkey or Redis server. [default:
    configured]

    Exits with 1 if sessions cannot be read or the store does not answer.
    """
    config = instance.existing_config() if url in (None, CONFIGURED, SQLITE) else instance.read_config()
    config = with_store(config, url or CONFIGURED)
    url = config.store.url
    if url == MEMORY:
        click.echo("sessions are in the memory of the server and end with it")
        return 0
    if url == SQLITE:
        return _check_file(config, instance.home)
    count, warnings = examine_store(config, instance.home)
    for warning in warnings:
        click.echo(f"note: {escape_text(warning, 500)}", err=True)
    click.echo(f"the store answers; sessions: {count}")
    return 0


def _check_file(config: Config, home: Home) -> int:
    path = home.sessions
    shown = escape_text(str(path))
    if not path.exists():
        click.echo(f"{shown}: does not exist yet; the server will create it")
        return 0
    if is_in_use(path):
        raise StoreInUseError([f"{shown}: a running server uses it; run zcproto status, or stop the server"])
    faults = damage_of(path)
    for fault in faults:
        click.echo(f"{shown}: {escape_text(fault, 500)}", err=True)
    if faults:
        click.echo(
            f"{shown}: is damaged; at its next start the server renames it and starts with an empty one",
            err=True,
        )
        return EXIT_FAILED
    count, _ = examine_store(config, home)
    click.echo(f"{shown}: is intact; sessions: {count}")
    return 0


@store.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@instance_options
def migrate(instance: Instance, source: str, target: str) -> None:
    """Copy all sessions from one store to another. Stop all servers first, and set store.url afterwards.

    FROM and TO are "configured", or values for store.url. Put a URL with a password into the configuration, because
    all users of a machine can read a command line. Sessions stay in FROM, and those already in TO stay too, so the
    command can be repeated. Tokens stay valid. Answers stored for idempotency keys are not copied, nor are ended
    sessions: their tokens are unknown in TO.
    """
    config = instance.existing_config()
    old, new = with_store(config, source), with_store(config, target)
    if MEMORY in (old.store.url, new.store.url):
        raise ConfigError(
            ["sessions in the memory of a server cannot be copied; name sqlite or the URL of a server"]
        )
    if old.store.url == new.store.url:
        raise ConfigError(["FROM and TO are the same store; name two stores"])
    copied = 0 if has_no_sessions(old, instance.home) else asyncio.run(_migrate(old, new, instance.home))
    click.echo(f"sessions copied: {copied}", err=True)


async def _migrate(source: Config, target: Config, home: Home) -> int:
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(opened_store(source, home))
        new = await stack.enter_async_context(opened_store(target, home))
        seen: set[bytes] = set()
        async for records in _all_sessions(old, home):
            fresh = [record for record in records if record.id not in seen]
            seen.update(record.id for record in fresh)
            for first in range(0, len(fresh), BATCH):
                batch = fresh[first : first + BATCH]
                created = await asyncio.gather(*(new.create(record, NO_LIMIT) for record in batch))
                if any(isinstance(each, LimitReached) for each in created):
                    raise ZcprotoError(
                        "a user has more sessions than the target can store; end some of them and repeat"
                    )
        kept = await old.count()
        if len(seen) < kept:
            raise ZcprotoError(
                f"only {len(seen)} of {kept} sessions were copied: the others belong to users who are not in the"
                " user file, and the store has too many sessions to list them all; add the users and repeat"
            )
        return len(seen)


async def _all_sessions(old: SessionStore, home: Home) -> AsyncIterator[Sequence[SessionRecord]]:
    """Yield all sessions of a store, some of them twice."""
    if not old.shared:
        async for batch in old.load():
            yield [record for record in batch if isinstance(record, SessionRecord)]
        return
    listed = await old.list()
    yield listed
    if len(listed) >= MAX_LISTED:
        users = UserFile(home.users)
        users.load()
        for name in users.entries:
            yield await old.list(name)
