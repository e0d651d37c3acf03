"""Calls with an idempotency key run once, however often they are sent."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest

from tests.client.conftest import ConnectTo
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from zcproto.app.app import App
from zcproto.app.context import Context
from zcproto.errors import ConnectionClosed, FailedPrecondition
from zcproto.server.protocol import ServerProtocol


class CuttingApp:
    """An application that aborts its connections during calls, `cuts` times."""

    def __init__(self, cuts: int) -> None:
        self.cuts = cuts
        self.paid: list[int] = []
        self.protocols: list[object] = []
        self.app = App()
        self.app.method("pay")(self.pay)
        self.app.method("ship")(self.ship)

    def pay(self, context: Context, amount: int) -> dict[str, int]:
        """Abort the connection after the work, so that the answer is not sent."""
        self.paid.append(amount)
        self._cut(context)
        return {"number": len(self.paid), "amount": amount}

    async def ship(self, context: Context, amount: int) -> dict[str, int]:
        """Abort the connection during the work, and finish it."""
        self._cut(context)
        await asyncio.sleep(0.05)
        self.paid.append(amount)
        return {"number": len(self.paid), "amount": amount}

    def _cut(self, context: Context) -> None:
        if self.cuts:
            self.cuts -= 1
            cast("ServerProtocol", context.caller).abort("cut")


def cutting_app(serve: Serve, cuts: int = 1) -> tuple[CuttingApp, ServerThread]:
    cutting = CuttingApp(cuts)
    return cutting, serve(cutting.app)


@pytest.mark.parametrize("method", ["pay", "ship"])
async def test_lost_answer_is_repeated_on_another_connection(
    serve: Serve, connect_to: ConnectTo, method: str
) -> None:
    cutting, server = cutting_app(serve)
    async with connect_to(server) as client:
        result = await client.call(method, amount=5, idempotency_key="order-7")
    assert result == {"number": 1, "amount": 5}
    assert cutting.paid == [5]
    assert server.stats["connections_opened"] == 2
    assert server.stats["idempotency"]["repeated"] == 1


async def test_lost_answer_without_idempotency_key_raises(serve: Serve, connect_to: ConnectTo) -> None:
    cutting, server = cutting_app(serve)
    async with connect_to(server) as client:
        with pytest.raises(ConnectionClosed):
            await client.call("pay", amount=5)
        assert cutting.paid == [5]
        assert (await client.call("pay", amount=5))["number"] == 2


async def test_another_client_of_the_user_gets_the_stored_answer(serve: Serve, connect_to: ConnectTo) -> None:
    cutting, server = cutting_app(serve, cuts=0)
    async with connect_to(server) as client, connect_to(server) as another:
        first, second = await asyncio.gather(
            client.call("ship", amount=5, idempotency_key="k"),
            another.call("ship", amount=5, idempotency_key="k", timeout=7),
        )
        assert first == second == {"number": 1, "amount": 5}
        with pytest.raises(FailedPrecondition, match="another request"):
            await another.call("ship", amount=6, idempotency_key="k")
    async with connect_to(server, user="bob") as bob:
        assert (await bob.call("ship", amount=6, idempotency_key="k"))["number"] == 2
    assert cutting.paid == [5, 6]


async def test_answer_of_timed_out_call_can_be_fetched_later(serve: Serve, connect_to: ConnectTo) -> None:
    cutting, server = cutting_app(serve, cuts=0)
    async with connect_to(server) as client:
        call = asyncio.ensure_future(client.call("ship", amount=5, idempotency_key="k"))
        await asyncio.to_thread(server.until, lambda: server.server.state.idempotency.running)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await client.call("ship", amount=5, idempotency_key="k") == {"number": 1, "amount": 5}
    assert cutting.paid == [5]
