"""The devices of a server: their file, their scheme, how they are enrolled, and the watch over those that go.

What this file decides: how often the file is looked at when nobody logs in.

It must not know: what is done about sessions of a device that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from zcproto.auth import CurrentDevices, CurrentUsers, Device, DeviceAuthenticator, DeviceFile, Enrollment
from zcproto.auth.pairing import PairingFile
from zcproto.auth.throttle import Throttle
from zcproto.errors import ConfigError
from zcproto.home import Home
from zcproto.observe.log import get_logger

LOOK_INTERVAL: Final = 0.5
"""Seconds from one look at the file to the next: the sessions of a removed device end within a second."""

log = get_logger("zcproto.server")


class Devices:
    """Devices of the users in `users`.

    `on_gone` is called in the loop with the devices that were removed or became others while the server runs,
    `on_refused` with the reason and the client's address when a device is not let in.
    """

    def __init__(
        self,
        home: Home,
        users: CurrentUsers,
        throttle: Throttle,
        *,
        on_gone: Callable[[Mapping[str, Device]], None],
        on_refused: Callable[[str, str], None],
    ) -> None:
        """Raises ConfigError if the file of devices has faults."""
        file = DeviceFile(home.devices)
        file.load()
        self._current = CurrentDevices(
            file, on_fault=_unreadable, on_recovered=lambda: log.info("devices.readable"), on_gone=on_gone
        )
        self.authenticator = DeviceAuthenticator(self._current, users, on_refused=on_refused)
        self.enrollment = Enrollment(PairingFile(home.pairing), file, users, throttle)

    async def watch(self) -> None:
        """Look at the file again and again, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL)
            try:
                await self._current.refresh()
            except Exception as error:  # a fault of ours must not end the watch
                log.error("devices.look_failed", exc_info=error)


def _unreadable(error: ConfigError) -> None:
    log.error("devices.unreadable", faults=error.faults)
