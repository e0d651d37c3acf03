"""Provide the users or the devices of a server as of now, and end the sessions of those that are gone.

Decides: when a file is read again, when its faults are reported, how often it is checked without logins, and which
changes of a user or a device end sessions that an older copy of a store brings back.

Rules:
- Each `refresh` looks at the file (one stat) and reads it in a thread if it has changed; otherwise it does not
  suspend. Concurrent refreshes share one reading.
- A faulty file leaves the known entries as they were, and is logged once. Changes are logged by one process.
- Every entry that is gone is reported until its sessions have been ended.
- The origin of a session is a digest of what its user and device had when it was opened: key and roles. A session
  of another origin than that of now is refused. A file that was changed and has not been read yet decides nothing:
  another process may have read it before it opened the session.

Must not know: how sessions are ended, stores.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Generic, TypeVar

from zcproto.auth.devices import RegisteredDevice
from zcproto.auth.files import Entry, TableFile
from zcproto.auth.users import User
from zcproto.common.deadlines import sleep_together
from zcproto.common.roles import Roles
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.sessions.record import NO_ORIGIN, ORIGIN_SIZE
from zcproto.sessions.session import DEVICE_KEY

LOOKS_REMEMBERED: Final = 10
"""Checks for which an ended entry is remembered, at least: reports of other processes follow."""

LOOK_INTERVAL: Final = 0.5
"""Seconds between checks of a file: sessions of a removed user or device end within a second."""

_ORIGIN: Final = b"zcproto origin 1\0"

T = TypeVar("T")

log = get_logger("zcproto.server")


class Directory(Generic[Entry]):
    """Entries of a file as of now. `watch` finds those that are gone.

    `on_gone` ends the sessions of an entry that is gone, by its name and the entry before, and returns how many. If
    it raises, it is called again after the next check. `watch` calls `on_gone_elsewhere` instead if it is given:
    another process watches the file too, and ends the sessions. `on_read` is called with the faults for which a
    changed file is not taken, and with none when it can be read again. Raises ConfigError if the file has faults.
    """

    def __init__(
        self,
        file: TableFile[Entry],
        *,
        on_gone: Callable[[str, Entry], Awaitable[int | None]],
        on_gone_elsewhere: Callable[[str, Entry], Awaitable[int | None]] | None = None,
        on_read: Callable[[Sequence[str]], None] = lambda faults: None,
        sleep: Callable[[float], Awaitable[None]] = sleep_together,
    ) -> None:
        file.load()
        self.file = file
        self.known = file.find
        """Returns an entry that may open sessions, as of the last reading."""
        self._on_gone = on_gone
        self._on_read = on_read
        self._logs_changes = on_gone_elsewhere is None
        self._on_gone_elsewhere = on_gone if on_gone_elsewhere is None else on_gone_elsewhere
        self._sleep = sleep
        self._faulty = False
        self._gone: dict[tuple[str, Entry], None] = {}
        self._ended: set[str] = set()
        self._ended_before: set[str] = set()
        self._reading = asyncio.Lock()
        self._checking = asyncio.Lock()

    def changed(self) -> bool:
        """Return whether `refresh` would read the file. Takes one stat."""
        return self.file.changed()

    async def refresh(self) -> None:
        """Read the file if it has changed."""
        if not self.changed():
            return
        async with self._reading:
            if not self.changed():  # read by a concurrent refresh
                return
            try:
                await asyncio.to_thread(self.file.reload)
            except ConfigError as fault:
                self._faulty = True
                log.error(f"{self.file.kind}s.unreadable", faults=fault.faults)
                self._on_read(fault.faults)
                return
        if self._faulty:
            self._faulty = False
            log.info(f"{self.file.kind}s.readable")
            self._on_read([])
        for change in self.file.take_changes():
            if self._logs_changes:
                _, added, changed, removed = change
                log.info(
                    f"{self.file.kind}s.changed",
                    count=change.total,
                    added=added or None,
                    changed=changed or None,
                    removed=removed or None,
                )

    async def find(self, name: str) -> Entry | None:
        """Return an entry that may open sessions, as of now."""
        await self.refresh()
        return self.file.find(name)

    def is_known(self, name: str) -> bool:
        """Return whether an entry may open sessions, as of the last reading."""
        return self.known(name) is not None

    async def watch(self) -> None:
        """Check the file until cancelled."""
        while True:
            for _ in range(LOOKS_REMEMBERED):
                await self._sleep(LOOK_INTERVAL)
                async with self._checking:
                    await self._check(self._on_gone_elsewhere)
            self._ended, self._ended_before = set(), self._ended

    async def report_gone(self, name: str, entry: Entry) -> None:
        """End the sessions of an entry that another process has found gone, unless that has been done lately.

        This process may have read the file for the first time after the change.
        """
        async with self._checking:
            await self._check(self._on_gone)
            if name not in self._ended and name not in self._ended_before:
                await self._on_gone(name, entry)
                self._ended.add(name)

    async def change(self, change: Callable[[], T], name: str) -> tuple[T, int]:
        """Change an entry in a thread and apply the change at once. `change` uses a file object of its own.

        Return the result of `change`, and how many sessions of the entry have ended.
        """
        async with self._checking:
            result = await asyncio.to_thread(change)
            return result, (await self._check(self._on_gone))[name]

    async def _check(self, on_gone: Callable[[str, Entry], Awaitable[int | None]]) -> Counter[str]:
        """Apply changes of the file. Return how many sessions have ended, by name."""
        kind = self.file.kind
        try:
            await self.refresh()
        except Exception as error:  # an internal error must not end the watch
            log.error(f"{kind}s.look_failed", exc_info=error)
        self._gone |= dict.fromkeys(self.file.take_gone())
        ended: Counter[str] = Counter()
        for gone in list(self._gone):
            try:
                ended[gone[0]] += await on_gone(*gone) or 0
            except Exception as error:
                log.error(f"{kind}s.not_gone", exc_info=error, **{kind: gone[0]})
            else:
                del self._gone[gone]
                self._ended.add(gone[0])
        return ended


@dataclass(frozen=True, slots=True)
class Origins:
    """The origins of sessions by the files of users and devices, as of the last reading."""

    users: Directory[User]
    devices: Directory[RegisteredDevice]

    def of(self, user: str, key: str) -> bytes:
        """Return the origin of a session that this user opens now. `key` is what it is bound to, empty for none."""
        known = self.users.known(user)
        if known is None:
            return NO_ORIGIN
        data = _ORIGIN + known.digest + _roles(known.roles)
        if key.startswith(DEVICE_KEY):
            device = self.devices.known(key.removeprefix(DEVICE_KEY))
            if device is None:
                return NO_ORIGIN
            data += device.public_key + (b"all" if device.roles is None else _roles(device.roles))
        return sha256(data).digest()[:ORIGIN_SIZE]

    def applies(self, user: str, key: str, origin: bytes) -> bool:
        """Return whether a session of this origin may be used."""
        return origin == self.of(user, key) or self.users.changed() or self.devices.changed()


def _roles(roles: Roles) -> bytes:
    return " ".join(sorted(roles)).encode() + b"\0"
