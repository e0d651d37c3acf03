"""Simulate nodes without I/O that share a store with faults, each with an event loop in simulated time.

A store has a primary, which applies operations, and replicas that lack its last ones. A node reaches the primary by
a link with faults of its own. Nothing here waits: `Simulation.advance` runs the timers of all nodes in their order.
"""

from __future__ import annotations

import asyncio
import heapq
import selectors
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers import SALT, WALL, drive
from tests.sessions.helpers import CountedEntropy
from tests.stores.memory_store import MemoryStore
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import ErrorReceived, KeyWanted, ResponseReceived, SessionJoined, TokenUnknown
from zcproto.connection.server import ServerConnection
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import CallError, Code
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.sessions.record import Rotation, SessionRecord
from zcproto.sessions.token import id_from_text
from zcproto.stores.base import Change, ChangeKind, Created, NotRotated, StoreUnavailable
from zcproto.stores.operations import UPKEEP
from zcproto.stores.pending import PendingRevocations, Revocation
from zcproto.stores.service import StoredSessionService
from zcproto.stores.sync import StoreSync
from zcproto.wire.frame import RESPONSE
from zcproto.wire.message import encode_body, encode_error

HEARTBEAT_S = 1.0
TIMEOUT_S = 0.5
GRACE_S = 20.0
RECONNECT_S = 0.5
DELAY_S = 0.2

WORKS, SLOW, REFUSES, LOSES_REQUESTS, LOSES_ANSWERS, DELAYS_REQUESTS = (
    "works",
    "answers slowly",
    "refuses",
    "loses requests",
    "loses answers",
    "delays requests until it works again",
)
FAULTS = (SLOW, REFUSES, LOSES_REQUESTS, LOSES_ANSWERS, DELAYS_REQUESTS)


class SimulatedTime:
    """Monotonic and wall time of all nodes."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def now(self) -> float:
        return self.now_s


class NodeClock:
    """The clock of one node: its wall clock may be wrong by `offset_ms`."""

    def __init__(self, time: SimulatedTime) -> None:
        self._time = time
        self.offset_ms = 0

    def now(self) -> float:
        return self._time.now_s

    def wall(self) -> int:
        return WALL + round(self._time.now_s * 1_000) + self.offset_ms


class _IdleSelector(selectors.SelectSelector):
    """Stop the loop as soon as nothing is ready."""

    loop: asyncio.AbstractEventLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > 0:
            self.loop.stop()
        return []


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time others advance. `run_forever` runs what is ready."""

    def __init__(self, time: SimulatedTime) -> None:
        self._simulated = time
        self.failures: list[dict[str, Any]] = []
        selector = _IdleSelector()
        super().__init__(selector)
        selector.loop = self
        self.set_exception_handler(lambda loop, context: self.failures.append(context))

    def time(self) -> float:
        return self._simulated.now_s

    @property
    def next_timer(self) -> float:
        scheduled: list[asyncio.TimerHandle] = self._scheduled
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False
        return scheduled[0].when() if scheduled else float("inf")


class MemoryPending(PendingRevocations):
    """Pending revocations on a disk that survives a crash of the node."""

    def __init__(self, disk: dict[Any, Revocation]) -> None:
        super().__init__(Path("unused"))
        self._disk = disk
        self.works = True

    async def open(self) -> None:
        self._entries = dict(self._disk)

    async def close(self) -> None:
        """Do nothing."""

    async def _submit(self, work: Callable[[], object], within: float) -> None:
        await asyncio.sleep(0)
        if not self.works:
            raise StoreUnavailable("the disk is full")
        self._disk.clear()
        self._disk.update(self._entries)


WRITES = frozenset(
    {
        *("create", "rotate", "touch", "end", "end_user", "end_all", "lease", "expire", "ping"),
        *("claim", "keep_answer", "release_claim"),
    }
)

Applied = tuple[str, int, str, tuple[Any, ...]]
"""The node and the time of an operation, its name and arguments."""


class Server:
    """One server of the store: the operations that it has applied, and their result."""

    def __init__(self, settings: SessionSettings, applied: list[Applied]) -> None:
        self._settings = settings
        self.applied: list[Applied] = []
        self.is_read_only = False
        self.registry = SessionRegistry(settings, CountedEntropy())
        self._at = 0
        self.store: Any = MemoryStore(self.registry, time=lambda: self._at)
        for operation in applied:
            self.apply(*operation)

    def apply(self, node: str, at: int, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in WRITES and name != "ping":
            self.applied.append((node, at, name, arguments))
        self.store.holder, self._at = node, at
        return drive(getattr(self.store, name)(*arguments))

    def behind(self, lost: int) -> Server:
        """Return a server without the last operations."""
        return Server(self._settings, self.applied[: len(self.applied) - lost])

    def live(self, user: str) -> list[SessionRecord]:
        return self.registry.records(user, self.registry.kept)


class Store:
    """The servers of a store: `primary`, and an earlier one that some nodes may not have left yet."""

    def __init__(self) -> None:
        self.primary = Server(SessionSettings(per_user=1_000), [])
        self.links: list[StoreLink] = []
        self.on_evicted: Callable[[bytes, list[bytes]], None] = lambda new, ended: None
        self.on_rotated: Callable[[Rotation, Any], None] = lambda rotation, result: None

    def fail_over(self, lost: int, *, is_planned: bool) -> None:
        """Promote a replica that lacks the last operations. A planned failover leaves the old primary writable."""
        old = self.primary
        self.primary = old.behind(min(lost, len(old.applied)))
        old.is_read_only = not is_planned

    def lose_all(self) -> None:
        """Restart the primary without its data."""
        self.primary = Server(SessionSettings(per_user=1_000), [])
        for link in self.links:
            link.is_emptied = True

    def apply(self, link: StoreLink, server: Server, name: str, arguments: tuple[Any, ...]) -> Any:
        before: tuple[Any, ...] = ()
        if name in ("end_all",):
            before = tuple(record.id for record in server.registry.records(None, server.registry.kept))
        result = server.apply(link.name, link.wall(), name, arguments)
        if name == "rotate":
            self.on_rotated(arguments[0], result)
        match name, result:
            case "create", Created(ended=ended):
                changed = [each.id for each in ended]
                self.on_evicted(arguments[0].id, changed)
            case "rotate", SessionRecord() as record:
                changed = [record.id]
            case "rotate", NotRotated(reused=True):
                changed = [arguments[0].id]
            case (("end" | "end_user"), list() as ended):
                changed = [each.id for each in ended]
            case _:
                changed = list(before)
        for other in self.links:
            if other is not link and other.server is server and other.is_up:
                for session_id in changed:
                    other.notify(Change(ChangeKind.SESSION, session_id))
        return result


class StoreLink:
    """The connection of one node to the store, behind the contract of stores."""

    shared = True
    keeps_time = True
    keeps_changes = False

    def __init__(self, store: Store, loop: SteppedLoop) -> None:
        self._shared = store
        self._loop = loop
        self.name = f"node {id(self)}"
        self._on_change: Callable[[Change], None] = lambda change: None
        self._delayed: list[Callable[[], None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._answers: set[asyncio.Future[Any]] = set()
        self._order = 0.0
        self._arriving: deque[Callable[[], object]] = deque()
        self.server = store.primary
        self.is_up = False
        self.is_cut = False
        self.is_emptied = False
        self.mode = WORKS
        store.links.append(self)

    @property
    def is_reachable(self) -> bool:
        return self.mode in (WORKS, SLOW)

    def wall(self) -> int:
        """Return the time of the store."""
        return WALL + round(self._loop.time() * 1_000)

    def set_mode(self, mode: str) -> None:
        self.mode = mode
        if self.is_reachable:
            delayed, self._delayed = self._delayed, []
            for apply in delayed:
                apply()
        elif mode == REFUSES:
            self.lose()

    def cut(self) -> None:
        """End the connection with its process."""
        self._shared.links.remove(self)
        self.is_cut = True
        self.is_up = False
        self._delayed.clear()

    def lose(self) -> None:
        """End the connection. What was sent may be applied, and is not answered.

        As in `Link.lose` of the Valkey client, which fails all commands in flight in the same turn: no answer of a
        lost connection arrives after the node has reconnected and compared its sessions.
        """
        self.is_up = False
        for answer in self._answers:
            answer.done() or answer.set_exception(StoreUnavailable("the connection was lost"))
        self._answers.clear()

    def notify(self, change: Change) -> None:
        """Deliver a change when the node runs, in the order of replies."""
        on_change = self._on_change
        self._send(lambda: on_change(change) if self.is_up and not self.is_cut else None)

    def _send(self, arrive: Callable[[], object]) -> None:
        """Call `arrive` when what is sent now arrives. The order is kept; a heap of timers would not keep it."""
        self._order = max(self._order, self._loop.time() + (DELAY_S if self.mode == SLOW else 0.0))
        self._arriving.append(arrive)
        self._loop.call_at(self._order, self._arrive_next)

    def _arrive_next(self) -> None:
        self._arriving.popleft()()

    # --- the connection ------------------------------------------------------------------------------

    async def open(self, on_change: Callable[[Change], None]) -> None:
        await self._reach()
        self._on_change = on_change
        self.server, self.is_up, self.is_emptied = self._shared.primary, True, False
        self._tasks.append(self._loop.create_task(self._watch(), name=UPKEEP))

    async def close(self) -> None:
        """Do nothing: the nodes of this simulation crash."""

    async def _reach(self) -> None:
        if self.mode == REFUSES:
            raise StoreUnavailable("connection refused")
        if not self.is_reachable or self.is_cut:
            await asyncio.sleep(TIMEOUT_S)
            raise StoreUnavailable("no connection in time")
        if self.mode == SLOW:
            await asyncio.sleep(DELAY_S)

    async def _connect(self) -> None:
        """Connect to the primary again, and report it before anything is sent."""
        await self._reach()
        if self.is_up:
            return
        self.server, self.is_up = self._shared.primary, True
        kind, self.is_emptied = ChangeKind.EMPTIED if self.is_emptied else ChangeKind.ALL, False
        self._on_change(Change(kind))

    async def _watch(self) -> None:
        """Find out at each heartbeat whether the server is still the primary."""
        while True:
            await asyncio.sleep(HEARTBEAT_S if self.is_up else RECONNECT_S)
            try:
                if self.is_up:
                    await self._reach()
            except StoreUnavailable:
                self.lose()
            if self.server is not self._shared.primary:
                self.lose()
            if not self.is_up:
                self._on_change(Change(ChangeKind.LOST))
                with suppress(StoreUnavailable):
                    await self._connect()

    async def _do(self, name: str, *arguments: Any) -> Any:
        if not self.is_up:
            await self._connect()
        server, mode = self.server, self.mode
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._answers.add(answer)

        def apply() -> None:
            if not self.is_cut:
                if server.is_read_only and name in WRITES:
                    self.lose()
                    answer.done() or answer.set_exception(StoreUnavailable("it is a replica"))
                    return
                result = self._shared.apply(self, server, name, arguments)
                if mode in (WORKS, SLOW):
                    self._send(lambda: answer.done() or answer.set_result(result))

        if mode in (WORKS, SLOW):
            self._send(apply)
        elif mode == LOSES_ANSWERS:
            apply()
        elif mode == DELAYS_REQUESTS:
            self._delayed.append(apply)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await answer
        except TimeoutError:
            self.lose()
            raise StoreUnavailable("no answer in time") from None
        finally:
            self._answers.discard(answer)

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self._do(name, *arguments)

    async def ping(self) -> None:
        await self._do("ping")

    async def load(self) -> AsyncIterator[Any]:
        return
        yield


@dataclass
class Conversation:
    """A connection between a client and a node."""

    client: ClientConnection
    server: ServerConnection
    is_busy: bool = False
    is_joined: bool = False
    joined_at: float = 0.0


class Node:
    """A process: registry, sync, sessions and connections."""

    def __init__(
        self,
        store: Store,
        time: SimulatedTime,
        clock: NodeClock,
        disk: dict[Any, Revocation],
        entropy: CountedEntropy,
        settings: SessionSettings,
    ) -> None:
        self.clock = clock
        self.loop = SteppedLoop(time)
        self.link = StoreLink(store, self.loop)
        self.registry = SessionRegistry(settings, entropy)
        self.registry.observers.append(self._session_ended)
        self.pending = MemoryPending(disk)
        self.sync = StoreSync(
            self.link,
            self.registry,
            self.pending,
            is_used=self._is_used,
            in_use=lambda: [each for each in self.conversations if self._is_used(each)],
            wheel=DeadlineWheel(self.loop),
            clock=clock,
            random=lambda: 0.5,
            timeout=TIMEOUT_S,
            grace=GRACE_S,
            heartbeat=HEARTBEAT_S,
            keep_ended_ms=settings.dead_keep_ms,
        )
        self.sessions = StoredSessionService(self.sync, clock)
        self.conversations: dict[str, Conversation] = {}
        self.is_paused = False
        self.starting = self.loop.create_task(self.sync.start())
        self.loop.run_forever()

    @property
    def is_serving(self) -> bool:
        return self.starting.done()

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(work)
        self.run_ready()
        return task

    def run_ready(self) -> None:
        if not self.is_paused:
            self.loop.run_forever()
            assert not self.loop.failures

    def crash(self) -> None:
        """End at once: what was in progress is lost, what was sent is not."""
        self.link.cut()
        self.sync.tasks.is_stopping = True  # so that no cancelled task sets a timer
        tasks = asyncio.all_tasks(self.loop)
        for _ in range(3):
            for task in tasks:
                task.cancel()
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
        self.loop.close()

    # --- connections -----------------------------------------------------------------------------------

    def _is_used(self, session_id: str) -> bool:
        talk = self.conversations.get(session_id)
        return talk is not None and talk.is_joined

    def _session_ended(self, session_id: str, code: Code, reason: str) -> None:
        talk = self.conversations.get(session_id)
        if talk is not None and code is not Code.TOKEN_EXPIRED:
            talk.is_joined = False
            talk.server.session_revoked(session_id, reason, self.clock.wall(), self.clock.now())

    def disconnect(self, session_id: str) -> None:
        """End the connection of a session, if there is one."""
        talk = self.conversations.pop(session_id, None)
        if talk is not None and talk.is_joined:
            self.sync.leases.connection_changed(session_id)

    def _conversation(self, session_id: str) -> Conversation:
        found = self.conversations.get(session_id)
        if found is None:
            wall, now = self.clock.wall(), self.clock.now()
            settings = ConnectionSettings(looks_up=True)
            server = ServerConnection(settings, self.registry, salt=SALT, wall=wall, now=now)
            found = self.conversations[session_id] = Conversation(ClientConnection(), server)
            list(found.client.receive_data(server.data_to_send(), wall, now))
        return found

    async def request(self, session_id: str, token: bytes, on_accepted: Callable[[], None]) -> Code | None:
        """Send a request with a token. Return the code of the answer, None for a result."""
        talk = self._conversation(session_id)
        if talk.is_busy:
            return Code.UNAVAILABLE
        talk.is_busy = True
        try:
            return await self._request(talk, session_id, token, on_accepted)
        finally:
            talk.is_busy = False

    async def _request(
        self, talk: Conversation, session_id: str, token: bytes, on_accepted: Callable[[], None]
    ) -> Code | None:
        wall, now = self.clock.wall(), self.clock.now()
        talk.client.request("echo", {}, wall=wall, token=token)
        for event in talk.server.receive_data(talk.client.data_to_send(), wall, now):
            match event:
                case TokenUnknown():
                    try:
                        await self.sessions.look_up(token, "192.0.2.7", event.code)
                    except CallError as error:
                        event.refusal = encode_error(error.code, error.message, error.details)
                case SessionJoined():
                    talk.is_joined = True
                    talk.joined_at = self.clock.now()
                    self.sync.leases.connection_changed(session_id)
                case KeyWanted():
                    talk.server.tokens.prove(event.key)
                case tuple() if len(event) == 6:
                    on_accepted()
                    talk.server.outbox.send(RESPONSE, event[0], token, encode_body({}), self.clock.wall())
        wall, now = self.clock.wall(), self.clock.now()
        answers = talk.client.receive_data(talk.server.data_to_send(), wall, now)
        for answer in answers:
            if isinstance(answer, ErrorReceived):
                return Code(answer.code)
            if isinstance(answer, ResponseReceived):
                return None
        raise AssertionError("no answer")


@dataclass
class Simulation:
    """Two nodes and their store."""

    settings: SessionSettings
    time: SimulatedTime = field(default_factory=SimulatedTime)

    def __post_init__(self) -> None:
        self.store = Store()
        self.entropy = CountedEntropy()
        self.clocks = NodeClock(self.time), NodeClock(self.time)
        self.disks: tuple[dict[Any, Revocation], ...] = {}, {}
        self.nodes: list[Node | None] = [None, None]
        for number in (0, 1):
            self.start(number)

    def start(self, number: int) -> None:
        self.nodes[number] = Node(
            self.store, self.time, self.clocks[number], self.disks[number], self.entropy, self.settings
        )

    def crash(self, number: int) -> None:
        node = self.nodes[number]
        node.crash()
        self.nodes[number] = None

    @property
    def running(self) -> Iterator[Node]:
        return (node for node in self.nodes if node is not None and not node.is_paused)

    def advance(self, seconds: float, observe: Callable[[], None] = lambda: None) -> None:
        """Run everything that happens in this time."""
        end = self.time.now_s + seconds
        for node in self.running:
            node.run_ready()
        while True:
            observe()
            timers = [(node.loop.next_timer, node) for node in self.running]
            due = min((timer for timer, _ in timers), default=float("inf"))
            if due > end:
                break
            self.time.now_s = max(round(due + 5e-7, 6), self.time.now_s)  # timers may fire slightly early
            for timer, node in timers:
                if timer <= self.time.now_s:
                    node.run_ready()
        self.time.now_s = end

    def close(self) -> None:
        for number, node in enumerate(self.nodes):
            if node is not None:
                node.is_paused = False
                self.crash(number)


def raw_id(session_id: str) -> bytes:
    found = id_from_text(session_id)
    assert found is not None
    return found
