"""The clients that handle calls, over all connections, and the limits that they share.

    session.handle -> `add`;  the session or its connection ends -> `remove`
    the session expires -> `suspend`;  it was refreshed and is used on the connection -> `resume`
    server.clients -> `find`: the newest registration first; one for each session and address
    a method calls -> `handling`: another connection of the session, if its own does not handle the method

Rules:
- The names that clients register, and the calls to them, are limited for each user.
- A suspended registration is not found. It counts against the names of its user, and makes room for others.

It must not know: what is on the wire, who calls.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol

from zcproto.app.context import ClientConnections, ConnectedClient
from zcproto.connection.server_calls import CallToClient
from zcproto.errors import CallError, ResourceExhausted
from zcproto.sessions import Session

RESULTS: Final = (
    "answered",
    "failed",
    "deadline",
    "withdrawn",
    "closed",
    "unavailable",
    "limited",
    "invalid",
)
"""How calls end."""


@dataclass(frozen=True, slots=True)
class CallLimits:
    """Limits of calls to clients, beside that of each connection."""

    per_user: int = 256
    """Calls in flight to the clients of one user."""
    total: int = 16_384
    """Calls in flight to all clients."""
    names_per_user: int = 4_096
    """Names of methods that the clients of one user register."""
    pending_per_user: int = 256
    """Pending calls to one user."""
    pending_total: int = 16_384
    """Pending calls to all users."""


@dataclass(slots=True)
class Registration:
    client: ConnectedClient
    methods: frozenset[str]
    is_bound: bool
    is_suspended: bool = False


Answered = Callable[[Session | None, Any, CallError | None], None]
"""Gets the answer to an offer: the session that answered, None if it does not live or has a newer token."""


class Registering(ClientConnections, Protocol):
    """A connection that registers methods of its client."""

    peer: str

    @property
    def id(self) -> str: ...
    @property
    def is_draining(self) -> bool: ...

    async def call_here(self, session_id: str, call: CallToClient) -> Any:
        """Call a method that the client has registered on this connection."""

    def offer(self, session_id: str, method: str, body: bytes, answered: Answered) -> Callable[[], None]:
        """Send a CALL of a pending call; return what withdraws it. Raises Unavailable, ResourceExhausted."""

    def unregister(self, session_id: str) -> None:
        """Drop the registration of a session, here too."""


Key = tuple[Registering, str]
"""A connection and the id of a session."""


class CallsInFlight:
    """Counts calls to clients, in all and by user."""

    def __init__(self) -> None:
        self.total = 0
        self._by_user: Counter[str] = Counter()

    @property
    def most(self) -> int:
        """The calls to the user who has most of them."""
        return max(self._by_user.values(), default=0)

    @contextmanager
    def one_for(self, user: str, limits: CallLimits) -> Iterator[None]:
        """Count a call. Raises ResourceExhausted at a limit."""
        for limit, calls in ((limits.per_user, self._by_user[user]), (limits.total, self.total)):
            if calls >= limit:
                raise ResourceExhausted("too many calls to clients; wait for some", {"limit": limit})
        self._by_user[user] += 1
        self.total += 1
        try:
            yield
        finally:
            self.total -= 1
            self._by_user[user] -= 1
            if not self._by_user[user]:
                del self._by_user[user]


class RegisteredClients:
    """The clients that handle calls, and the calls to them that are in flight."""

    def __init__(self, limits: CallLimits) -> None:
        self.limits = limits
        self.ended: Counter[str] = Counter()
        """Calls that ended, by result."""
        self.on_ready: Callable[[str, Key], None] = lambda user, key: None
        """Called with a registration that is new, replaced or used again, before its connection has it."""
        self.on_gone: Callable[[str, Key], None] = lambda user, key: None
        """Called with a registration that was removed or suspended."""
        self.on_registered: Callable[[], object] = lambda: None
        self._by_user: dict[str, dict[Key, Registration]] = {}
        self._users: dict[Key, str] = {}
        self._suspended: dict[str, OrderedDict[Key, None]] = {}  # by user, the first to be suspended first
        self._suspensions = 0
        self._names: Counter[str] = Counter()  # registered by user
        self._calls = CallsInFlight()

    def __len__(self) -> int:
        return len(self._users) - self._suspensions

    @property
    def in_flight(self) -> int:
        return self._calls.total

    @property
    def most_in_flight(self) -> int:
        """The calls in flight to the user who has most of them."""
        return self._calls.most

    # --- registration ----------------------------------------------------------------------------------

    def add(self, connection: Registering, session: Session, methods: frozenset[str]) -> None:
        """Add or replace a registration. Raises ResourceExhausted if its user has too many names."""
        key = connection, session.id
        before = self._by_user.get(session.user, {}).get(key)
        more = len(methods) - (0 if before is None else len(before.methods))
        limit = self.limits.names_per_user
        if self._names[session.user] + more > limit:
            self._make_room(session.user, more)
        if self._names[session.user] + more > limit:
            raise ResourceExhausted(
                "the clients of this user handle too many methods; register fewer", {"limit": limit}
            )
        self._forget(key)
        if methods:
            client = ConnectedClient(connection, session.id, session.user)
            found = Registration(client, methods, session.bound)
            self._by_user.setdefault(session.user, {})[key] = found
            self._users[key] = session.user
            self._names[session.user] += len(methods)
            self.on_ready(session.user, key)
            self.on_registered()
        else:
            self.on_gone(session.user, key)

    def _make_room(self, user: str, more: int) -> None:
        """Drop suspended registrations of a user, the first to be suspended first, until there is room."""
        suspended = self._suspended.get(user)
        while suspended and self._names[user] + more > self.limits.names_per_user:
            connection, session_id = next(iter(suspended))
            connection.unregister(session_id)

    def suspend(self, connection: Registering, session_id: str) -> None:
        """Keep a registration for the time when its session, which has expired, was refreshed."""
        found = self._find(connection, session_id)
        if found is not None and not found.is_suspended:
            found.is_suspended = True
            user = self._users[connection, session_id]
            self._suspended.setdefault(user, OrderedDict())[connection, session_id] = None
            self._suspensions += 1
            self.on_gone(user, (connection, session_id))

    def resume(self, connection: Registering, session_id: str) -> None:
        """Use a registration again if it was suspended."""
        found = self._find(connection, session_id)
        if found is not None and found.is_suspended:
            found.is_suspended = False
            user = self._users[connection, session_id]
            self._forget_suspension((connection, session_id), user)
            self.on_ready(user, (connection, session_id))

    def _forget_suspension(self, key: Key, user: str) -> None:
        suspended = self._suspended[user]
        del suspended[key]
        if not suspended:
            del self._suspended[user]
        self._suspensions -= 1

    def _find(self, connection: Registering, session_id: str) -> Registration | None:
        key = connection, session_id
        user = self._users.get(key)
        return None if user is None else self._by_user[user][key]

    def remove(self, connection: Registering, session_id: str) -> None:
        """Remove the registration of a session on a connection, if there is one."""
        user = self._forget((connection, session_id))
        if user is not None:
            self.on_gone(user, (connection, session_id))

    def _forget(self, key: Key) -> str | None:
        """Remove a registration, and return its user."""
        user = self._users.pop(key, None)
        if user is not None:
            registrations = self._by_user[user]
            removed = registrations.pop(key)
            self._names[user] -= len(removed.methods)
            if removed.is_suspended:
                self._forget_suspension(key, user)
            if not registrations:
                del self._by_user[user], self._names[user]
        return user

    def find(
        self, user: str | None = None, handles: str | None = None, most: float = inf
    ) -> list[ConnectedClient]:
        """Return the clients of a user, or of all users, that handle a method, or any: the newest first.

        A client that has several connections is listed once, for its newest registration.
        """
        return [client for _, client in self._select(user, handles, most)]

    def describe(self, user: str | None, handles: str | None, most: float) -> list[tuple[str, str, str, str]]:
        """Return clients as `find` does, for another process: user, session, connection, the peer's address."""
        return [
            (client.user, client.session_id, connection.id, connection.peer)
            for connection, client in self._select(user, handles, most)
        ]

    def _select(
        self, user: str | None, handles: str | None, most: float
    ) -> Collection[tuple[Registering, ConnectedClient]]:
        users = self._by_user.values() if user is None else [self._by_user.get(user, {})]
        clients: dict[tuple[str, str], tuple[Registering, ConnectedClient]] = {}
        for registrations in users:
            for (connection, session_id), found in reversed(registrations.items()):
                if len(clients) >= most:
                    return clients.values()
                if not found.is_suspended and (handles is None or handles in found.methods):
                    clients.setdefault((session_id, connection.peer), (connection, found.client))
        return clients.values()

    def handles(self, connection: Registering, session_id: str, method: str) -> bool:
        """Return whether a session has registered a method on a connection, and is not suspended there."""
        found = self._find(connection, session_id)
        return found is not None and not found.is_suspended and method in found.methods

    @property
    def users(self) -> list[str]:
        """The users who have clients that handle calls, now or again after a refresh."""
        return [*self._by_user]

    def has(self, user: str) -> bool:
        """Return whether a user is one of `users`."""
        return user in self._by_user

    def registrations(self, user: str) -> list[Key]:
        """Return the registrations of a user, the newest first."""
        return [*reversed(self._by_user.get(user, {}))]

    def takes(self, key: Key, method: str, *, bound: bool) -> bool:
        """Return whether a pending call can be offered. `bound`: only to a session that is bound to a key."""
        found = self._find(*key)
        return (
            found is not None
            and not (found.is_suspended or key[0].is_draining)
            and method in found.methods
            and (found.is_bound or not bound)
        )

    def handling(self, user: str, session_id: str, method: str) -> Registering | None:
        """Return the connection on which a session has registered a method last, of those that take calls."""
        for connection, owner in reversed(self._by_user.get(user, {})):
            if (
                owner == session_id
                and not connection.is_draining
                and self.handles(connection, session_id, method)
            ):
                return connection
        return None

    def connection_of(
        self, user: str, session_id: str, connection_id: str, method: str
    ) -> Registering | None:
        """Return a connection that was described, or another one of its session that handles a method."""
        for connection, owner in self._by_user.get(user, {}):
            if (
                owner == session_id
                and connection.id == connection_id
                and self.handles(connection, session_id, method)
            ):
                return connection
        return self.handling(user, session_id, method)

    # --- calls -----------------------------------------------------------------------------------------

    def count(self, result: str) -> None:
        self.ended[result] += 1

    def in_flight_for(self, user: str) -> AbstractContextManager[None]:
        """Count a call to a client of this user. Raises ResourceExhausted at a limit."""
        return self._calls.one_for(user, self.limits)
