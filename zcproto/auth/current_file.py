"""A file that may change while a server runs, and what was in it last.

What this file decides: when the file is read again, and who is told of its faults.

Rules:
- Each `refresh` looks at the file (one stat), and reads it again when it changed, in a thread. While nothing
  changed, it never suspends.
- A file gone bad leaves what was known as it was, and is told of once.

It must not know: what is in the file.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from zcproto.errors import ConfigError


class ReadAgain(Protocol):
    """A file that knows its state. After a fault `changed` is False until the file changes again."""

    def changed(self) -> bool: ...

    def reload(self) -> None: ...


class CurrentFile:
    """A file as it is now.

    `on_fault` is called with the fault when the file turns out to be unreadable while the server runs,
    once for each version of the file; `on_recovered` when it is good again.
    """

    __slots__ = ("_faulty", "_on_fault", "_on_recovered", "_readable", "_reading")

    def __init__(
        self,
        file: ReadAgain,
        *,
        on_fault: Callable[[ConfigError], None],
        on_recovered: Callable[[], None] | None = None,
    ) -> None:
        self._readable = file
        self._on_fault = on_fault
        self._on_recovered = on_recovered
        self._reading = asyncio.Lock()
        self._faulty = False

    def changed(self) -> bool:
        """Whether `refresh` would read the file. Takes one stat."""
        return self._readable.changed()

    async def refresh(self) -> None:
        """Take in the file if it changed."""
        if self.changed():
            await self._read_again()

    async def _read_again(self) -> None:
        """Whoever comes meanwhile waits for the same reading."""
        async with self._reading:
            if not self._readable.changed():
                return
            try:
                await asyncio.to_thread(self._readable.reload)
            except ConfigError as fault:
                self._faulty = True
                self._on_fault(fault)
                return
            self._was_read()
        if self._faulty:
            self._faulty = False
            if self._on_recovered is not None:
                self._on_recovered()

    def _was_read(self) -> None:
        """What is to be done about what is new in the file."""
