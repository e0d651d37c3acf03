"""Stores and clusters of servers for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import Any

from tests.limits import TIMEOUT
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess
from zcproto.stores.base import Change, ChangeKind, StoreUnavailable
from zcproto.stores.valkey.servers import Cluster, ValkeyConnection
from zcproto.stores.valkey.store import ValkeyStore

ALL = Change(ChangeKind.ALL)
CLUSTER = "--cluster-enabled"
KINDS = [*PROGRAMS, *(f"{program}, in a cluster" for program in PROGRAMS)]


def url_of(server: ServerProcess) -> str:
    return f"redis+cluster://{server.address}" if CLUSTER in server.options else server.url


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[ValkeyStore, list[Change]]]:
    """Open a store."""
    changes: list[Change] = []
    store = ValkeyStore(url, **options)
    await store.open(lambda change: change.kind is ChangeKind.LOST or changes.append(change))
    try:
        yield store, changes
    finally:
        await store.close()


@contextmanager
def impatient(store: ValkeyStore, timeout: float) -> Iterator[None]:
    """Give an open store a short timeout for a block in which its server does not answer."""
    set_timeout(store, timeout)
    try:
        yield
    finally:
        set_timeout(store, TIMEOUT)


def set_timeout(store: ValkeyStore, timeout: float) -> None:
    servers = store._servers
    assert servers is not None
    parts: list[ValkeyConnection | Cluster] = [servers]
    if isinstance(servers, Cluster):
        parts += servers._connections.values()
    for part in parts:
        part._hooks = replace(part._hooks, timeout=timeout)
        if isinstance(part, ValkeyConnection) and part._link is not None:
            part._link._silence = timeout
    store._timeout = timeout


async def is_done(operation: Any) -> bool:
    try:
        await operation()
    except StoreUnavailable:
        return False
    return True


class ClusterOf:
    """Three primaries with a third of the slots each, and a node without slots."""

    def __init__(self, nodes: list[ServerProcess]) -> None:
        self.nodes = nodes
        self.ids = [node.command("CLUSTER", "MYID") for node in nodes]
        self.url = "valkey+cluster://" + ",".join(node.address for node in nodes[:2])

    def owner(self, slot: int) -> int:
        for first, last, primary, *_ in self.nodes[0].command("CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return self.ids.index(primary[2])
        raise AssertionError(slot)

    def move_keys(self, slot: int, source: int, sink: int) -> None:
        port = self.nodes[sink].port
        while keys := self.nodes[source].command("CLUSTER", "GETKEYSINSLOT", slot, 100):
            self.nodes[source].command(
                "MIGRATE", "127.0.0.1", port, "", 0, int(TIMEOUT * 1000), "KEYS", *keys
            )

    def begin_move(self, slot: int, source: int, sink: int) -> None:
        self.nodes[sink].command("CLUSTER", "SETSLOT", slot, "IMPORTING", self.ids[source])
        self.nodes[source].command("CLUSTER", "SETSLOT", slot, "MIGRATING", self.ids[sink])

    def end_move(self, slot: int, sink: int) -> None:
        for node in [self.nodes[sink], *self.nodes]:
            if node.command("ROLE")[0] == b"master":
                node.command("CLUSTER", "SETSLOT", slot, "NODE", self.ids[sink])


def _offset(node: ServerProcess) -> int:
    text = node.command("INFO", "replication").decode()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines["slave_repl_offset" if lines["role"] == "slave" else "master_repl_offset"])
