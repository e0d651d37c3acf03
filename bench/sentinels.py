"""A Valkey with replicas and sentinels that replace it. Replication is asynchronous: a failover may lose writes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Final, Self

import redis

from bench.deployments import SERVICE, monitor, pairs
from bench.server_process import ServerProcess
from bench.valkey import DEAD_PORT, VALKEY, require_program
from zcproto.load.processes import uninterrupted

LOOPBACK: Final = "127.0.0.1"
DOWN_AFTER_MS: Final = 1_000
"""Without an answer, after which a sentinel considers the primary down."""

FAILOVER_MS: Final = 4_000
"""Twice this time passes before a sentinel begins another failover."""


class ReplicatedValkey:
    """A primary, its replicas, and the sentinels, as a context manager."""

    def __init__(self, folder: Path, servers: int = 3, sentinels: int = 3) -> None:
        require_program()
        options = ("--appendonly", "yes", "--appendfsync", "no")
        self._servers = [ServerProcess(VALKEY, folder / f"valkey-{n}", *options) for n in range(servers)]
        monitoring = monitor(
            self._servers[0].port,
            quorum=sentinels // 2 + 1,
            down_after_ms=DOWN_AFTER_MS,
            failover_timeout_ms=FAILOVER_MS,
        )
        self._sentinels = [
            ServerProcess(VALKEY, folder / f"sentinel-{n}", *monitoring) for n in range(sentinels)
        ]
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        return f"valkey+sentinel://{','.join(each.address for each in self._sentinels)}/{SERVICE}"

    def __enter__(self) -> Self:
        with ExitStack() as stack, uninterrupted():
            for server in self._servers:
                stack.callback(server.kill)
                server.start()
            for replica in self._servers[1:]:
                replica.command("REPLICAOF", LOOPBACK, self._servers[0].port)
            for sentinel in self._sentinels:
                stack.callback(sentinel.kill)
                sentinel.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def primary(self) -> ServerProcess:
        """Return the server that the first sentinel reports as the primary."""
        port = _primary_port(self._sentinels[0])
        return next(server for server in self._servers if server.port == port)

    def is_in_order(self) -> bool:
        """Return whether all sentinels agree about the primary and its replicas, which follow it."""
        try:
            primary = self.primary()
            follow = f"connected_slaves:{len(self._servers) - 1}".encode()
            return follow in primary.command("INFO", "replication") and all(
                _primary_port(sentinel) == primary.port
                and self._is_in_order(sentinel, str(primary.port).encode())
                for sentinel in self._sentinels
            )
        except (redis.RedisError, OSError):
            return False

    def _is_in_order(self, sentinel: ServerProcess, port: bytes) -> bool:
        about = pairs(sentinel.command("SENTINEL", "MASTER", SERVICE))
        replicas = [pairs(each) for each in sentinel.command("SENTINEL", "REPLICAS", SERVICE)]
        good = [
            each
            for each in replicas
            if (each[b"flags"], each[b"master-link-status"], each[b"master-port"]) == (b"slave", b"ok", port)
        ]
        return (
            about[b"flags"] == b"master"
            and int(about[b"num-other-sentinels"]) == len(self._sentinels) - 1
            and len(good) == len(self._servers) - 1
        )

    def fail_over(self) -> None:
        """Begin a planned failover."""
        self._sentinels[0].command("SENTINEL", "FAILOVER", SERVICE)

    def cut_replication(self) -> None:
        """Keep further writes from all replicas."""
        primary = self.primary()
        for server in self._servers:
            if server is not primary:
                server.command("REPLICAOF", LOOPBACK, DEAD_PORT)


def _primary_port(sentinel: ServerProcess) -> int:
    _, port = sentinel.command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SERVICE)
    return int(port)
