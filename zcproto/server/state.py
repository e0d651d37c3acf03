"""What all connections of one loop share while a server runs: methods, sessions, limits, counters."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from zcproto.app.app import Method
from zcproto.common.clock import Clock, Entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.settings import ConnectionSettings
from zcproto.errors import Code
from zcproto.observe.log import get_logger
from zcproto.observe.log_batch import LogBatch
from zcproto.server.eager import EagerTasks
from zcproto.server.idempotency import OnceOnly
from zcproto.server.read_timing import ReadTiming
from zcproto.sessions import SessionRegistry
from zcproto.sessions.binding import Binding
from zcproto.stores.service import CLOSED, MemorySessions, Sessions

if TYPE_CHECKING:
    from zcproto.server.protocol import ServerProtocol

ANNOUNCED_PER_TURN: Final = 100
RUN_SIZE: Final = 2

log = get_logger("zcproto.server")


@dataclass(slots=True)
class Counters:
    """Plain integers on the hot path; whoever reports them reads them."""

    requests: int = 0
    errors: dict[int, int] = field(default_factory=dict)
    connections_opened: int = 0
    connections_ended: dict[str, int] = field(default_factory=dict)
    refused_per_address: int = 0
    refused_full: int = 0
    accept_failed: int = 0
    dropped_stale: int = 0
    refused: dict[tuple[str, int], int] = field(default_factory=dict)
    """Frames that led to no method, by cause and by the code that they were answered with."""
    sessions_ended: dict[str, int] = field(default_factory=dict)
    """Live sessions, by reason."""
    events: int = 0
    """Of those that methods and the server send; warnings of expiry are the connection's own."""
    write_pauses: int = 0
    incidents: int = 0
    reloads: int = 0
    """Configurations that were put in force while it ran."""
    reloads_refused: int = 0

    def count_error(self, code: int) -> None:
        self.errors[code] = self.errors.get(code, 0) + 1

    def count_end(self, reason: str) -> None:
        self.connections_ended[reason] = self.connections_ended.get(reason, 0) + 1


OnRevoked = Callable[[str, int, bool], None]
"""Hears of sessions that somebody has ended: who it was, how many, and whether they were that user's own."""


def _nobody(by: str, sessions: int, by_user: bool) -> None:
    """Nobody is told."""


class Serving:
    """One loop's share of a server."""

    def __init__(
        self,
        *,
        settings: ConnectionSettings,
        registry: SessionRegistry,
        methods: Mapping[str, Method],
        wheel: DeadlineWheel,
        tasks: EagerTasks,
        call_soon: Callable[[Callable[[], None]], object],
        clock: Clock,
        entropy: Entropy,
        write_buffer_bytes: int,
        write_timeout: float,
        session_idle_timeout_ms: int | None,
        once: OnceOnly | None = None,
        binding: Binding | None = None,
    ) -> None:
        self.settings = settings
        self.registry = registry
        self.methods = methods
        self.wheel = wheel
        self.tasks = tasks
        self.call_soon = call_soon
        self.clock = clock
        self.entropy = entropy
        self.write_buffer_bytes = write_buffer_bytes
        self.write_timeout = write_timeout
        self.session_idle_timeout_ms = session_idle_timeout_ms
        self.once = OnceOnly(tasks, clock) if once is None else once
        self.binding = Binding() if binding is None else binding
        self.sessions: Sessions = MemorySessions(registry, clock)
        """What `session.*` does; the server puts another one here if sessions are kept in a store."""
        self.counters = Counters()
        self.reads = ReadTiming()
        self.connections: set[ServerProtocol] = set()
        self.draining = False
        self.pins: tuple[str, ...] = ()
        """Pins of the public keys that are served, as clients take them."""
        self.pins_next: dict[str, Any] | None = None
        """What the event `pins.next` says, if there is something to come."""
        self.announcement: bytes | None = None
        """The body of an event that every connection gets, those to come right behind WELCOME."""
        self.revoked = 0
        """Sessions that were ended before their time, but not by whoever had them."""
        self.on_revoked: OnRevoked = _nobody
        self._drained = asyncio.Event()
        self._by_session: dict[str, ServerProtocol | set[ServerProtocol]] = {}
        self.run = secrets.token_hex(RUN_SIZE)
        """What the ids of connections begin with, so that those of another process are others."""
        self._numbers = 0
        self.log_soon = LogBatch(log, wheel, clock)
        registry.observers.append(self._session_ended)

    async def wait_drained(self) -> None:
        """Return when no connection is left, and nothing that would run on without one."""
        if self.connections:
            await self._drained.wait()
        await self.once.wait_idle()

    async def announce(self, body: bytes | None) -> None:
        """Send an event to every connection, some in each turn of the loop. None: there is no more to say."""
        if body == self.announcement:
            return
        self.announcement = body
        if body is None:
            return
        for number, protocol in enumerate(list(self.connections), 1):
            if self.announcement is not body:  # there is something newer to say
                return
            protocol.announce(body)
            if number % ANNOUNCED_PER_TURN == 0:
                await asyncio.sleep(0)

    def connection_ended(self, protocol: ServerProtocol) -> None:
        self.connections.discard(protocol)
        if self.draining and not self.connections:
            self._drained.set()

    def close(self) -> None:
        self.log_soon.write()
        self.registry.observers.remove(self._session_ended)

    # --- which connections use a session ---------------------------------------------------------

    def session_joined(self, session_id: str, protocol: ServerProtocol) -> None:
        users = self._by_session.get(session_id)
        if users is None:
            self._by_session[session_id] = protocol  # one connection is the rule: no set for it
        elif isinstance(users, set):
            users.add(protocol)
        elif users is not protocol:
            self._by_session[session_id] = {users, protocol}

    def session_left(self, session_id: str, protocol: ServerProtocol) -> None:
        users = self._by_session.get(session_id)
        if users is protocol:
            del self._by_session[session_id]
        elif isinstance(users, set):
            users.discard(protocol)
            if not users:
                del self._by_session[session_id]

    def uses(self, session_id: str) -> bool:
        """Whether a connection uses this session."""
        return session_id in self._by_session

    def _session_ended(self, session_id: str, code: Code, reason: str) -> None:
        if code is Code.TOKEN_REVOKED and reason != CLOSED:
            self.revoked += 1
        ended = self.counters.sessions_ended
        ended[reason] = ended.get(reason, 0) + 1
        users = self._by_session.pop(session_id, None)
        if users is None:
            return
        for protocol in users if isinstance(users, set) else (users,):
            protocol.session_ended(session_id, code, reason)

    # --- what operators see ------------------------------------------------------------------------

    def number_connection(self) -> int:
        """The number of a connection that is told of in the log for the first time."""
        self._numbers += 1
        return self._numbers

    def incident(self, what: str, error: BaseException, *, peer: str, connection: str) -> str:
        """Log a fault of ours with the places it passed; returns the id that the peer is told."""
        incident_id = secrets.token_hex(8)
        self.counters.incidents += 1
        log.error(
            "request.failed",
            what=what,
            incident=incident_id,
            exc_info=error,
            peer=peer,
            connection=connection,
        )
        return incident_id
