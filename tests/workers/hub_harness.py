"""A process with a store, and others that have it over links: all in one event loop."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import FakeClock, until  # noqa: F401 - with the harness
from tests.limits import TIMEOUT
from tests.sessions.helpers import CountedEntropy
from tests.stores.contract import StoreTime
from zcproto.common.unix_socket import listen_unix
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import Change, SessionStore
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.workers.hub import StoreHub
from zcproto.workers.link import LinkClient, LinkServer, Topics
from zcproto.workers.remote_store import RemoteStore, StoreServer


class HubHarness:
    """Processes that share a store in a file, or in memory. `changes` are what each of them was notified of."""

    def __init__(self, folder: Path, *, in_memory: bool = False) -> None:
        self._folder = folder
        self.path = folder / "link.sock"
        self._in_memory = in_memory
        self.time = StoreTime()
        self.clock = FakeClock()
        self.entropy = CountedEntropy()
        self.remotes: list[tuple[RemoteStore, LinkClient]] = []
        self.changes: list[list[Change]] = []
        self.hub: StoreHub
        self.server: LinkServer
        self.is_running = False

    async def start(self, store: SessionStore | None = None, answers: AnswerLimits = DEFAULT_LIMITS) -> None:
        """Start the process with the store."""
        path = None if self._in_memory else self._folder / "home" / "sessions.db"
        self.hub = StoreHub(
            store or SqliteStore(path, answers=answers, time=self.time, timeout=TIMEOUT),
            is_lasting=not self._in_memory,
            now=self.clock.now,
            entropy=self.entropy,
        )
        self.server = LinkServer(listen_unix(self.path, 16), Topics(), name="coordinator")
        self.stores = StoreServer(self.hub)
        self.stores.serve(self.server)
        await self.server.start()
        self.is_running = True

    async def stop(self) -> None:
        if self.is_running:
            self.is_running = False
            await self.server.close()
            await self.hub.close()

    def remote(self, answers: AnswerLimits = DEFAULT_LIMITS) -> tuple[RemoteStore, LinkClient]:
        """Return the store of another process, not opened, and its connection for calls."""
        path = self.path
        calls = LinkClient(path, Topics(), name="worker", silence=TIMEOUT, random=lambda: 0.0)
        calls.start()
        store = RemoteStore(
            path, calls, name="worker", silence=TIMEOUT, answers=answers, entropy=self.entropy
        )
        self.remotes.append((store, calls))
        return store, calls

    async def opened(self, answers: AnswerLimits = DEFAULT_LIMITS) -> RemoteStore:
        store, _ = self.remote(answers)
        changes: list[Change] = []
        self.changes.append(changes)
        await store.open(changes.append)
        return store

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        await self.stop()
        await self.start(answers=answers)
        return await self.opened(answers)

    async def reopen(self, store: SessionStore) -> SessionStore:
        await store.close()
        return await self.make_store()

    async def close(self) -> None:
        for store, calls in self.remotes:
            await store.close()
            await calls.close()
        await self.stop()
