"""Where the durable runs of all processes are kept: here in the memory of one process.

    owner  -> open, append, and `watch`: cancelled? taken?
    reader -> open, read, take, detach, and `watch`: is there more?

Rules:
- A store holds state. A wake-up of `watch` may be lost or come too often: a waiting reader reads again.
- Operations of a store that is away raise Unavailable, without knowing whether they had an effect. All can be
  repeated: an append names its position, an opening its attachment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from zcproto.runs.log import End, Opening, RunKey, RunLimits, RunState, RunTable


class RunStore(Protocol):
    """The runs that the processes of a server share. The operations are those of `RunTable`."""

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]: ...

    async def append(
        self, key: RunKey, generation: bytes, first: int, bodies: Sequence[bytes], end: End | None
    ) -> RunState | None: ...

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int
    ) -> tuple[RunState, Sequence[bytes]]: ...

    async def take(self, key: RunKey, attachment: str, position: int) -> None: ...

    async def detach(self, key: RunKey, attachment: str) -> None: ...

    async def cancel(self, key: RunKey, reason: str) -> bool: ...

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]: ...

    async def forget(self, user: str) -> int: ...

    async def start(self) -> None:
        """Connect to the other processes, and stay connected. Does not wait for them."""

    async def stop(self) -> None: ...

    def reconfigure(self, limits: RunLimits) -> None: ...

    def sweep(self) -> None:
        """Delete what is not kept any more, as the owner of runs calls it every few seconds."""

    def watch(self, key: RunKey, wake: Callable[[], None]) -> None: ...

    def unwatch(self, key: RunKey, wake: Callable[[], None]) -> None: ...


class MemoryRuns:
    """The store of a server of one process. `now` returns monotonic seconds."""

    def __init__(self, table: RunTable, now: Callable[[], float]) -> None:
        self.table = table
        self._now = now
        self.watch = table.watch
        self.unwatch = table.unwatch

    async def start(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    async def open(self, key: RunKey, opening: Opening) -> tuple[bool, RunState]:
        return self.table.open(key, opening, self._now())

    async def append(
        self, key: RunKey, generation: bytes, first: int, bodies: Sequence[bytes], end: End | None
    ) -> RunState | None:
        return self.table.append(key, generation, first, bodies, end, self._now())

    async def read(
        self, key: RunKey, attachment: str, position: int, items: int, size: int
    ) -> tuple[RunState, Sequence[bytes]]:
        return self.table.read(key, attachment, position, items, size)

    async def take(self, key: RunKey, attachment: str, position: int) -> None:
        self.table.take(key, attachment, position)

    async def detach(self, key: RunKey, attachment: str) -> None:
        self.table.detach(key, attachment, self._now())

    async def cancel(self, key: RunKey, reason: str) -> bool:
        return self.table.cancel(key, reason)

    async def runs(self, user: str) -> list[tuple[RunKey, RunState]]:
        return self.table.runs(user)

    async def forget(self, user: str) -> int:
        return self.table.forget(user, self._now())

    def reconfigure(self, limits: RunLimits) -> None:
        self.table.limits = limits

    def sweep(self) -> None:
        self.table.sweep(self._now())
