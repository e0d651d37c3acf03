"""The state that all connections of one event loop share: methods, sessions, limits, counters."""

from __future__ import annotations

import asyncio
import copy
import secrets
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nlargest
from itertools import count
from operator import itemgetter
from typing import Any, Final, Protocol

from zcproto.app.app import Access, App, Method
from zcproto.app.context import MOST_FOUND, CallConnection, ConnectedClient
from zcproto.bus.topics import SharedTopics
from zcproto.common.clock import Clock, Entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.events import DurableStream, GoAwayReason
from zcproto.connection.server import ConnectionTotals, ServerConnection
from zcproto.connection.server_calls import CallToClient
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Aborted, CallError, Cancelled, Code, ZcprotoError
from zcproto.observe.log import LogBatch, get_logger
from zcproto.runs.log import RunLimits
from zcproto.runs.store import RunStore
from zcproto.server.clients import CallLimits, RegisteredClients
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import Answer, IdempotencyCache
from zcproto.server.item_budget import ItemBudget
from zcproto.server.partial_frames import PartialFrameLimits, PartialFrames
from zcproto.server.pending import PendingCalls
from zcproto.server.request_limits import RequestLimits
from zcproto.server.threads import ThreadPool
from zcproto.server.tracing import Tracing
from zcproto.sessions import EndReason, Session, SessionRegistry
from zcproto.sessions.binding import SessionBinding
from zcproto.sessions.token import id_text
from zcproto.stores.service import SessionService
from zcproto.wire.message import MessageError, encode_error

CONNECTIONS_PER_TURN: Final = 100

DETACHED: Final = "detached"
"""The key in the details of an ERROR that has ended an attachment and not its run (zcp1.md, section 20)."""

LISTED_CALLS: Final = 1_000
"""Pending calls in one list."""

ABANDONED_S: Final = 2.0
"""How long a drain waits for requests with an idempotency key after their callers have gone."""

PART_BITS: Final = 4
"""One read is timed in each 2**PART_BITS ms of wall time, at most 62 a second: enough for percentiles."""

log = get_logger("zcproto.server")


@dataclass(slots=True)
class Counters(ConnectionTotals):
    """Counters of the hot path; read by metrics and status."""

    requests: int = 0
    errors: Counter[int] = field(default_factory=Counter)
    """Errors that were sent, by code."""
    connections_opened: int = 0
    connections_ended: Counter[str] = field(default_factory=Counter)
    refused_per_address: int = 0
    refused_per_network: int = 0
    refused_flooding: int = 0
    refused_full: int = 0
    accept_failed: int = 0
    sessions_ended: Counter[EndReason] = field(default_factory=Counter)
    """Live sessions that ended, by reason."""
    events: int = 0
    """Events sent by methods and the server; expiry warnings are sent by connections and not counted."""
    streams_open: Counter[str] = field(default_factory=Counter)
    """Streams that have not been answered, by method."""
    streams_cut: Counter[str] = field(default_factory=Counter)
    """Streams that were cancelled before their methods had returned, by reason."""
    large_bytes: int = 0
    """Bytes of bodies that are large enough to leave gaps in the heap, received and sent."""
    write_pauses: int = 0
    incidents: int = 0
    reloads: int = 0
    """Configurations applied while the server ran."""
    reloads_refused: int = 0


ConnectionUses = Mapping[str, Sequence[tuple[int, str]]]
"""By session, connections that use it: since when, in wall time, and the peer's address."""

ConnectionsElsewhere = Callable[[Sequence[str]], Awaitable[ConnectionUses]]
"""Returns the connections of sessions in the other processes of this server."""

LISTED_CONNECTIONS: Final = 16
"""Connections of one session in its description, the newest."""


async def _no_processes(session_ids: Sequence[str]) -> ConnectionUses:
    return {}


class Connection(CallConnection, Protocol):
    """An open connection, as the rest of the server uses it; implemented by `ServerProtocol`."""

    @property
    def in_flight(self) -> int: ...
    @property
    def is_slow_reader(self) -> bool: ...
    @property
    def streams_open(self) -> int: ...
    def session_ended(self, session_id: str, code: Code, reason: EndReason) -> None: ...
    def session_rotated(self, session_id: str, token_digest: bytes) -> None: ...
    def session_used_since(self, session_id: str) -> int | None: ...
    def disprove(self, key: str) -> None: ...
    def cut_denied_streams(self) -> None: ...
    def announce(self, body: bytes) -> None: ...
    def cut_frame(self) -> None: ...
    def leave_runs(self) -> None: ...
    def go_away(self, reason: GoAwayReason) -> None: ...
    def cancel_all(self) -> None: ...
    def close(self, reason: str) -> None: ...


class ClientsElsewhere(Protocol):
    """The clients of the other processes of this server, and the calls to them that are `in_flight`."""

    @property
    def in_flight(self) -> int: ...
    async def find(self, user: str | None, handles: str | None, most: int) -> list[ConnectedClient]: ...
    async def stop(self) -> None: ...


class PendingElsewhere(Protocol):
    """The pending calls of the other processes, for operators."""

    async def list(self, user: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return them, and whether these are all."""

    async def decide(
        self, call_id: str, value: Any, error: CallError | None, operator: str
    ) -> dict[str, Any]:
        """Answer one, and return it. Raises NotFound, Unavailable."""


class Runs(Protocol):
    """The durable runs, as the rest of the server uses them; implemented by `DurableRuns`."""

    store: RunStore
    items: int
    ended: Counter[str]

    @property
    def attached(self) -> int: ...

    def __len__(self) -> int: ...
    async def wait_idle(self) -> None: ...
    def serve(
        self, stream: DurableStream, method: Method, runner: Any, connection: ServerConnection
    ) -> Coroutine[Any, Any, Answer]: ...
    def credit_received(self, stream: DurableStream) -> None: ...
    def cut(self, stream: DurableStream, reason: str) -> None: ...
    def cut_denied(self) -> None: ...
    def reconfigure(self, limits: RunLimits, abandon_after: float) -> None: ...
    def close(self) -> None: ...


class SessionConnections:
    """The connections that use each session.

    `on_changed` is called with a session that got its first connection, or lost its last one and has not ended.
    """

    __slots__ = ("_by_session", "on_changed")

    def __init__(self) -> None:
        self._by_session: dict[str, Connection | set[Connection]] = {}
        self.on_changed: Callable[[str], object] = lambda session_id: None

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_session)

    def __len__(self) -> int:
        return len(self._by_session)

    def has_connection(self, session_id: str) -> bool:
        return session_id in self._by_session

    def join(self, session_id: str, connection: Connection) -> None:
        users = self._by_session.get(session_id)
        if users is None:
            self._by_session[session_id] = connection  # no set for one connection, which is the usual case
            self.on_changed(session_id)
        elif isinstance(users, set):
            users.add(connection)
        elif users is not connection:
            self._by_session[session_id] = {users, connection}

    def leave(self, session_id: str, connection: Connection) -> None:
        users = self._by_session.get(session_id)
        if users is connection:
            del self._by_session[session_id]
            self.on_changed(session_id)
        elif isinstance(users, set):
            users.discard(connection)
            if not users:
                del self._by_session[session_id]
                self.on_changed(session_id)

    def of(self, session_id: str) -> Sequence[Connection]:
        """Return the connections that use a session."""
        users = self._by_session.get(session_id)
        if users is None:
            return ()
        return (*users,) if isinstance(users, set) else (users,)

    def uses(self, session_id: str) -> list[tuple[int, str]]:
        """Return the newest connections that use a session: since when, and the peer's address."""
        return nlargest(
            LISTED_CONNECTIONS,
            (
                (since, connection.peer)
                for connection in self.of(session_id)
                if (since := connection.session_used_since(session_id)) is not None
            ),
        )

    def remove(self, session_id: str) -> Sequence[Connection]:
        """Forget a session that has ended; return the connections that used it."""
        users = self.of(session_id)
        self._by_session.pop(session_id, None)
        return users


@dataclass(kw_only=True, eq=False, slots=True)
class ServerState:
    """The shared state of all connections of one event loop."""

    settings: ConnectionSettings
    registry: SessionRegistry
    sessions: SessionService
    session_connections: SessionConnections = field(default_factory=SessionConnections)
    connections_elsewhere: ConnectionsElsewhere = _no_processes
    binding: SessionBinding = field(default_factory=SessionBinding)
    idempotency: IdempotencyCache
    wheel: DeadlineWheel
    tasks: EagerTasks
    call_soon: Callable[[Callable[[], None]], object]
    clock: Clock
    entropy: Entropy
    write_buffer_bytes: int
    write_timeout: float
    partial_frames: PartialFrames[Connection] = field(
        default_factory=lambda: PartialFrames(PartialFrameLimits())
    )
    threads: ThreadPool = field(default_factory=ThreadPool)
    methods: dict[str, Method] = field(default_factory=dict)
    topics: SharedTopics | None = None
    """The topics of all processes of the server, if there are some, and other processes."""
    runs: Runs | None = None
    """The durable runs, if a method is durable."""
    lifespan_values: dict[App[Any], Any] = field(default_factory=dict)
    """What the lifespans of the application have yielded."""
    counters: Counters = field(default_factory=Counters)
    items: ItemBudget = field(default_factory=ItemBudget)
    request_limits: RequestLimits = field(default_factory=RequestLimits)
    tracing: Tracing | None = None
    telemetry_counts: Callable[[], Iterable[tuple[str, str, int]]] = tuple
    """Returns how much has been sent to a collector: signal, result, count."""
    traffic_begins: Callable[[], None] = lambda: None
    """Called before requests, but not before all of them: after a silence, before the first."""
    timed_part: int = -1
    """The interval of wall time that has had its timed read."""
    connections: set[Connection] = field(default_factory=set)
    draining: bool = False
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when draining begins, for methods that run for long."""
    pins: tuple[str, ...] = ()
    """Pins of the served public keys, in the form that clients accept."""
    pins_next: dict[str, Any] | None = None
    """The data of the event `pins.next`, if a key is to change."""
    announcement: bytes | None = None
    """The body of an event for every connection; future ones get it after WELCOME."""
    clients: RegisteredClients = field(default_factory=lambda: RegisteredClients(CallLimits()))
    """The clients that handle calls."""
    remote_clients: ClientsElsewhere | None = None
    """Those of the other processes of the server, if there are some."""
    pending_elsewhere: PendingElsewhere | None = None
    on_revoked: Callable[[str, int, bool], None] = lambda by, sessions, by_user: None
    """Called when someone has revoked sessions: who, how many, and whether they were that user's own."""
    on_incident: Callable[[str, str, BaseException], None] = lambda what, incident, error: None
    """Called with each internal error: the method, the incident id and the exception."""
    on_refused: Callable[[str, Session | None, Answer], Answer] | None = None
    """Called with each request that may not run: the method, the session and the answer. Returns the answer."""
    run: str = field(default_factory=lambda: secrets.token_hex(2))
    """Prefix of connection ids, different in each process."""
    numbers: Iterator[int] = field(default_factory=partial(count, 1))
    """The numbers of connections, which take one when they are first logged."""
    pending: PendingCalls = field(init=False)
    """The calls that wait for an answer, however long it takes."""
    _refreshing: set[tuple[CallConnection, str]] = field(init=False, default_factory=set)
    """Connections on which a session is being refreshed: they get its newest token."""
    log_soon: LogBatch = field(init=False)
    _drained: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.log_soon = LogBatch(log, self.wheel, self.clock)
        self.pending = PendingCalls(self.clients, self.wheel, self.clock, self.entropy, self.call_soon)
        self.registry.observers.append(self._session_ended)
        self.registry.rotation_observers.append(self._session_rotated)

    async def wait_drained(self) -> None:
        """Wait until no connection is left, then a moment for requests with an idempotency key.

        No caller waits for these any more. An answer that is stored soon still serves a retry.
        """
        if self.connections:
            await self._drained.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(ABANDONED_S):
                await self.idempotency.wait_idle()

    async def find_clients(self, user: str | None, handles: str | None) -> list[ConnectedClient]:
        """Return clients of all processes that handle calls, those of this one first, at most MOST_FOUND."""
        found = self.clients.find(user, handles, MOST_FOUND)
        if self.remote_clients is not None and len(found) < MOST_FOUND:
            found += await self.remote_clients.find(user, handles, MOST_FOUND - len(found))
        return found

    async def list_calls(self, user: str | None) -> tuple[list[dict[str, Any]], bool]:
        """Return the pending calls of all processes, the oldest first, and whether these are all."""
        calls = self.pending.of(user)
        rows, is_complete = [call.as_dict() for call in calls[:LISTED_CALLS]], len(calls) <= LISTED_CALLS
        if self.pending_elsewhere is not None:
            others, has_others = await self.pending_elsewhere.list(user)
            rows = sorted([*rows, *others], key=itemgetter("asked_at"))
            is_complete = is_complete and has_others and len(rows) <= LISTED_CALLS
        return rows[:LISTED_CALLS], is_complete

    async def decide_call(
        self, call_id: str, value: Any, error: CallError | None, operator: str
    ) -> dict[str, Any]:
        """Answer a pending call for an operator, and return it. Raises NotFound, Unavailable."""
        if self.pending_elsewhere is None or self.pending.own(call_id) is not None:
            return self.pending.answer(call_id, value, error, operator).as_dict()
        return await self.pending_elsewhere.decide(call_id, value, error, operator)

    async def announce(self, body: bytes | None) -> None:
        """Send an event to every connection, some in each turn of the loop. None ends the announcement."""
        if body == self.announcement:
            return
        self.announcement = body
        if body is None:
            return
        async for connection in self.each_connection():
            if self.announcement is not body:  # replaced meanwhile
                return
            connection.announce(body)

    async def each_connection(self) -> AsyncIterator[Connection]:
        """Yield the connections that are open now, some in each turn of the loop."""
        for number, connection in enumerate(list(self.connections), 1):
            yield connection
            if number % CONNECTIONS_PER_TURN == 0:
                await asyncio.sleep(0)

    def connection_ended(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.partial_frames.release(connection)
        if self.draining and not self.connections:
            self._drained.set()

    def close(self) -> None:
        self.log_soon.write()
        self.pending.close()
        self.registry.observers.remove(self._session_ended)
        self.registry.rotation_observers.remove(self._session_rotated)

    def reconfigure(self, settings: ConnectionSettings) -> None:
        """Apply new limits to future connections."""
        if self.runs is not None and settings.streams is not None:
            settings = replace(settings, streams=replace(settings.streams, durable=True))
        self.settings = replace(settings, looks_up=self.settings.looks_up)

    def add_methods(self, methods: Iterable[Method]) -> None:
        self.methods.update((method.name, method) for method in methods)

    def restrict(self, access: Mapping[str, Access]) -> None:
        """Let each method be called by those whom its access admits; a method without one by every session.

        Methods are replaced by copies, because other servers in this process may serve them too.
        """
        for name, method in self.methods.items():
            if method.access != access.get(name):
                restricted = self.methods[name] = copy.copy(method)
                restricted.restrict(access.get(name))

    async def cut_denied_streams(self) -> None:
        """Cut the streams that may no longer be opened, those of some connections in each turn of the loop."""
        if self.runs is not None:
            self.runs.cut_denied()
        async for connection in self.each_connection():
            connection.cut_denied_streams()

    async def revoke_all(
        self,
        user: str | None,
        reason: EndReason,
        suppress_event: AbstractContextManager[None] = nullcontext(),  # noqa: B008  it can be used again
    ) -> int:
        """End all sessions of a user, or of all users, and delete the durable runs. Return how many sessions ended.

        Raises Unavailable if the store did not take it in time: what is here has ended nevertheless.
        """
        try:
            if user is None:
                return await self.sessions.revoke_all(reason)
            return await self.sessions.revoke_user(user, reason, suppress_event)
        finally:
            if self.runs is not None:
                await self.runs.store.forget(user)

    def prepare_schemas(self) -> None:
        """Make the schemas of all methods, which takes milliseconds for some, before `server.info` needs them."""
        for method in self.methods.values():
            method.schema_size  # noqa: B018  it is cached

    def _session_ended(self, session_id: str, code: Code, reason: EndReason) -> None:
        self.counters.sessions_ended[reason] += 1
        if reason is EndReason.DISCONNECTED:
            log.info("session.evicted", session=session_id)
        for connection in self.session_connections.remove(session_id):
            connection.session_ended(session_id, code, reason)
        if code is Code.TOKEN_REVOKED:
            self.pending.caller_ended(session_id)

    def _session_rotated(self, session_id: str, token_digest: bytes) -> None:
        for connection in self.session_connections.of(session_id):
            if (connection, session_id) not in self._refreshing:
                connection.session_rotated(session_id, token_digest)

    @contextmanager
    def refreshing(self, connection: CallConnection, session_id: bytes) -> Iterator[None]:
        """Keep a session in use on the connection that refreshes it: its newest token is sent there."""
        key = connection, id_text(session_id)
        self._refreshing.add(key)
        try:
            yield
        finally:
            self._refreshing.discard(key)
            record = self.registry.record(session_id)
            if record is not None:  # the refresh may have failed, or another one may have followed
                connection.session_rotated(key[1], record.token_digest)

    async def ask(
        self,
        user: str,
        call: CallToClient,
        *,
        caller: Session | None = None,
        peer: str = "",
        bound: bool = False,
    ) -> Any:
        """Make a pending call, and return its result."""

        def ask(call: CallToClient) -> Awaitable[Any]:
            most = self.settings.max_body
            return self.pending.ask(user, call, most, caller=caller, peer=peer, bound=bound)

        return await self.trace_call(call, peer, ask)

    async def trace_call(
        self, call: CallToClient, peer: str, send: Callable[[CallToClient], Awaitable[Any]]
    ) -> Any:
        """Make a call to a client, in a span if there is tracing."""
        if self.tracing is None:
            return await send(call)
        return await self.tracing.call_client(call, peer, send)

    def lifespan_value(self, method: str) -> Any:
        """Return the state of a method's application. Raises RuntimeError if it has no lifespan."""
        owner = self.methods[method].owner
        if owner is None:
            raise RuntimeError("this application has no lifespan; pass one: App(lifespan=...)")
        return self.lifespan_values[owner]

    def error_answer(self, method: str, error: BaseException, *, peer: str, connection: str) -> Answer:
        """Return the ERROR that an exception of a method becomes."""
        if isinstance(error, asyncio.CancelledError):
            error = Cancelled("the server cancelled the method")
        elif isinstance(error, ZcprotoError) and error.of_client:
            error = Aborted(f"a call to a client failed: {error}")
        if isinstance(error, CallError):
            details = error.details
            if error.code in (Code.UNAVAILABLE, Code.RESOURCE_EXHAUSTED) and not details:
                details = {"retry_after_ms": self.settings.retry_draining_ms}
            try:
                return Answer(error.code, encode_error(error.code, error.message, details))
            except MessageError as unsendable:
                error = unsendable
        return Answer(Code.INTERNAL, self.internal_error(method, error, peer=peer, connection=connection))

    def internal_error(self, what: str, error: BaseException, *, peer: str, connection: str) -> bytes:
        """Log an internal error; return the ERROR's body, which holds only the incident id."""
        incident = self.incident(what, error, peer=peer, connection=connection)
        return encode_error(Code.INTERNAL, f"internal error, incident {incident}", {"incident": incident})

    def incident(self, what: str, error: BaseException, *, peer: str, connection: str) -> str:
        """Log an internal error with its traceback; return the incident id for the peer."""
        incident_id = secrets.token_hex(8)
        self.counters.incidents += 1
        self.on_incident(what, incident_id, error)
        log.error(
            "request.failed",
            what=what,
            incident=incident_id,
            exc_info=error,
            peer=peer,
            connection=connection,
        )
        return incident_id
