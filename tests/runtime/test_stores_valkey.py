"""Servers that share their sessions through a real Valkey server, also during its outages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.limits import TIMEOUT
from tests.runtime.helpers import Servers, refresh_params, refused_with
from tests.server.helpers import NO_TOKEN, AnsweredError, ServerThread, eventually
from tests.stores.valkey.helpers import set_timeout
from tests.stores.valkey.server_process import ServerProcess as StoreProcess
from tests.stores.valkey.server_process import running
from zcproto.errors import Code
from zcproto.stores.sync import StoreSync
from zcproto.stores.valkey.store import ValkeyStore

PROGRAM = "valkey-server"
SOON = 0.25
"""The timeout of a store that has gone."""


class Cluster(Servers):
    """Servers on one store."""

    def __init__(self, store: StoreProcess, folder: Path, certs: Path, stack: ExitStack) -> None:
        super().__init__(folder, certs, stack, store__url=store.url)
        self.store = store


@pytest.fixture
def cluster(tmp_path: Path, certs: Path) -> Iterator[Cluster]:
    with running(PROGRAM, tmp_path / "store") as store, ExitStack() as stack:
        yield Cluster(store, tmp_path, certs, stack)


def state(server: ServerThread) -> str:
    store_state: str = server.stats["store"]["state"]
    return store_state


def recovered(server: ServerThread) -> None:
    eventually(lambda: state(server) == "healthy")


def test_session_is_shared_and_revoked(cluster: Cluster) -> None:
    one, other = cluster.start(), cluster.start("other")
    first = cluster.client(one, "ada")
    second = cluster.client(other, token=first.token)
    second.echo()
    assert first.call("session.close") == {}
    assert second.event().value[0] == "session.revoked"
    assert second.refused("echo").code == Code.TOKEN_REVOKED
    third = cluster.client(other)
    assert third.refused("echo", token=first.token).code == Code.TOKEN_REVOKED


def test_refresh_is_known_on_another_server(cluster: Cluster) -> None:
    one, other = cluster.start(), cluster.start("other")
    first = cluster.client(one, "ada")
    second = cluster.client(other, token=first.token)
    second.echo()
    refreshed = second.call("session.refresh", refresh_params(first), token=NO_TOKEN)
    assert refreshed["id"] == first.opened["id"]
    assert first.call("echo", {"n": 1}, token=refreshed["token"]) == {"n": 1}
    eventually(lambda: refused_with(first, first.token) == Code.TOKEN_REVOKED)


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
    server = cluster.start(store__grace="24h")
    clients = [cluster.client(server, f"user{number}") for number in range(20)]
    gone = cluster.client(server, "user0")
    newcomer = cluster.client(server)
    hurt(cluster.store)
    server.in_loop(lambda: set_limit(server, SOON))
    assert clients[0].call("session.revoke", {"id": gone.opened["id"]}) == {"revoked": 1}
    server.in_loop(lambda: set_limit(server, TIMEOUT))
    for _ in range(5):  # no call waits for the store from now on
        for client in clients:
            client.echo()
        with pytest.raises(AnsweredError) as refused:
            newcomer.open_session("new")
        assert refused.value.code == Code.UNAVAILABLE
    back(cluster.store)
    recovered(server)
    newcomer.open_session("new")
    for client in [*clients, newcomer]:
        client.echo()
        assert client.events == []
    other = cluster.start("other")
    there = cluster.client(other)
    assert there.refused("echo", token=gone.token).code in (Code.TOKEN_REVOKED, Code.UNAUTHENTICATED)
    for client in clients:  # also where the store came back empty
        assert there.call("echo", {"n": 1}, token=client.token) == {"n": 1}


def set_limit(server: ServerThread, seconds: float) -> None:
    """Set the time that operations of the store may take."""
    sync: StoreSync = server.server.state.sessions.sync  # type: ignore[attr-defined]
    assert isinstance(sync.store, ValkeyStore)
    set_timeout(sync.store, seconds)
    sync.breaker.timeout = seconds
