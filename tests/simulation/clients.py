"""Clients: processes with the product's own client, and what they do; and the application that they call."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from math import inf
from random import Random
from typing import Any

from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network
from tests.simulation.servers import ProcessClock, ServerProcess
from tests.simulation.truth import Truth
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.client import Client
from zcproto.client.dial import LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol, ConnectionOwner
from zcproto.connection.client import ClientConnection
from zcproto.errors import CallError, CannotConnect, ZcprotoError

TIMEOUT_S = 30.0
CONNECT_S = 5.0


def application(truth: Truth, server: str, random: Random) -> App[Any]:
    """Return the application of one server process, whose methods record what they do."""
    app: App[Any] = App()

    def note(context: Context) -> None:
        assert context.session is not None
        truth.used(context.session.id, context.token, server)

    @app.method("echo")
    async def echo(context: Context, call: str, wait: float) -> str:
        note(context)
        truth.ran(call, server)
        if wait:
            await asyncio.sleep(wait)
        return call

    @app.method("approved")
    async def approved(context: Context, call: str) -> str:
        note(context)
        truth.ran(call, server)
        answer = await context.ask(context.user, "approve", approval=call, timeout=TIMEOUT_S - 5)
        truth.decision(call, answer)
        return str(answer)

    @app.method("ticks")
    async def ticks(context: Context, call: str) -> AsyncIterator[int]:
        note(context)
        truth.ran(call, server)
        assert context.session is not None
        for number in itertools.count():
            truth.streamed(context.session.id, context.token, server)
            yield number
            await asyncio.sleep(0.5)

    @app.method("count", durable=True)
    async def count(context: Context, call: str, upto: int) -> AsyncIterator[int]:
        assert context.session is not None
        truth.check_ended(context.session.id, server)  # a durable method has no token
        truth.ran(call, server)
        for number in range(upto):
            yield number
            await asyncio.sleep(random.expovariate(20))

    return app


class Process:
    """A process that connects to servers. `find` returns the running server with a name."""

    def __init__(
        self, loop: SimulatedLoop, network: Network, find: Callable[[str], ServerProcess | None], truth: Truth
    ) -> None:
        self.loop, self.clock = loop, ProcessClock(loop)
        self._network, self._find, self._truth = network, find, truth
        self._random = loop.random
        self._stopping = False

    @property
    def name(self) -> str:
        return self.loop.name

    def stop(self) -> None:
        self._stopping = True

    async def dial(
        self,
        owner: ConnectionOwner,
        resources: LoopResources,
        endpoint: Endpoint,
        on_reached: Callable[[], None],
    ) -> ClientProtocol:
        """Return a connection that has received WELCOME, as `Dialer` does."""
        await asyncio.sleep(self._random.uniform(0.001, 0.01))
        server = self._find(endpoint.host)
        if server is None:
            raise CannotConnect(f"{endpoint.host} does not listen", refused=True)
        protocol = ClientProtocol(owner, self.loop, resources.wheel, self.clock, ClientConnection(), endpoint)
        self._network.connect((self.loop, protocol), (server.loop, server.accept))
        on_reached()
        try:
            async with asyncio.timeout(CONNECT_S):
                await protocol.welcomed
        except TimeoutError:
            protocol.abort()
            raise CannotConnect(f"{endpoint.host} does not answer") from None
        except asyncio.CancelledError:
            protocol.abort()
            raise
        return protocol

    async def _think(self, seconds: float) -> None:
        await asyncio.sleep(self._random.expovariate(1 / seconds))


class Thief(Process):
    """Steals tokens of clients, and uses each for a while at any server: a call now and then, and a stream."""

    has_other_address = False

    def __init__(self, *process: Any, servers: list[str], victims: Callable[[], list[ClientProcess]]) -> None:
        super().__init__(*process)
        self._servers, self._victims = servers, victims
        self._number = 0
        self.task = self.loop.create_task(self._run())

    def __getattr__(self, name: str) -> Callable[..., None]:
        """Ignore what a connection reports."""
        if name.startswith("connection_") or name == "event_received":
            return lambda *arguments: None
        raise AttributeError(name)

    def _call(self) -> dict[str, str]:
        self._number += 1
        return {"call": f"theft {self.loop.run}.{self._number}"}

    async def _run(self) -> None:
        resources = LoopResources(self.loop)
        while not self._stopping:
            await self._think(5)
            sessions = [each.client.session for each in self._victims() if each.client is not None]
            sessions = [each for each in sessions if each is not None]
            if sessions:
                host = self._random.choice(self._servers)
                token = self._random.choice(sessions).token_bytes
                with suppress(ZcprotoError):
                    await self._use(
                        token, await self.dial(self, resources, Endpoint(host, 7443, host), self._stopped)
                    )
        resources.wheel.close()

    def _stopped(self) -> None:
        """No-op callback."""

    async def _use(self, token: bytes, connection: ClientProtocol) -> None:
        until = self.loop.time() + self._random.expovariate(1 / 60)
        try:
            if self._random.random() < 0.5:
                connection.open_stream("ticks", self._call(), token, None, (10_000, 1 << 20), inf, None)
            while self.loop.time() < until and connection.ready and not self._stopping:
                due = self.loop.time() + 5.0
                params = {**self._call(), "wait": 0.0}
                with suppress(CallError):
                    await connection.request("echo", params, token, None, due)[1]
                await self._think(3)
        finally:
            connection.close("enough")


class ClientProcess(Process):
    """A process with one client, which does one thing after another."""

    def __init__(self, *process: Any, servers: list[str], user: str, think_s: float) -> None:
        super().__init__(*process)
        self._addresses, self.user, self._think_s = servers, user, think_s
        self.client: Client | None = None
        self._number = 0
        self.task = self.loop.create_task(self._run())

    async def _run(self) -> None:
        actions = {
            self._echo: 20,
            self._keyed: 20,
            self._approved: 8,
            self._count: 4,
            self._ticks: 2,
            self._log_out: 2,
            self._revoke: 1,
        }
        await asyncio.sleep(self._random.uniform(0, self._think_s))
        while not self._stopping:
            if self.client is None:
                await self._log_in()
                continue
            (action,) = self._random.choices(list(actions), list(actions.values()))
            self._number += 1
            call = f"{action.__name__[1:]} {self.loop.run}.{self._number}"
            self._truth.begin(call, TIMEOUT_S, self.name)
            try:
                await action(call)
                outcome = "ok"
            except ZcprotoError as error:
                outcome = type(error).__name__
            if outcome in ("TokenRevoked", "SessionReplaced", "TokenExpired") and self.client is not None:
                client, self.client = self.client, None
                await client.close()
            self._truth.end(call)
            self._truth.log(self.name, f"{call}: {outcome}")
            await self._think(self._think_s)
        if self.client is not None:
            await self.client.close()

    async def _log_in(self) -> None:
        options = ConnectOptions(user=self.user, key=self.user, timeout=TIMEOUT_S, start_timeout=0)
        client = Client(
            self._addresses, options, clock=self.clock, random=self._random.random, dial=self.dial
        )
        client.handler("approve")(self._approve)
        try:
            await client.open()
        except ZcprotoError as error:
            self._truth.log(self.name, f"open: {type(error).__name__}")
            await self._think(self._think_s)
            return
        self.client = client

    # --- what it does ---

    async def _call(self, method: str, **params: Any) -> Any:
        assert self.client is not None
        return await self.client.call(method, **params)

    async def _echo(self, call: str) -> None:
        wait = self._random.choice((0.0, 0.0, self._random.expovariate(2)))
        if await self._call("echo", call=call, wait=wait) != call:
            raise self._truth.violated(f"{call} got the answer of another call")

    async def _keyed(self, call: str) -> None:
        wait = self._random.choice((0.0, 0.0, self._random.expovariate(2)))
        answer = await self._call("echo", call=call, wait=wait, idempotency_key=call)
        if answer != call:
            raise self._truth.violated(f"{call} got the answer of another call")

    async def _approved(self, call: str) -> None:
        answer = await self._call("approved", call=call)
        if answer not in self._truth.answers[call]:
            raise self._truth.violated(f"{call} got {answer!r}, which no handler has answered")

    async def _approve(self, approval: str) -> str:
        self._truth.answered(approval, self.name)
        await asyncio.sleep(self._random.expovariate(2))
        return self.name

    async def _count(self, call: str) -> None:
        """Read a durable stream: no gap and no repetition, whatever happens to connections."""
        assert self.client is not None
        upto, expected = self._random.randrange(1, 60), 0
        async with self.client.stream(
            "count", durable=True, timeout=TIMEOUT_S, call=call, upto=upto
        ) as items:
            async for item in items:
                if item != expected:
                    raise self._truth.violated(f"{call} got item {item} instead of {expected}")
                expected += 1
        if expected != upto:
            raise self._truth.violated(f"{call} ended after {expected} of {upto} items")

    async def _ticks(self, call: str) -> None:
        """Read a stream for a while."""
        assert self.client is not None
        until = self.loop.time() + self._random.expovariate(0.2)
        async with self.client.stream("ticks", call=call, timeout=TIMEOUT_S) as items:
            async for _ in items:
                if self.loop.time() > until:
                    break

    async def _log_out(self, call: str) -> None:
        """End the own session."""
        client = self.client
        assert client is not None
        self.client = None
        try:
            await self._end_session(client, client.session and client.session.id, "session.close")
        finally:
            await client.close()

    async def _revoke(self, call: str) -> None:
        """End another session of the same user."""
        client = self.client
        assert client is not None
        others = [each["id"] for each in await client.call("session.list") if not each["current"]]
        if others:
            chosen = self._random.choice(others)
            await self._end_session(client, chosen, "session.revoke", id=chosen)

    async def _end_session(self, client: Client, session_id: str | None, method: str, **params: Any) -> None:
        """Have a session ended. It is over for all once that was acknowledged."""
        before = client.endpoint
        await client.call(method, **params)
        by = before.host if before is not None and before == client.endpoint else "some server"
        assert session_id is not None
        self._truth.session_ended(session_id, self.user, by)
