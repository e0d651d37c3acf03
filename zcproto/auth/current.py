"""Keep the entries of a file current while a server runs.

Decides: when a file is read again, and when its faults are reported.

Rules:
- Each `refresh` looks at the file (one stat) and reads it in a thread if it has changed; otherwise it does not
  suspend. Concurrent refreshes share one reading.
- A faulty file leaves the known entries as they were, and is reported once.

Must not know: what entries are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic

from zcproto.auth.files import Entry, TableFile
from zcproto.errors import ConfigError


class CurrentFile(Generic[Entry]):
    """Entries of a file as of now.

    `on_fault` is called with the fault once for each faulty version of the file, `on_recovered` when the file is
    valid again.
    """

    def __init__(
        self,
        file: TableFile[Entry],
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] = lambda: None,
    ) -> None:
        self.file = file
        self._on_fault = on_fault
        self._on_recovered = on_recovered
        self._reading = asyncio.Lock()
        self._faulty = False

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
                self._on_fault(fault)
                return
        if self._faulty:
            self._faulty = False
            self._on_recovered()

    async def find(self, name: str) -> Entry | None:
        """Return an entry as of now."""
        await self.refresh()
        return self.file.find(name)

    def known(self, name: str) -> Entry | None:
        """Return an entry as of the last reading."""
        return self.file.find(name)
