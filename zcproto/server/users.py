"""The users of a server: their file, their scheme, and the watch over those that go.

What this file decides: how often the file is looked at when nobody logs in, and that everybody who is gone is told
of until somebody has done something about it.

It must not know: what is done about the sessions of a user who is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

from zcproto.auth import ApiKeyAuthenticator, UserFile
from zcproto.errors import ConfigError
from zcproto.home import Home
from zcproto.observe.log import get_logger

LOOK_INTERVAL: Final = 0.5
"""Seconds from one look at the file to the next: the sessions of a removed user end within a second."""

log = get_logger("zcproto.server")


class Users:
    """The users in the file of a home folder.

    `on_gone` is called with each user who was removed or disabled, or has another key or role, while the server
    runs. If it raises, it is called again at the next look.
    """

    def __init__(
        self,
        home: Home,
        *,
        on_gone: Callable[[str], Awaitable[None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Raises ConfigError if the file of users has faults."""
        self._file = UserFile(home.users)
        self._file.load()
        self._on_gone = on_gone
        self._sleep = sleep
        self._gone: dict[str, None] = {}
        self.authenticator = ApiKeyAuthenticator(
            self._file, on_fault=_unreadable, on_recovered=lambda: log.info("users.readable")
        )
        self.current = self.authenticator.users

    def is_user(self, name: str) -> bool:
        """Whether somebody may open sessions, as of the last look at the file."""
        return self._file.find(name) is not None

    async def watch(self) -> None:
        """Look at the file again and again, until cancelled."""
        while True:
            await self._sleep(LOOK_INTERVAL)
            try:
                await self.current.refresh()
            except Exception as error:  # a fault of ours must not end the watch
                log.error("users.look_failed", exc_info=error)
            self._gone |= dict.fromkeys(self._file.take_gone())
            for name in list(self._gone):
                try:
                    await self._on_gone(name)
                except Exception as error:
                    log.error("users.not_gone", user=name, exc_info=error)
                else:
                    del self._gone[name]


def _unreadable(error: ConfigError) -> None:
    log.error("users.unreadable", faults=error.faults)
