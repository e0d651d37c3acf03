"""Provide the users and devices of a server, and end the sessions of those that are gone.

Decides: how often a file is checked without logins. Every entry that is gone is reported until its sessions have
been ended.

Must not know: how sessions are ended.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final, Generic, TypeVar

from zcproto.auth.api_key import ApiKeyAuthenticator
from zcproto.auth.device import DeviceAuthenticator
from zcproto.auth.devices import DeviceFile, RegisteredDevice
from zcproto.auth.files import CurrentFile, Entry, TableFile
from zcproto.auth.pairing import Enrollment, PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.auth.users import CurrentUsers, User, UserFile
from zcproto.common.home import Home
from zcproto.observe.log import get_logger

LOOK_INTERVAL: Final = 0.5
"""Seconds between checks of a file: sessions of a removed user or device end within a second."""

T = TypeVar("T")

log = get_logger("zcproto.server")


class Directory(Generic[Entry]):
    """Entries of a file, watched for those that are gone.

    `on_gone` ends the sessions of an entry that is gone and returns how many; if it raises, it is called again
    after the next check. Raises ConfigError if the file has faults.
    """

    def __init__(
        self,
        file: TableFile[Entry],
        *,
        on_gone: Callable[[str, Entry], Awaitable[int | None]],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        file.load()
        self._file = file
        self._on_gone = on_gone
        self._sleep = sleep
        self._gone: dict[tuple[str, Entry], None] = {}
        self._checking = asyncio.Lock()
        self.current = CurrentFile(
            file,
            on_fault=lambda fault: log.error(f"{file.kind}s.unreadable", faults=fault.faults),
            on_recovered=lambda: log.info(f"{file.kind}s.readable"),
        )

    async def watch(self) -> None:
        """Check the file until cancelled."""
        while True:
            await self._sleep(LOOK_INTERVAL)
            async with self._checking:
                await self._check()

    async def _change(self, change: Callable[[], T], name: str) -> tuple[T, int]:
        """Change the file in a thread and apply the change at once.

        Return the result of `change`, and how many sessions of the entry have ended.
        """
        async with self._checking:
            result = await asyncio.to_thread(change)
            return result, (await self._check())[name]

    async def _check(self) -> Counter[str]:
        """Apply changes of the file. Return how many sessions have ended, by name."""
        kind = self._file.kind
        try:
            await self.current.refresh()
        except Exception as error:  # an internal error must not end the watch
            log.error(f"{kind}s.look_failed", exc_info=error)
        self._gone |= dict.fromkeys(self._file.take_gone())
        ended: Counter[str] = Counter()
        for gone in list(self._gone):
            try:
                ended[gone[0]] += await self._on_gone(*gone) or 0
            except Exception as error:
                log.error(f"{kind}s.not_gone", exc_info=error, **{kind: gone[0]})
            else:
                del self._gone[gone]
        return ended


class Users(Directory[User]):
    """The users of a home folder, and the scheme `api_key`. `on_gone` is called with the name of a user."""

    def __init__(
        self,
        home: Home,
        *,
        on_gone: Callable[[str], Awaitable[int | None]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.file = UserFile(home.users)
        super().__init__(self.file, on_gone=lambda name, user: on_gone(name), sleep=sleep)
        self.authenticator = ApiKeyAuthenticator(self.current)

    def is_user(self, name: str) -> bool:
        """Return whether a user may open sessions, as of the last reading."""
        return self.file.find(name) is not None

    async def change(self, change: Callable[[UserFile], T], name: str) -> tuple[T, int]:
        """Change a user. Return the result of `change`, and how many of the user's sessions have ended."""
        return await self._change(partial(change, UserFile(self.file.path)), name)


class Devices(Directory[RegisteredDevice]):
    """The devices of the users in `users`, the scheme `ed25519`, and pairing.

    `on_gone` is called with the name of a device and the device as it was; `on_refused` with the reason and the
    client's address when a device is refused.
    """

    def __init__(
        self,
        home: Home,
        users: CurrentUsers,
        throttle: Throttle,
        *,
        on_gone: Callable[[str, RegisteredDevice], Awaitable[int | None]],
        on_refused: Callable[[str, str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.file = DeviceFile(home.devices)
        super().__init__(self.file, on_gone=on_gone, sleep=sleep)
        self.authenticator = DeviceAuthenticator(self.current, users, on_refused=on_refused)
        self.enrollment = Enrollment(PairingFile(home.pairing), self.file, users, throttle)

    @property
    def known(self) -> Mapping[str, RegisteredDevice]:
        """The devices by name, as of the last reading."""
        return self.file.entries

    async def remove(self, name: str) -> tuple[RegisteredDevice, int]:
        """Remove a device. Return it, and how many of its sessions have ended. Raises NotFound, ConfigError."""
        return await self._change(partial(DeviceFile(self.file.path).remove, name), name)
