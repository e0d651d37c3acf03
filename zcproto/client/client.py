"""The client: each call gets an answer or a clear error, over as many connections as that takes. `connect` creates
it, and `enroll` uses one to enroll a device.

Decides: how long connections and sessions live, and which session an event concerns.

Must not know: when connections are made (`connections.py`) and sessions opened (`session.py`).
"""

from __future__ import annotations

import asyncio
import random as system_random
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Self, Unpack

from zcproto.client.address import Address, Endpoint, parse_addresses
from zcproto.client.connections import ConnectionManager
from zcproto.client.credentials import Device, LoginSource
from zcproto.client.dial import Dial, Dialer, Resolve, acquire_resources, release_resources, report_wait
from zcproto.client.endpoints import Endpoints
from zcproto.client.handlers import call_back
from zcproto.client.options import ConnectOptions, EnrollOptions, accept_options, check_connections
from zcproto.client.protocol import ClientProtocol
from zcproto.client.retry import Random
from zcproto.client.session import CLOSE_TIMEOUT
from zcproto.client.session_client import UNSET, SessionClient
from zcproto.client.session_file import SessionFile
from zcproto.common.clock import Clock, MonotonicClock, system_clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.connection.events import EventReceived
from zcproto.errors import ConfigError, ConnectionClosed
from zcproto.wire.frame import NO_TOKEN

CLOSED_AT_ONCE: Final = 32
"""Sessions of users that are closed at once: fewer than the requests that a server allows in flight."""


class Client(SessionClient):
    """A client of one server, or of several that share their sessions. Create it with `zcproto.connect`.

    It belongs to one event loop. Any number of concurrent calls share one connection. `addresses` is what was given
    to `connect`, and `address` the first of them.
    """

    _NOT_OPEN = "open the client first: async with connect(...) as client"

    def __init__(
        self,
        address: str | Sequence[str],
        options: ConnectOptions,
        *,
        clock: Clock = system_clock,
        random: Random = system_random.random,
        dial: Dial | None = None,
    ) -> None:
        self.addresses = parse_addresses(address)
        check_connections(options)
        self.address = self.addresses[0]
        super().__init__(options, MonotonicClock(clock), random)
        self._resolve: Resolve = _host_itself
        if dial is None:
            dialer = Dialer(options, self._clock, clock)
            dial, self._resolve = dialer, dialer.resolve
        self._dial: Dial = dial
        if options.session_file is not None:
            if self._credentials is None:
                raise ConfigError(["session_file: credentials are missing; give what opens a session"])
            service = ",".join(sorted(map(str, self.addresses)))
            self._session_file = SessionFile(options.session_file, service, self._credentials)
        self._users: dict[UserSession, None] = {}
        self._had_users = False
        self._showing: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Client({', '.join(map(str, self.addresses))!r})"

    # --- opening and closing ----------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    async def open(self) -> None:
        """Connect, and open a session if there are credentials. `async with` calls this.

        Waits for a server that is starting, up to `start_timeout`. Raises any other error of the first attempt:
        CannotConnect, TlsError, CertificateError, ConnectionClosed, the CallErrors of `session.open`, and
        ConfigError for a key log or a session file that cannot be used.
        """
        if self._opened:
            raise RuntimeError("this client was opened before; create a new one")
        loop, options = asyncio.get_running_loop(), self._options
        resources = acquire_resources(loop)
        self._wheel = resources.wheel
        connections = ConnectionManager(
            loop,
            self._resolve,
            lambda owner, *attempt: self._dial(owner, resources, *attempt),
            Endpoints(self.addresses, options.address_order == "random", self._random),
            on_event=self._event_received,
            on_connected=self._connected,
            on_further=self._further_connected,
            shows_session=self._shows_session,
            is_wanted=lambda: not all(each._is_over for each in (self, *self._users)),
            max_further=options.max_connections - 1,
            start_timeout=options.start_timeout,
            on_starting=lambda: report_wait(self.addresses, options.start_timeout),
        )
        self._start(connections, resources.wheel)
        try:
            if options.session and self._credentials is not None:
                self._sessions.require()
            await connections.get()  # within `start_timeout` and `connect_timeout`
            deadline = self._deadline(UNSET)
            await self._ready_before(deadline)
            await self._registrar.settle(deadline)
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close all sessions and the connection. Pending calls raise ConnectionClosed."""
        if self._closed:
            return
        self._closed = True
        if not self._opened:
            return
        try:
            await self._close_sessions()
        finally:
            try:
                await self._connections.close()
            finally:
                self.events.close()
                release_resources(self._loop)

    async def _close_sessions(self) -> None:
        if self._showing is not None:
            self._showing.cancel()
        await self._registrar.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):  # for all of them: there may be hundreds
                while self._users:
                    users = [*self._users][:CLOSED_AT_ONCE]
                    await asyncio.gather(*(user.close() for user in users))
        for user in [*self._users]:
            await user._close(None)  # without telling the server
        await self._sessions.close(self._connections.current)

    # --- state ------------------------------------------------------------------------------------

    @property
    def welcome(self) -> Mapping[str, Any]:
        """The server's latest WELCOME; empty without a connection."""
        connection = self._connections.current if self._opened else None
        return {} if connection is None else connection.conversation.welcome

    @property
    def endpoint(self) -> Endpoint | None:
        """Where this client is connected; None without a connection."""
        connection = self._connections.current if self._opened else None
        return None if connection is None else connection.endpoint

    # --- other users ------------------------------------------------------------------------------

    def session_for(
        self,
        *,
        user: str | None = None,
        key: str | None = None,
        device: Device | str | Path | None = None,
        device_name: str | None = None,
        login: LoginSource | None = None,
    ) -> UserSession:
        """Return a session of another user on this client's connection, which `async with` opens and closes.

            async with client.session_for(user="ada", key=key) as ada:
                await ada.call("order.place", id=7)

        It has this client's `call`, `stream`, `handler`, `events` and options, for this session alone: each one is
        refreshed and ends by itself, and each survives a reconnect. Give `user` and `key`, or `device` and
        `device_name`, or a `login`, like those of `connect`. Raises ConfigError for others, CertificateError for an
        unusable device key.
        """
        options = replace(
            self._options,
            user=user,
            key=key,
            device=device,
            device_name=device_name,
            login=login,
            certificate=None,
            session_file=None,
            on_event=None,
            on_connected=None,
        )
        return UserSession(self, options, self._clock, self._random)

    def _attach_session(self, user: UserSession) -> tuple[ConnectionManager, DeadlineWheel]:
        """Show a session on each connection from now on. Return what it uses of this client."""
        if not self._opened:
            raise RuntimeError(self._NOT_OPEN)
        if self._closed:
            raise ConnectionClosed("this client is closed", clean=True)
        self._users[user] = None
        self._had_users = True
        return self._connections, self._wheel

    def _detach_session(self, user: UserSession) -> None:
        self._users.pop(user, None)

    # --- connections and events -------------------------------------------------------------------

    def _connected(self, connection: ClientProtocol) -> None:
        self._show_session(connection)
        if self._users:
            self._showing = self._loop.create_task(self._show_users(connection))
        if self._options.on_connected is not None:
            self._loop.call_soon(call_back, "on_connected", self._options.on_connected, connection.endpoint)

    async def _shows_session(self, connection: ClientProtocol) -> bool:
        return await self._sessions.is_accepted_on(connection)

    def _further_connected(self, connection: ClientProtocol) -> None:
        for each in (self, *self._users):
            each._show_session(connection, is_further=True)

    async def _show_users(self, connection: ClientProtocol) -> None:
        """Show the sessions of all users, as many at once as the server allows requests."""
        for user in [*self._users]:
            await connection.wait_ready()
            if not connection.ready:
                return
            user._show_session(connection)

    def _event_received(self, event: EventReceived) -> None:
        owner: SessionClient = next((each for each in self._users if each._owns(event.token)), self)
        if owner is self and self._had_users and event.token != NO_TOKEN and not self._owns(event.token):
            return  # of a session that was closed
        owner._receive_event(event)


class UserSession(SessionClient):
    """A session of another user on the connection of a client. Create it with `Client.session_for`."""

    _NOT_OPEN = "open the session first: async with client.session_for(...) as session"

    def __init__(self, client: Client, options: ConnectOptions, clock: Clock, random: Random) -> None:
        super().__init__(options, clock, random)
        if self._credentials is None:
            raise ConfigError(["session_for: give user and key, device and device_name, or login"])
        self._client = client

    def __repr__(self) -> str:
        return f"UserSession({str(self._client.address)!r})"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Open the session. `async with` calls this. Raises like `Client.open_session`."""
        if self._opened:
            raise RuntimeError("this session was opened before; create a new one")
        connections, wheel = self._client._attach_session(self)
        self._start(connections, wheel)
        if connections.current is not None:
            self._show_session(connections.current)
        try:
            await self.open_session()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the session; the connection stays open. Idempotent."""
        if self._opened and not self._closed:
            await self._close(self._connections.current)

    async def _close(self, connection: ClientProtocol | None) -> None:
        self._closed = True
        try:
            await self._registrar.close()
            await self._sessions.close(connection)
        finally:
            self._client._detach_session(self)
            self.events.close()


@accept_options(ConnectOptions)
def connect(address: str | Sequence[str], options: ConnectOptions) -> Client:
    """Return a client of the server at `host`, `host:port` or `[::1]:port`. The default port is 7443.

    Several addresses, as a list or as one text with commas, are those of servers that share their sessions: the
    client connects to one of them, and to another one as soon as that is lost or goes away.

        async with zcproto.connect("host:7443", user="ada", key=key, ca_file="ca.crt") as client:
            print(await client.call("echo", word="hello"))

    ConnectOptions documents the options. Raises ConfigError for options that contradict each other, TlsError for a
    malformed pin, CertificateError for an unusable device key. `async with` raises like `Client.open`.
    """
    return Client(address, options)


async def enroll(
    address: str | Sequence[str], code: str, device: Device, name: str, **options: Unpack[EnrollOptions]
) -> str:
    """Enroll a device as `name` with a code of `zcproto pair`. Return the user whose sessions it can open.

        device = zcproto.Device.create("laptop.key")
        await zcproto.enroll("host:7443", "7D9K-X2MP", device, "laptop", ca_file="ca.crt")

    Afterwards `connect(..., device=device, device_name="laptop")` opens sessions of that user. ConnectOptions
    documents the options. Raises Unauthenticated for an invalid code, AlreadyExists for a name in use (the code
    stays valid), and like `connect` and `Client.open`.
    """
    async with connect(address, session=False, **options) as client:
        enrolled = await client.call("device.enroll", code=code, public_key=device.public_key, name=name)
    return str(enrolled["user"])


async def _host_itself(address: Address) -> list[str]:
    """Return the host in place of its IP address, for connections that are not made over a network."""
    return [address.host]
