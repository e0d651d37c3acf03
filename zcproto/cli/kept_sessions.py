"""The sessions that a store keeps, for commands that need no server.

What this file decides: when a command may open the store, and what it says when a server has it.

Rules:
- sqlite is one server's alone: while it runs, its operators are asked. Sessions in memory are always the server's.
- Valkey is for all: servers learn from it what was changed.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.errors import Code, ConfigError
from zcproto.runtime.store_setup import MEMORY, SQLITE, build_store
from zcproto.stores.base import Change, SessionStore, StoreUnavailable

if TYPE_CHECKING:
    from zcproto.config import Config

ASK_SERVER = "ask it: --server HOST:PORT --operator NAME --key-file FILE"
CONFIGURED = "configured"
PATIENCE_S = 10.0
"""For one operation: nobody else waits for a command."""


class NotHereError(ConfigError):
    """The sessions are a running server's: only that can be asked."""


def with_store(config: Config, url: str) -> Config:
    """The configuration with another store, in the words of a command line: "configured" is the one there is.

    What is configured for one server, a password above all, is never sent to another. Raises ConfigError.
    """
    from zcproto.config import StoreConfig  # noqa: PLC0415 - pydantic takes longer to import than `--help` may last
    from zcproto.config.model import rules  # noqa: PLC0415
    from zcproto.config.rules import RefusedError  # noqa: PLC0415

    if url in (CONFIGURED, config.store.url):
        store = config.store.model_copy(update={"timeout": PATIENCE_S})
    else:
        try:
            rules()["store.url"].accept(url)
        except RefusedError as refused:
            raise ConfigError([f'the store {refused}, or "{CONFIGURED}"']) from None
        store = StoreConfig(url=url, timeout=PATIENCE_S)
    return config.model_copy(update={"store": store})


@asynccontextmanager
async def opened_store(config: Config, home: Home) -> AsyncIterator[SessionStore]:
    """The store that is configured, ready. Raises ConfigError, NotHereError and StoreUnavailable."""
    store = build_store(config, home)
    if store is None:
        raise NotHereError([f"store.url: sessions are in the memory of the server; {ASK_SERVER}"])
    if config.store.url == SQLITE and is_in_use(home.sessions):
        raise NotHereError([f"{home.sessions}: a server runs with these sessions; {ASK_SERVER}"])
    await store.open(_ignore)
    try:
        yield store
    finally:
        await store.close()


def has_none(config: Config, home: Home) -> bool:
    """Whether there can be no session: then no file is made by looking."""
    return config.store.url == SQLITE and not home.sessions.exists()


async def end_sessions_of(user: str, config: Config, home: Home) -> int | None:
    """End a user's sessions where no server does; how many there were. None: a server does, if one runs."""
    config = with_store(config, CONFIGURED)
    url = config.store.url
    if url == MEMORY or (url == SQLITE and is_in_use(home.sessions)):
        return None
    if has_none(config, home):
        return 0
    try:
        async with opened_store(config, home) as store:
            return len(await store.end_user(user, Code.TOKEN_REVOKED, system_clock.wall()))
    except NotHereError:  # a server was started just now
        return None
    except StoreUnavailable as error:
        raise ConfigError(
            [f"the sessions of the user could not be ended; do it again when the store is there. {error}"]
        ) from error


def is_in_use(path: Path) -> bool:
    """Whether a process has the file of sessions."""
    try:
        descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _ignore(change: Change) -> None:
    """Whatever others do meanwhile."""
