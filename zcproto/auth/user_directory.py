"""The users of a server: their file, their scheme, and the watch over those that go.

What this file decides: how often the file is looked at when nobody logs in, and that everybody who is gone is told
of until somebody has done something about it.

It must not know: what is done about the sessions of a user who is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from zcproto.auth import ApiKeyAuthenticator, UserFile
from zcproto.common.home import Home
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger

LOOK_INTERVAL: Final = 0.5
"""Seconds from one look at the file to the next: the sessions of a removed user end within a second."""

T = TypeVar("T")

log = get_logger("zcproto.server")


class Users:
    """The users in the file of a home folder.

    `on_gone` is called with each user who was removed or disabled, or has another key or role, while the server
    runs; it may tell how many sessions it has ended. If it raises, it is called again at the next look.
    """

    def __init__(
        self,
        home: Home,
        *,
        on_gone: Callable[[str], Awaitable[int | None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Raises ConfigError if the file of users has faults."""
        self._file = UserFile(home.users)
        self._file.load()
        self._on_gone = on_gone
        self._sleep = sleep
        self._gone: dict[str, None] = {}
        self._looking = asyncio.Lock()
        self.authenticator = ApiKeyAuthenticator(
            self._file, on_fault=_unreadable, on_recovered=lambda: log.info("users.readable")
        )
        self.current = self.authenticator.users

    @property
    def file(self) -> UserFile:
        """The file, as of the last look at it."""
        return self._file

    def is_user(self, name: str) -> bool:
        """Whether somebody may open sessions, as of the last look at the file."""
        return self._file.find(name) is not None

    async def watch(self) -> None:
        """Look at the file again and again, until cancelled."""
        while True:
            await self._sleep(LOOK_INTERVAL)
            async with self._looking:
                await self._look()

    async def change(self, change: Callable[[UserFile], T], name: str) -> tuple[T, int]:
        """Change the file in a thread, and look at it at once: what `change` returns, and how many sessions of the
        user ended by it. What `change` raises is raised."""
        async with self._looking:
            made = await asyncio.to_thread(change, UserFile(self._file.path))
            return made, (await self._look()).get(name, 0)

    async def _look(self) -> dict[str, int]:
        """Look at the file, and tell of who is gone: how many sessions ended, by user."""
        ended: dict[str, int] = {}
        try:
            await self.current.refresh()
        except Exception as error:  # a fault of ours must not end the watch
            log.error("users.look_failed", exc_info=error)
        self._gone |= dict.fromkeys(self._file.take_gone())
        for name in list(self._gone):
            try:
                ended[name] = await self._on_gone(name) or 0
            except Exception as error:
                log.error("users.not_gone", user=name, exc_info=error)
            else:
                del self._gone[name]
        return ended


def _unreadable(error: ConfigError) -> None:
    log.error("users.unreadable", faults=error.faults)
