"""Calls with an idempotency key run once, however often they are sent."""

from __future__ import annotations

import asyncio

import pytest

from tests.client.helpers import turns
from tests.limits import TIMEOUT
from zcproto.app.app import App
from zcproto.errors import ConnectionClosed, FailedPrecondition
from zcproto.testing import Link, MemoryServer, MovableClock


class Shop:
    """An application in memory whose orders are paid at once, and shipped when `may_ship` is set."""

    def __init__(self) -> None:
        self.paid: list[int] = []
        self.may_ship = asyncio.Event()
        self.link, self.clock = Link(), MovableClock()
        app = App()
        app.method(self.pay)
        app.method(self.ship)
        self.server = MemoryServer(app, link=self.link, clock=self.clock)

    def pay(self, amount: int) -> dict[str, int]:
        self.paid.append(amount)
        return {"number": len(self.paid), "amount": amount}

    async def ship(self, amount: int) -> dict[str, int]:
        await self.may_ship.wait()
        return self.pay(amount)

    async def lose(self) -> None:
        """Lose the connection with what the server has sent, and let the client reconnect."""
        self.link.cut()
        self.link.release()
        await turns()
        self.clock.advance(5)


@pytest.mark.parametrize("method", ["pay", "ship"])
async def test_lost_answer_is_repeated_on_another_connection(method: str) -> None:
    shop = Shop()
    async with shop.server, shop.server.connect("ada", timeout=TIMEOUT) as client:
        shop.link.hold("from_server")
        call = asyncio.create_task(client.call(method, amount=5, idempotency_key="order-7"))
        await turns()
        await shop.lose()
        shop.may_ship.set()
        assert await call == {"number": 1, "amount": 5}
    assert shop.paid == [5]
    assert shop.link.accepted == 2


async def test_lost_answer_without_idempotency_key_raises() -> None:
    shop = Shop()
    async with shop.server, shop.server.connect("ada", timeout=TIMEOUT) as client:
        shop.link.hold("from_server")
        call = asyncio.create_task(client.call("pay", amount=5))
        await turns()
        await shop.lose()
        with pytest.raises(ConnectionClosed):
            await call
        assert shop.paid == [5]
        assert (await client.call("pay", amount=5))["number"] == 2


async def test_another_client_of_the_user_gets_the_stored_answer() -> None:
    shop = Shop()
    async with (
        shop.server as server,
        server.connect("ada", timeout=TIMEOUT) as client,
        server.connect("ada", timeout=TIMEOUT) as another,
    ):
        calls = [
            asyncio.create_task(client.call("ship", amount=5, idempotency_key="k")),
            asyncio.create_task(another.call("ship", amount=5, idempotency_key="k", timeout=TIMEOUT / 2)),
        ]
        await turns()
        shop.may_ship.set()
        assert await asyncio.gather(*calls) == [{"number": 1, "amount": 5}] * 2
        with pytest.raises(FailedPrecondition, match="another request"):
            await another.call("ship", amount=6, idempotency_key="k")
        async with server.connect("bob", timeout=TIMEOUT) as bob:
            assert (await bob.call("ship", amount=6, idempotency_key="k"))["number"] == 2
    assert shop.paid == [5, 6]


async def test_answer_of_timed_out_call_can_be_fetched_later() -> None:
    shop = Shop()
    async with shop.server, shop.server.connect("ada", timeout=TIMEOUT) as client:
        call = asyncio.create_task(client.call("ship", amount=5, idempotency_key="k"))
        await turns()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        shop.may_ship.set()
        assert await client.call("ship", amount=5, idempotency_key="k") == {"number": 1, "amount": 5}
    assert shop.paid == [5]
