"""The devices of a server: their file, their scheme, how they are enrolled, and the watch over those that go.

What this file decides: how often the file is looked at when nobody logs in, and that every device that is gone is
told of until somebody has done something about it.

It must not know: what is done about sessions of a device that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from zcproto.auth import CurrentDevices, CurrentUsers, Device, DeviceAuthenticator, DeviceFile, Enrollment
from zcproto.auth.pairing import PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.common.home import Home
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger

LOOK_INTERVAL: Final = 0.5
"""Seconds from one look at the file to the next: the sessions of a removed device end within a second."""

log = get_logger("zcproto.server")


class Devices:
    """Devices of the users in `users`.

    `on_gone` is called with each device, by its name, that was removed or became another while the server runs.
    If it raises, it is called again at the next look. `on_refused` is called with the reason and the client's
    address when a device is not let in.
    """

    def __init__(
        self,
        home: Home,
        users: CurrentUsers,
        throttle: Throttle,
        *,
        on_gone: Callable[[str, Device], Awaitable[int | None]],
        on_refused: Callable[[str, str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Raises ConfigError if the file of devices has faults."""
        file = DeviceFile(home.devices)
        file.load()
        self._on_gone = on_gone
        self._sleep = sleep
        self._gone: list[tuple[str, Device]] = []
        self._looking = asyncio.Lock()
        self._file = file
        self._current = CurrentDevices(
            file,
            on_fault=_unreadable,
            on_recovered=lambda: log.info("devices.readable"),
            on_gone=self._note_gone,
        )
        self.authenticator = DeviceAuthenticator(self._current, users, on_refused=on_refused)
        self.enrollment = Enrollment(PairingFile(home.pairing), file, users, throttle)

    @property
    def known(self) -> Mapping[str, Device]:
        """The devices by name, as of the last look at their file."""
        return self._file.devices

    async def watch(self) -> None:
        """Look at the file again and again, until cancelled."""
        while True:
            await self._sleep(LOOK_INTERVAL)
            async with self._looking:
                await self._look()

    async def remove(self, name: str) -> tuple[Device, int]:
        """Remove a device from the file: what it was, and how many sessions ended by it. Raises NotFound,
        ConfigError."""
        async with self._looking:
            removed = await asyncio.to_thread(DeviceFile(self._file.path).remove, name)
            return removed, (await self._look()).get(name, 0)

    async def _look(self) -> dict[str, int]:
        """Look at the file, and tell of what is gone: how many sessions ended, by device."""
        ended: dict[str, int] = {}
        try:
            await self._current.refresh()
        except Exception as error:  # a fault of ours must not end the watch
            log.error("devices.look_failed", exc_info=error)
        gone, self._gone = self._gone, []
        for name, device in gone:
            try:
                ended[name] = await self._on_gone(name, device) or 0
            except Exception as error:
                log.error("devices.not_gone", device=name, exc_info=error)
                self._gone.append((name, device))
        return ended

    def _note_gone(self, gone: Mapping[str, Device]) -> None:
        self._gone += gone.items()


def _unreadable(error: ConfigError) -> None:
    log.error("devices.unreadable", faults=error.faults)
