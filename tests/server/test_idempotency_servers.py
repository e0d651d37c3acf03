"""A request with an idempotency key is run once for all servers that share a store, and across restarts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.limits import TIMEOUT
from tests.server.helpers import AnsweredError, Client, ServerThread
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, is_installed, running
from zcproto.app.app import App
from zcproto.errors import Code

KEY = {"idempotency_key": "order-7"}


class Shop:
    """The application of all servers, which counts executed requests."""

    def __init__(self) -> None:
        self.paid: list[int] = []
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.begun = threading.Event()
        self.app = App()

        @self.app.method("pay")
        async def pay(amount: int) -> dict[str, int]:
            self.begun.set()
            await asyncio.to_thread(self.goes_on.wait, 10)
            self.paid.append(amount)
            return {"number": len(self.paid), "amount": amount}


@pytest.fixture
def shop() -> Shop:
    return Shop()


def pay(client: Client, amount: int = 5) -> Any:
    return client.call("pay", {"amount": amount}, meta=KEY)


def test_answer_survives_a_restart_of_the_server(shop: Shop, tmp_path: Path, certs: Path) -> None:
    with (
        ServerThread(tmp_path / "home", certs, shop.app, store__url="sqlite") as server,
        server.client("ada") as client,
    ):
        first = pay(client)
        token = client.token
    with ServerThread(tmp_path / "home", certs, shop.app, store__url="sqlite") as server:
        with server.client() as client:
            client.token = token
            assert pay(client) == first == {"number": 1, "amount": 5}
            with pytest.raises(AnsweredError) as error:
                pay(client, 6)
            assert error.value.code == Code.FAILED_PRECONDITION
        assert server.stats["idempotency"]["repeated"] == 1
    assert shop.paid == [5]


@pytest.fixture(params=PROGRAMS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    if not is_installed(request.param):
        pytest.skip(f"{request.param} is not installed")
    with running(request.param, tmp_path / "store") as process:
        yield process


def test_two_servers_run_a_request_once(
    shop: Shop, tmp_path: Path, certs: Path, store: ServerProcess
) -> None:
    def serve(name: str) -> ServerThread:
        return ServerThread(tmp_path / name, certs, shop.app, store__url=store.url)

    with serve("one") as one, serve("two") as two, ThreadPoolExecutor() as threads:
        clients = [server.client("ada") for server in (one, two, one, two)]
        shop.goes_on.clear()
        first = threads.submit(pay, clients[0])
        assert shop.begun.wait(TIMEOUT)
        others = [threads.submit(pay, client) for client in clients[1:]]
        two.until(lambda: two.server.state.idempotency.running)
        shop.goes_on.set()
        results = [each.result(TIMEOUT) for each in (first, *others)]
        for client in clients:
            client.close()
        with two.client("bob") as bob:
            assert pay(bob, 6)["number"] == 2
    assert results == [{"number": 1, "amount": 5}] * 4
    assert shop.paid == [5, 6]


@pytest.mark.parametrize("ahead_ms", [3_600_000, -3_600_000])
def test_server_with_another_clock_runs_a_request_once(
    shop: Shop, tmp_path: Path, certs: Path, store: ServerProcess, ahead_ms: int
) -> None:
    one, two = (
        ServerThread(tmp_path / name, certs, shop.app, store__url=store.url) for name in ("one", "two")
    )
    two.clock.ahead_ms = ahead_ms
    with one, two:
        for number, (first, second) in enumerate([(one, two), (two, one)], 1):
            for server in (first, second, first):
                with server.client(wall=server.clock.wall) as client:
                    client.open_session(f"user-{number}")
                    assert pay(client) == {"number": number, "amount": 5}
    assert shop.paid == [5, 5]


def test_no_request_is_run_while_the_store_is_down(
    shop: Shop, tmp_path: Path, certs: Path, store: ServerProcess
) -> None:
    with (
        ServerThread(tmp_path / "home", certs, shop.app, store__url=store.url) as server,
        server.client("ada") as client,
    ):
        client.call("pay", {"amount": 1})
        store.kill()
        with pytest.raises(AnsweredError) as error:
            pay(client)
        assert error.value.code == Code.UNAVAILABLE
        assert error.value.details["retry_after_ms"] > 0
        assert client.call("pay", {"amount": 2})["number"] == 2
    assert shop.paid == [1, 2]
