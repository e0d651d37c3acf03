"""The session store, for commands without a server.

What this file decides: when a command may open the store, and its error while a server uses it.

Rules:
- A SQLite file belongs to one server: while it runs, its control socket or its operators are asked. Sessions in
  memory always belong to the server.
- Valkey is shared: running servers learn from it what changed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zcproto.common import files
from zcproto.common.home import Home
from zcproto.errors import ConfigError
from zcproto.runtime.store_setup import MEMORY, SQLITE, build_store
from zcproto.stores.base import SessionStore, StoreUnavailable

if TYPE_CHECKING:
    from zcproto.config import Config

ASK_SERVER = "ask it: --server HOST:PORT --operator NAME --key-file FILE"
CONFIGURED = "configured"
PATIENCE_S = 10.0
"""The timeout of one operation: longer than a server's, since a command keeps no caller waiting."""


class StoreInUseError(ConfigError):
    """The sessions belong to a running server: only that can be asked."""


class SessionsNotEndedError(ConfigError):
    """A change was made, but the store did not answer when its sessions were to end."""


def with_store(config: Config, url: str) -> Config:
    """Return the configuration with another store; "configured" is the store that it has.

    Settings of one store, above all its password, are never sent to another. Raises ConfigError.
    """
    from pydantic import ValidationError  # noqa: PLC0415

    from zcproto.config import StoreConfig  # noqa: PLC0415 - importing pydantic takes longer than `--help` may

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


def end_sessions(config: Config, home: Home, end: Callable[[SessionStore], Awaitable[int]]) -> int | None:
    """End sessions after a change, in the store of a server that does not run.

    Args:
        end: Ends the sessions and returns their number.

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

    async def run() -> int:
        async with opened_store(config, home) as store:
            return await end(store)

    try:
        return asyncio.run(run())
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

    async def examine() -> tuple[int, Sequence[str]]:
        async with opened_store(config, home) as store:
            await store.ping()
            warnings = getattr(store, "examine", None)
            return await store.count(), () if warnings is None else await warnings()

    return asyncio.run(examine())


def is_in_use(path: Path) -> bool:
    """Whether a process uses this SQLite file of sessions."""
    return files.is_locked(path.with_name(f"{path.name}.lock"))
