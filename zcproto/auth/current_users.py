"""The users of a file that may change while a server runs.

What this file decides: when the file is read again, and who is told of its faults.

Rules:
- The file is looked at (one stat) whenever a user is sought, and read again when it changed, in a thread.
  While nothing changed, `find` never suspends.
- A file gone bad leaves the users as they were, and is told of once.

It must not know: what users prove who they are by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from zcproto.auth.users import User, UserFile
from zcproto.errors import ConfigError


class CurrentUsers:
    """Users as they are in their file now.

    `on_fault` is called with the fault when the file turns out to be unreadable while the server runs,
    once for each version of the file; `on_recovered` when it is good again.
    """

    __slots__ = ("_faulty", "_file", "_on_fault", "_on_recovered", "_reading")

    def __init__(
        self,
        file: UserFile,
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] | None = None,
    ) -> None:
        self._file = file
        self._on_fault = on_fault
        self._on_recovered = on_recovered
        self._reading = asyncio.Lock()
        self._faulty = False

    async def find(self, name: str) -> User | None:
        if self._file.changed():
            await self._read_again()
        return self._file.find(name)

    async def _read_again(self) -> None:
        """Take in the changed file. Logins that come meanwhile wait for the same reading."""
        async with self._reading:
            if not self._file.changed():
                return
            try:
                await asyncio.to_thread(self._file.reload)
            except ConfigError as fault:
                self._faulty = True
                self._on_fault(fault)
                return
        if self._faulty:
            self._faulty = False
            if self._on_recovered is not None:
                self._on_recovered()
