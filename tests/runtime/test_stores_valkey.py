"""Servers that share their sessions through a real Valkey server, also during its outages."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.server.helpers import KEY, NO_TOKEN, AnsweredError, Client, ServerThread, eventually
from tests.stores.valkey.server_process import ServerProcess as StoreProcess
from tests.stores.valkey.server_process import running
from zcproto.errors import Code

PROGRAM = "valkey-server"
LIMIT_S = 0.3
"""The delay that an outage may add to one call."""

SLACK_S = 5.0
"""The delay that a busy machine may add to one call."""


class Cluster:
    """Two servers on one store."""

    def __init__(self, store: StoreProcess, folder: Path, certs: Path, stack: ExitStack) -> None:
        self.store = store
        self._folder = folder
        self._certs = certs
        self._stack = stack

    def serve(self, home: str = "one", **settings: Any) -> ServerThread:
        """Serve with more time for the store than the default, which a busy machine may exceed."""
        settings = {"store__url": self.store.url, "store__timeout": "5s", **settings}
        return self._stack.enter_context(ServerThread(self._folder / home, self._certs, **settings))

    def client(self, server: ServerThread, user: str | None = None, token: bytes | None = None) -> Client:
        client = self._stack.enter_context(server.client(user))
        if token is not None:
            client.token = token
        return client


@pytest.fixture
def cluster(tmp_path: Path, certs: Path) -> Iterator[Cluster]:
    with running(PROGRAM, tmp_path / "store") as store, ExitStack() as stack:
        yield Cluster(store, tmp_path, certs, stack)


def state(server: ServerThread) -> str:
    store_state: str = server.stats["store"]["state"]
    return store_state


def recovered(server: ServerThread) -> None:
    eventually(lambda: state(server) == "healthy")


def test_session_is_shared_and_revoked_within_a_second(cluster: Cluster) -> None:
    one, other = cluster.serve(), cluster.serve("other")
    took = []
    for _ in range(5):  # a busy machine may delay one of them, not all
        first = cluster.client(one, "ada")
        second = cluster.client(other, token=first.token)
        second.echo()
        began = time.monotonic()
        assert first.call("session.close") == {}
        assert second.event().value[0] == "session.revoked"
        assert second.refused("echo").code == Code.TOKEN_REVOKED
        took.append(time.monotonic() - began)
        third = cluster.client(other)
        assert third.refused("echo", token=first.token).code == Code.TOKEN_REVOKED
    assert min(took) < 1.0


def test_refresh_is_known_on_another_server(cluster: Cluster) -> None:
    one, other = cluster.serve(), cluster.serve("other")
    first = cluster.client(one, "ada")
    second = cluster.client(other, token=first.token)
    second.echo()
    refreshed = second.call(
        "session.refresh",
        {"refresh_token": first.opened["refresh_token"], "client": "test/1"},
        token=NO_TOKEN,
    )
    assert refreshed["id"] == first.opened["id"]
    assert first.call("echo", {"n": 1}, token=refreshed["token"]) == {"n": 1}
    eventually(lambda: refused_with(first, first.token) == Code.TOKEN_REVOKED)


def refused_with(client: Client, token: bytes) -> int | None:
    try:
        client.call("echo", {"n": 1}, token=token)
    except AnsweredError as answered:
        return answered.code
    return None


def test_session_limit_holds_for_concurrent_logins_on_two_servers(cluster: Cluster) -> None:
    # The first login comes after 200 handshakes.
    limits: dict[str, Any] = {"sessions__per_user": 5, "sessions__open_timeout": "1m"}
    servers = [cluster.serve(**limits), cluster.serve("other", **limits)]
    clients = [cluster.client(servers[number % 2]) for number in range(200)]
    codes: list[int] = []

    def log_in(client: Client) -> None:
        try:
            client.open_session("ada", KEY)
            codes.append(0)
        except AnsweredError as answered:
            codes.append(answered.code)

    threads = [threading.Thread(target=log_in, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes.count(0) == 5
    assert codes.count(Code.RESOURCE_EXHAUSTED) == 195


def killed(store: StoreProcess) -> None:
    store.kill()


def hung(store: StoreProcess) -> None:
    store.stop()


def read_only(store: StoreProcess) -> None:
    store.command("REPLICAOF", "127.0.0.1", 1)
    store.command("CONFIG", "SET", "replica-read-only", "yes")


def back(store: StoreProcess) -> None:
    if store.process is None:
        store.start()
    else:
        store.go_on()
        store.command("REPLICAOF", "NO", "ONE")


@pytest.mark.parametrize("hurt", [killed, hung, read_only])
def test_outage_keeps_known_sessions_and_revocations(
    cluster: Cluster, hurt: Callable[[StoreProcess], None]
) -> None:
    server = cluster.serve(store__timeout="250ms")
    clients = [cluster.client(server, f"user{number}") for number in range(20)]
    gone = cluster.client(server, "user0")
    newcomer = cluster.client(server)
    hurt(cluster.store)
    waited = Stopwatch()
    with waited:
        assert clients[0].call("session.revoke", {"id": gone.opened["id"]}) == {"revoked": 1}
    for _ in range(5):
        for client in clients:
            with waited:
                client.echo()
        with pytest.raises(AnsweredError) as refused, waited:
            newcomer.open_session("new")
        assert refused.value.code == Code.UNAVAILABLE
    assert statistics.median(waited.seconds) < LIMIT_S
    assert max(waited.seconds) < LIMIT_S + SLACK_S
    back(cluster.store)
    recovered(server)
    newcomer.open_session("new")
    for client in [*clients, newcomer]:
        client.echo()
        assert client.events == []
    other = cluster.serve("other")
    there = cluster.client(other)
    assert there.refused("echo", token=gone.token).code in (Code.TOKEN_REVOKED, Code.UNAUTHENTICATED)
    for client in clients:  # also where the store came back empty
        assert there.call("echo", {"n": 1}, token=client.token) == {"n": 1}


class Stopwatch:
    """Measures how long blocks take."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds.append(time.monotonic() - self._began)


def test_emptied_store_gets_all_sessions_again(cluster: Cluster) -> None:
    one, other = cluster.serve(), cluster.serve("other")
    clients = [cluster.client(one, f"user{number}") for number in range(20)]
    idle = cluster.client(one, "idle")
    token = idle.token
    idle.close()
    cluster.store.kill()
    cluster.store.start()

    def settled() -> bool:
        there = cluster.client(other)
        return all(refused_with(there, each) is None for each in [token, *(c.token for c in clients)])

    eventually(settled)
    for client in clients:
        client.echo()
        assert client.events == []
    assert state(one) == state(other) == "healthy"


def test_server_starts_without_store_and_recovers(cluster: Cluster) -> None:
    one = cluster.serve()
    client = cluster.client(one, "ada")
    cluster.store.stop()
    other = cluster.serve("other", store__timeout="250ms")
    there = cluster.client(other)
    assert there.refused("echo", token=client.token).code == Code.UNAVAILABLE
    cluster.store.go_on()
    recovered(other)
    assert there.call("echo", {"n": 1}, token=client.token) == {"n": 1}
