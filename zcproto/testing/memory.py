"""A server and its clients in one event loop, joined without sockets and TLS.

    Client -> ClientProtocol -> Link -> ServerProtocol -> App

Everything above the link is what production uses: sessions, limits, parameters, retries, deadlines. There are no
certificates, devices, HTTP endpoints, alerts and `server.stats`, and sessions end with the server.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Final, Self, cast

from zcproto.admin.parts import ActiveConfig
from zcproto.alerts.service import ServerAlerts
from zcproto.app.app import App
from zcproto.auth import User, UserFile
from zcproto.auth.directory import Directory
from zcproto.auth.identity import BUILT_IN_SCHEMES
from zcproto.auth.schemes import ApiKeyAuthenticator
from zcproto.client import Client
from zcproto.client.dial import LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol, ConnectionOwner
from zcproto.common.clock import MS_PER_SECOND, system_clock, system_entropy
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.home import Home
from zcproto.common.roles import roles_from
from zcproto.config import Config
from zcproto.connection.client import ClientConnection
from zcproto.errors import CannotConnect
from zcproto.runtime.build import build_login, build_state, run_limits, session_settings
from zcproto.runtime.server import CANCELLED_TIME
from zcproto.server.durable import serve_runs
from zcproto.server.lifespan import Lifespans
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import protocol_methods
from zcproto.server.state import ServerState
from zcproto.sessions.token import TOKEN_SIZE, digest_of, token_text
from zcproto.testing.incidents import record_incident
from zcproto.testing.link import Link


class MovableClock:
    """The system's time, plus what `advance` has added.

        clock = MovableClock()
        async with connect_in_memory(app, user="ada", clock=clock) as client:
            clock.advance(3600)

    The server, its clients and their event loop go by it: `asyncio.sleep` and `asyncio.timeout` too, in methods and
    in the test. Several servers may share it.
    """

    def __init__(self) -> None:
        self._ahead = 0.0
        self._loops: Counter[asyncio.AbstractEventLoop] = Counter()

    def wall(self) -> int:
        """Return the milliseconds since the Unix epoch."""
        return system_clock.wall() + round(self._ahead * MS_PER_SECOND)

    def now(self) -> float:
        """Return monotonic seconds from an arbitrary start."""
        return system_clock.now() + self._ahead

    def advance(self, seconds: float) -> None:
        """Move the time ahead at once, as on a machine that was suspended: what is due by then runs late, in order.

        For an hour during which clients keep their connections alive and refresh their sessions, advance in steps
        and await something in between.
        """
        if seconds < 0:
            raise ValueError(f"advance({seconds:g}): time does not go back; give seconds from 0")
        self._ahead += seconds

    @contextmanager
    def drive(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """Let a loop go by this clock, until the end of the block."""
        if not isinstance(loop, asyncio.BaseEventLoop):
            raise RuntimeError(
                f"the time of a {type(loop).__module__} loop cannot be moved: run this test on asyncio's own loop,"
                " or leave out clock="
            )
        current = loop.__dict__.get("time")
        if current not in (None, self.now):
            raise RuntimeError("this event loop goes by another MovableClock: pass the same one as clock=")
        self._loops[loop] += 1
        loop.time = self.now  # type: ignore[method-assign]
        try:
            yield
        finally:
            self._loops[loop] -= 1
            if not self._loops[loop]:
                del self._loops[loop], loop.time


NO_HOME: Final = Home(Path("/nonexistent"))
MAX_SESSIONS: Final = 1_000
"""Of all users: a table for a million takes longer to make than a test."""

_default_config = cache(Config)
_no_time = partial(datetime.fromtimestamp, 0, UTC)  # no certificates are checked


class Users:
    """The users of a test's server, in a file or in memory."""

    def __init__(self, file: UserFile | None = None) -> None:
        self._file = file
        self._known: dict[str, User] = {}
        self._keys: dict[str, str] = {}

    def add(self, name: str, *, roles: Collection[str] = ()) -> str:
        """Add a user and return the API key. `connect(user=name)` finds it by itself."""
        granted, key = roles_from(roles), system_entropy(TOKEN_SIZE)
        if self._file is None:
            self._known[name] = User(digest_of(key), granted)
        else:
            self._file.add_digest(name, digest_of(key), granted)
        self._keys[name] = token_text(key)
        return self._keys[name]

    def options(self, user: str | None, options: dict[str, Any]) -> ConnectOptions:
        """Return the options of a client, with the key of its user, who is added if necessary."""
        if user is not None and not {"key", "key_file", "certificate"} & options.keys():
            options = {"key": self._keys.get(user) or self.add(user), **options}
        return ConnectOptions(user=user, **options)

    def known(self, name: str) -> User | None:
        """Return a user in memory, for an authenticator, as a Directory does."""
        return self._known.get(name)

    def changed(self) -> bool:
        return False


class MemoryServer:
    """A server without sockets, which ends with its block.

        async with MemoryServer(app) as server, server.connect("ada") as ada, server.connect("bob") as bob:
            ...

    `config` has the limits that apply; what it says of addresses, certificates and stores does not. `users.add`
    adds users. Raises LifespanError on entering or leaving if the lifespan of the application fails.
    """

    def __init__(
        self,
        app: App[Any],
        config: Config | None = None,
        *,
        clock: MovableClock | None = None,
        link: Link | None = None,
    ) -> None:
        self.link = Link() if link is None else link
        self._app = app
        self._config = _default_config() if config is None else config
        self._movable = clock
        self._clock = system_clock if clock is None else clock
        self.users = Users()
        keys = ApiKeyAuthenticator(cast("Directory[User]", self.users), now=self._clock.now)
        self._authenticators = [keys if each is BUILT_IN_SCHEMES else each for each in app.authenticators]
        self._state: ServerState | None = None
        self._lifespans: Lifespans | None = None
        self._running = AsyncExitStack()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        config, clock, entropy = self._config, self._clock, system_entropy
        alerts = ServerAlerts(config.alerts, [], clock=clock, entropy=entropy)
        settings = replace(session_settings(config), max_sessions=MAX_SESSIONS, dead_limit=MAX_SESSIONS)
        state, _ = build_state(config, NO_HOME, settings, alerts, DeadlineWheel(loop), clock, entropy)
        state.on_incident = record_incident
        active = ActiveConfig(config)
        login = build_login(active, NO_HOME, state, self._authenticators, now=_no_time).login
        state.add_methods([*protocol_methods(state, login, app=self._app), *self._app])
        serve_runs(state, run_limits(config), config.streams.durable_abandon_after)

        def end_connections() -> None:
            self._state = None
            state.stopping.set()
            for connection in list(state.connections):
                connection.cancel_all()
                connection.close("drain_timeout")

        self._lifespans = lifespans = Lifespans(self._app.lifespans(), state.lifespan_values)
        limit = config.server.lifespan_timeout
        async with AsyncExitStack() as stack:
            if self._movable is not None:
                stack.enter_context(self._movable.drive(loop))
            stack.callback(state.close)
            stack.callback(state.wheel.close)
            stack.push_async_callback(lifespans.stop, limit)
            stack.push_async_callback(state.threads.close, CANCELLED_TIME)
            stack.push_async_callback(state.tasks.close, CANCELLED_TIME)
            stack.callback(end_connections)
            await lifespans.start(limit, end_connections)
            self._state, self._running = state, stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._running.aclose()
        if self._lifespans is not None and self._lifespans.failure is not None:
            raise self._lifespans.failure

    def connect(self, user: str | None = None, **options: Any) -> Client:
        """Return a client, as `zcproto.connect` does. The user is added if necessary; None opens no session."""
        return Client("memory", self.users.options(user, options), clock=self._clock, dial=self._dial)

    async def _dial(
        self, owner: ConnectionOwner, resources: LoopResources, endpoint: Endpoint, _: object
    ) -> ClientProtocol:
        if self._state is None or self.link.is_down:
            raise CannotConnect("memory: the server has ended, or the test has isolated its link")
        loop = asyncio.get_running_loop()
        client = ClientProtocol(owner, loop, resources.wheel, self._clock, ClientConnection(), endpoint)
        self.link.join(client, ServerProtocol(self._state))
        try:
            await client.welcomed
        except asyncio.CancelledError:
            client.abort()
            raise
        return client


def connect_in_memory(
    app: App[Any],
    user: str | None = None,
    *,
    config: Config | None = None,
    clock: MovableClock | None = None,
    link: Link | None = None,
    **options: Any,
) -> AbstractAsyncContextManager[Client]:
    """Serve an application to one client in memory, until the end of the block.

        async with connect_in_memory(app, user="ada") as client:
            assert await client.call("greet", name="world") == "hello world"

    Without a user it opens no session. `options` are those of `zcproto.connect`; `MemoryServer` serves several
    clients. Raises RuntimeError outside a running asyncio loop, and on entering like `Client.open`.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "connect_in_memory needs a running asyncio loop: make the test `async def`, or use the fixture"
            " zcproto_serve and connect_blocking"
        ) from None
    return _connect_in_memory(MemoryServer(app, config, clock=clock, link=link), user, options)


@asynccontextmanager
async def _connect_in_memory(
    server: MemoryServer, user: str | None, options: dict[str, Any]
) -> AsyncIterator[Client]:
    async with server, server.connect(user, **options) as client:
        yield client
