"""Stores and clusters of servers for tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tests.stores.valkey.server_process import ServerProcess
from zcproto.stores.base import Change, ChangeKind, StoreUnavailable
from zcproto.stores.valkey.store import ValkeyStore

ALL = Change(ChangeKind.ALL)


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[ValkeyStore, list[Change]]]:
    """Open a store. Its timeout allows for a busy machine."""
    changes: list[Change] = []
    store = ValkeyStore(url, **{"timeout": 2.0, **options})
    await store.open(lambda change: change.kind is ChangeKind.LOST or changes.append(change))
    try:
        yield store, changes
    finally:
        await store.close()


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
            self.nodes[source].command("MIGRATE", "127.0.0.1", port, "", 0, 5000, "KEYS", *keys)

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
