"""A store that servers share, with a replica that lags: the contract of Valkey's, and failovers that lose writes.

The servers' side of it, `StoreLink`, and its faults are those of tests/properties/nodes.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from random import Random
from typing import Any

from tests.helpers import drive
from tests.properties import nodes
from tests.simulation.loop import SimulatedLoop
from tests.stores.memory_store import MemoryStore
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.stores.base import Claim

DELAY_S = 2e-4, 2e-3
SLOW_S = 0.2
MAX_SESSIONS = 5_000


class Copy:
    """One server of the store: the primary, or a replica."""

    def __init__(self, random: Random) -> None:
        settings = SessionSettings(per_user=1_000, max_sessions=MAX_SESSIONS, dead_limit=MAX_SESSIONS)
        self.registry = SessionRegistry(settings, random.randbytes)
        self.at = 0
        self.is_read_only = False
        self.store: Any = MemoryStore(self.registry, time=self._now)

    def _now(self) -> int:
        return self.at

    def apply(self, node: str, at: int, name: str, arguments: tuple[Any, ...]) -> Any:
        self.store.holder, self.at = node, at
        return drive(getattr(self.store, name)(*arguments))

    def copy(self, random: Random) -> Copy:
        """Return a replica with the same data."""
        other = Copy(random)
        other.at = self.at
        for record in self.registry.records(None, self.registry.kept):
            other.registry.restore(record)
        for ended in self.registry.ended_since(0):
            other.registry.restore_ended(ended)
        other.store._leases, other.store._last = deepcopy((self.store._leases, self.store._last))
        for key, entry in self.store._answers._entries.items():
            other.store._answers.restore(key, copy(entry))
        return other


class SharedStore(nodes.Store):
    """The store. `on_lost` is called with each write that a failover loses."""

    def __init__(self, random: Random, on_lost: Callable[[str, str, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self._random = random
        self._on_lost = on_lost
        self.primary: Any = Copy(random)
        self._replica = Copy(random)
        self._lagging: deque[nodes.Applied] = deque()

    def apply(self, link: nodes.StoreLink, server: Any, name: str, arguments: tuple[Any, ...]) -> Any:
        if server is self.primary and name in nodes.WRITES and name != "ping":
            self._lagging.append((link.name, link.wall(), name, arguments))
            while len(self._lagging) > self._random.randrange(1, 64):
                self._replica.apply(*self._lagging.popleft())
        return super().apply(link, server, name, arguments)

    def fail_over(self, lost: int, *, is_planned: bool) -> None:
        """Promote the replica, which lacks at most `lost` writes."""
        while len(self._lagging) > lost:
            self._replica.apply(*self._lagging.popleft())
        for process, _, name, arguments in self._lagging:
            self._on_lost(process, name, arguments)
        self._lagging.clear()
        self.primary.is_read_only = not is_planned
        self.primary, self._replica = self._replica, self._replica.copy(self._random)


class ServerLink(nodes.StoreLink):
    """The connection of one server process. `living` are the processes that hold claims."""

    def __init__(
        self, store: SharedStore, loop: SimulatedLoop, process: str, living: Callable[[], Sequence[str]]
    ) -> None:
        super().__init__(store, loop)
        self.name = process
        self._living = living
        self._random = loop.random

    def _send(self, arrive: Callable[[], object]) -> None:
        delay = self._random.uniform(*DELAY_S) + (SLOW_S if self.mode == nodes.SLOW else 0.0)
        self._order = max(self._order + 1e-9, self._loop.time() + delay)
        self._arriving.append(arrive)
        self._loop.call_at(self._order, self._arrive_next)

    async def claim(self, user: str, key: str, digest: bytes, lease_ms: int) -> Claim:
        claim: Claim = await self._do("claim", user, key, digest + self.name.encode(), lease_ms)
        is_orphan = bool(claim.owner) and claim.owner.decode() not in self._living()
        return replace(claim, is_orphan=is_orphan)
