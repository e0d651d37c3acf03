"""Processes of one server that call each other's clients, over a carrier that can lose messages."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

from tests.helpers import FakeClock, until
from tests.sessions.helpers import CountedEntropy
from zcproto.app.context import MOST_FOUND, ConnectedClient
from zcproto.bus.topics import Carrier, SharedTopics
from zcproto.common.clock import Clock, Entropy
from zcproto.connection.settings import ConnectionSettings
from zcproto.server.clients import CallLimits, RegisteredClients
from zcproto.server.remote_clients import RemoteClients
from zcproto.server.state import ServerState


class Bus:
    """What carries the messages of all processes. Those to which `loses` says so are lost."""

    def __init__(self) -> None:
        self.processes: list[BusProcess] = []
        self.lost_kinds: set[int] = set()
        self.delivered: list[int] = []

    def publish(self, sender: BusProcess, name: str, body: bytes) -> None:
        receivers = [each for each in self.processes if name in each.follows and each.topics.is_up]
        kind = body[1]  # a msgpack list whose first part is a small number
        self.delivered.append(kind)
        for each in receivers:
            is_own = each is sender
            if is_own or kind not in self.lost_kinds:
                each.topics.received(name, b"e", 0, 0, b"" if is_own else body, is_own=is_own)
        sender.topics.acknowledged(name, len(receivers))


class Connection:
    """A connection of a client that handles methods. Each call waits for `answer`."""

    peer = "192.0.2.1"
    is_draining = False

    def __init__(self, id_: str) -> None:
        self.id = id_
        self.calls: list[tuple[str, Any]] = []
        self.withdrawn = 0
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def call_here(
        self, session_id: str, method: str, params: Any, seconds: float, traceparent: str | None
    ) -> Any:
        self.calls.append((method, params))
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.withdrawn += 1
            raise


class Process:
    """A process of the server whose topics have this carrier."""

    def __init__(self, carrier: Carrier, clock: Clock, entropy: Entropy) -> None:
        self.clients = RegisteredClients(CallLimits())
        state = SimpleNamespace(
            clients=self.clients,
            clock=clock,
            entropy=entropy,
            tracing=None,
            settings=ConnectionSettings(),
        )
        self.topics = SharedTopics(carrier, clock.now)
        self.remote = RemoteClients(cast("ServerState", state), self.topics)

    def register(self, user: str = "ada", id_: str = "c1") -> Connection:
        connection = Connection(id_)
        session = cast("Any", SimpleNamespace(id=f"session of {user}", user=user, bound=False))
        self.clients.add(cast("Any", connection), session, frozenset(("approve",)))
        return connection

    async def find(self, user: str | None = None, most: int = MOST_FOUND) -> list[ConnectedClient]:
        return await self.remote.find(user, "approve", most)


class BusProcess(Process):
    """A process on a bus, and its carrier."""

    absence_s = 5.0
    unreadable = 0

    def __init__(self, bus: Bus, clock: FakeClock, entropy: CountedEntropy) -> None:
        super().__init__(self, clock, entropy)
        self.bus = bus
        self.waiting = 0
        self.follows: set[str] = set()
        bus.processes.append(self)

    async def start(self, topics: SharedTopics) -> None:
        topics.up()

    async def stop(self) -> None: ...

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        assert body is not None
        asyncio.get_running_loop().call_soon(self.bus.publish, self, name, body)

    def follow(self, name: str) -> None:
        self.follows.add(name)
        self.topics.at(name, b"e", 0)

    def unfollow(self, name: str) -> None: ...


class Two:
    """Two processes: methods run in `here`, and a client is connected to the other one."""

    def __init__(self) -> None:
        self.bus, self.clock, entropy = Bus(), FakeClock(), CountedEntropy()
        self.here, self.there = (BusProcess(self.bus, self.clock, entropy) for _ in range(2))
        self.connection = self.there.register()

    async def call(self, **options: Any) -> asyncio.Task[Any]:
        """Return a call that has arrived."""
        (client,) = await self.here.find("ada")
        task = asyncio.create_task(client.call("approve", {"tool": "ls"}, **options))
        calls = len(self.connection.calls)
        await until(lambda: len(self.connection.calls) > calls)
        return task

    def check(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        for each in self.bus.processes:
            each.remote.check(self.clock.now())
