"""Processes of one server that call each other's clients, over a carrier that can lose messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from types import MethodType, SimpleNamespace
from typing import Any, cast

from tests.helpers import FakeClock, until
from tests.sessions.helpers import CountedEntropy
from zcproto.app.context import MOST_FOUND, ConnectedClient
from zcproto.bus.topics import Carrier, SharedTopics
from zcproto.common.clock import Clock, Entropy
from zcproto.connection.server_calls import CallToClient
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import CallError, Unavailable
from zcproto.server.clients import Answered, CallLimits, RegisteredClients
from zcproto.server.pending import PendingCalls
from zcproto.server.remote_clients import RemoteClients
from zcproto.server.state import ServerState
from zcproto.sessions.session import BOUND
from zcproto.sessions.token import id_text
from zcproto.wire.message import decode_call


class Bus:
    """What carries the messages of all processes. Those of `lost_kinds` are lost.

    With `random`, a fifth of the others is lost, a fifth comes late and in another order, and a tenth comes twice.
    """

    def __init__(self) -> None:
        self.processes: list[BusProcess] = []
        self.lost_kinds: set[int] = set()
        self.delivered: list[int] = []
        self.random: Random | None = None
        self._late: list[tuple[BusProcess, str, bytes]] = []

    def publish(self, sender: BusProcess, name: str, body: bytes) -> None:
        receivers = [each for each in self.processes if name in each.follows and each.topics.is_up]
        kind = body[1]  # a msgpack list whose first part is a small number
        self.delivered.append(kind)
        for each in receivers:
            is_own = each is sender
            if is_own:
                each.topics.received(name, b"e", 0, 0, b"", is_own=True)
            elif kind not in self.lost_kinds:
                self._deliver(each, name, body)
        sender.topics.acknowledged(name, len(receivers))
        while self._late and (self.random is None or self.random.random() < 0.3):
            index = 0 if self.random is None else self.random.randrange(len(self._late))
            self._receive(*self._late.pop(index))

    def _deliver(self, receiver: BusProcess, name: str, body: bytes) -> None:
        fate = 1.0 if self.random is None else self.random.random()
        if 0.2 <= fate < 0.5:
            self._late.append((receiver, name, body))
        if fate >= 0.4:
            self._receive(receiver, name, body)

    def _receive(self, receiver: BusProcess, name: str, body: bytes) -> None:
        receiver.topics.received(name, b"e", 0, 0, body, is_own=False)


class Wheel:
    """Deadlines that are due when a test says so."""

    def __init__(self) -> None:
        self.due: dict[Any, float] = {}

    def set(self, entry: Any, deadline: float) -> None:
        self.due[entry] = deadline

    def discard(self, entry: Any) -> None:
        self.due.pop(entry, None)

    def advance(self, now: float) -> None:
        for entry in [entry for entry, deadline in self.due.items() if deadline <= now]:
            self.due.pop(entry, None)
            entry.handle_deadline(now)


class Sessions:
    """The sessions of all processes, by the digest of their newest token, in a store that can be `away`."""

    def __init__(self) -> None:
        self.records: dict[bytes, Any] = {}
        self.is_away = False
        self._opened = 0

    async def holder(self, digest: bytes) -> Any:
        await asyncio.sleep(0)
        if self.is_away:
            raise Unavailable("the store is away")
        return self.records.get(digest)

    def open(self, user: str, *, bound: bool = False) -> Any:
        self._opened += 1
        raw_id = self._opened.to_bytes(16, "big")
        digest = b"token of %d" % self._opened
        self.records[digest] = SimpleNamespace(id=raw_id, user=user, flags=BOUND if bound else 0)
        return SimpleNamespace(id=id_text(raw_id), user=user, bound=bound, token_digest=digest)


class Connection:
    """A connection of a client that handles methods. Each call waits for `answer`."""

    peer = "192.0.2.1"
    is_draining = False

    def __init__(self, id_: str, session: Any) -> None:
        self.id = id_
        self.session = session
        self.offers: dict[str, Answered] = {}
        self.offered: list[str] = []
        """All that came, also those that were withdrawn or answered."""
        self.calls: list[tuple[str, Any]] = []
        self.withdrawn = 0
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def call_here(self, session_id: str, call: CallToClient) -> Any:
        self.calls.append((call.method, call.params))
        try:
            return await asyncio.shield(self.answer)
        except asyncio.CancelledError:
            self.withdrawn += 1
            raise

    def offer(self, session_id: str, method: str, body: bytes, answered: Answered) -> Callable[[], None]:
        call_id = decode_call(body)[3]
        assert call_id is not None
        assert call_id not in self.offers, "it has this offer"
        self.offers[call_id] = answered
        self.offered.append(call_id)
        return lambda: self.offers.pop(call_id, None) and None

    def decide(self, call_id: str, value: Any = None, error: CallError | None = None) -> None:
        """Answer an offer, with the token that this connection has shown."""
        self.offers.pop(call_id)(self.session, value, error)


class Process:
    """A process of the server whose topics have this carrier."""

    def __init__(
        self, carrier: Carrier, clock: Clock, entropy: Entropy, sessions: Sessions | None = None
    ) -> None:
        self.clients = RegisteredClients(CallLimits())
        self.sessions = sessions or Sessions()
        self.wheel = Wheel()
        call_soon = asyncio.get_running_loop().call_soon
        self.pending = PendingCalls(self.clients, cast("Any", self.wheel), clock, entropy, call_soon)
        state = SimpleNamespace(
            clients=self.clients,
            clock=clock,
            entropy=entropy,
            tracing=None,
            settings=ConnectionSettings(),
            pending=self.pending,
            sessions=self.sessions,
        )
        state.trace_call = MethodType(ServerState.trace_call, state)
        self.topics = SharedTopics(carrier, clock.now)
        self.remote = RemoteClients(cast("ServerState", state), self.topics)

    def register(
        self, user: str = "ada", id_: str = "c1", method: str = "approve", *, bound: bool = False
    ) -> Connection:
        session = self.sessions.open(user, bound=bound)
        connection = Connection(id_, session)
        self.clients.add(cast("Any", connection), session, frozenset((method,)))
        return connection

    def ask(self, user: str = "ada", seconds: float = 3600.0, **options: Any) -> asyncio.Task[Any]:
        asked = self.pending.ask(user, CallToClient("approve", {"tool": "ls"}, seconds), 1 << 20, **options)
        return asyncio.create_task(asked)

    async def find(self, user: str | None = None, most: int = MOST_FOUND) -> list[ConnectedClient]:
        return await self.remote.find(user, "approve", most)


class BusProcess(Process):
    """A process on a bus, and its carrier."""

    absence_s = 5.0
    unreadable = 0

    def __init__(
        self, bus: Bus, clock: FakeClock, entropy: CountedEntropy, sessions: Sessions | None = None
    ) -> None:
        super().__init__(self, clock, entropy, sessions)
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
        sessions = Sessions()
        self.here, self.there = (BusProcess(self.bus, self.clock, entropy, sessions) for _ in range(2))
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
