"""Clients: processes with the product's own client, and what they do; and the application that they call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any

from tests.simulation.loop import SimulatedLoop
from tests.simulation.network import Network
from tests.simulation.servers import ProcessClock, ServerProcess
from tests.simulation.truth import Truth, Violation
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.client import Client
from zcproto.client.dial import LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol, ConnectionOwner
from zcproto.connection.client import ClientConnection
from zcproto.errors import CannotConnect, ZcprotoError

TIMEOUT_S = 30.0
CONNECT_S = 5.0


def application(truth: Truth, server: str, random: Random) -> App[Any]:
    """Return the application of one server process, whose methods record what they do."""
    app: App[Any] = App()

    def note(context: Context) -> None:
        assert context.session is not None
        truth.used(context.session.id, server)

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

    @app.method("count", durable=True)
    async def count(context: Context, call: str, upto: int) -> AsyncIterator[int]:
        note(context)
        truth.ran(call, server)
        for number in range(upto):
            yield number
            await asyncio.sleep(random.expovariate(20))

    return app


class ClientProcess:
    """A process with one client, which does one thing after another."""

    def __init__(
        self,
        loop: SimulatedLoop,
        network: Network,
        find: Callable[[str], ServerProcess | None],
        addresses: list[str],
        user: str,
        truth: Truth,
        think_s: float,
    ) -> None:
        self.loop, self.clock = loop, ProcessClock(loop)
        self._network, self._find, self._addresses = network, find, addresses
        self.user, self._truth, self._think_s = user, truth, think_s
        self._random = loop.random
        self.client: Client | None = None
        self.paused_until = 0.0
        self._number = 0
        self._stopping = False
        self.task = loop.create_task(self._run())

    @property
    def name(self) -> str:
        return self.loop.name

    def stop(self) -> None:
        self._stopping = True

    async def dial(
        self, owner: ConnectionOwner, resources: LoopResources, endpoint: Endpoint, on_reached: Callable[[], None]
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

    async def _run(self) -> None:
        actions = {self._echo: 6, self._keyed: 6, self._approved: 2, self._count: 1, self._log_out: 1}
        await asyncio.sleep(self._random.uniform(0, self._think_s))
        while not self._stopping:
            if self.client is None:
                await self._log_in()
                continue
            (action,) = self._random.choices(list(actions), list(actions.values()))
            self._number += 1
            call = f"{action.__name__[1:]} {self.name}.{self._number}"
            self._truth.begin(call, TIMEOUT_S, self.name)
            try:
                await action(call)
                outcome = "ok"
            except ZcprotoError as error:
                outcome = type(error).__name__
            self._truth.end(call)
            self._truth.log(self.name, f"{call}: {outcome}")
            await asyncio.sleep(self._random.expovariate(1 / self._think_s))
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
            await asyncio.sleep(self._random.expovariate(1 / self._think_s))
            return
        self.client = client

    # --- what it does ---

    async def _call(self, method: str, **params: Any) -> Any:
        assert self.client is not None
        return await self.client.call(method, **params)

    async def _echo(self, call: str) -> None:
        wait = self._random.choice((0.0, 0.0, self._random.expovariate(2)))
        if await self._call("echo", call=call, wait=wait) != call:
            raise Violation(f"{call} got the answer of another call")

    async def _keyed(self, call: str) -> None:
        wait = self._random.choice((0.0, 0.0, self._random.expovariate(2)))
        answer = await self._call("echo", call=call, wait=wait, idempotency_key=call)
        if answer != call:
            raise Violation(f"{call} got the answer of another call")

    async def _approved(self, call: str) -> None:
        answer = await self._call("approved", call=call)
        if answer not in self._truth.answers[call]:
            raise Violation(f"{call} got {answer!r}, which no handler has answered")

    async def _approve(self, approval: str) -> str:
        self._truth.answered(approval, self.name)
        await asyncio.sleep(self._random.expovariate(2))
        return self.name

    async def _count(self, call: str) -> None:
        """Read a durable stream: no gap and no repetition, whatever happens to connections."""
        assert self.client is not None
        upto, expected = self._random.randrange(1, 60), 0
        async with self.client.stream("count", durable=True, timeout=TIMEOUT_S, call=call, upto=upto) as items:
            async for item in items:
                if item != expected:
                    raise Violation(f"{call} got item {item} instead of {expected}")
                expected += 1
        if expected != upto:
            raise Violation(f"{call} ended after {expected} of {upto} items")

    async def _log_out(self, call: str) -> None:
        """End the session; what acknowledges that is a server."""
        client = self.client
        assert client is not None and client.session is not None
        session_id, before = client.session.id, client.endpoint
        self.client = None
        try:
            await client.call("session.close")
            by = before.host if before is not None and before == client.endpoint else "some server"
            self._truth.session_ended(session_id, self.user, by)
        finally:
            await client.close()
