"""A client with several connections against a real server: calls back, and refreshes, on each of them."""

from __future__ import annotations

import asyncio

from tests.client.helpers import expire_token
from tests.limits import TIMEOUT
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.config import CertificatesConfig, Config, LimitsConfig, StoreConfig, TlsConfig
from zcproto.testing import LocalServer

CALLS = 10


def app_that_calls_back() -> App:
    app = App()
    together = asyncio.Barrier(CALLS)

    @app.method("shell.run")
    async def run(context: Context, command: str) -> str:
        await together.wait()  # all are in flight, so that they are on several connections
        approved = await context.client.call("approve", command=command, timeout=TIMEOUT)
        return f"{command}: {approved}"

    return app


def server(app: App) -> LocalServer:
    return LocalServer(
        app,
        Config(
            certificates=CertificatesConfig(key_types=("ecdsa-p256",)),
            store=StoreConfig(url="memory"),
            tls=TlsConfig(handshake_timeout=30.0),
            limits=LimitsConfig(max_streams=4),
        ),
    )


async def test_methods_on_all_connections_call_back_before_and_after_a_refresh() -> None:
    with server(app_that_calls_back()) as local:
        client = local.connect("ada", max_connections=4, timeout=TIMEOUT)

        @client.handler("approve")
        async def approve(command: str) -> bool:
            return command != "rm"

        async with client:
            for _ in range(2):
                runs = [client.call("shell.run", command=f"ls {number}") for number in range(CALLS)]
                assert await asyncio.gather(*runs) == [f"ls {number}: True" for number in range(CALLS)]
                assert len(client._connections.open) > 1  # whether the calls were on several is not public
                assert len(local.in_loop(lambda: local.server.clients(user="ada", handles="approve"))) == 1
                (session,) = await client.call("session.list")
                assert len(session["connections"]) == len(client._connections.open)
                expire_token(client)
                await client.open_session()
