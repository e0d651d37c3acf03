"""Deployments of Valkey in which a store can be hurt as a whole: one server, one with Sentinel, and a Cluster.

All methods block; each returns when its effect is there. Replicas have all writes before a server is hurt, unless
`hold_back` was called.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import redis
from redis.crc import key_slot

from bench.server_process import ServerProcess
from bench.valkey import DEAD_PORT, VALKEY, require_program
from zcproto.errors import ZcprotoError
from zcproto.load.processes import uninterrupted
from zcproto.stores.valkey.scripts import tag_of

SERVICE: Final = "sessions"
SENTINELS: Final = 3
DOWN_AFTER_MS: Final = 600
"""Without an answer, after which a sentinel considers the primary down."""

FAILOVER_MS: Final = 1_000
"""Twice this time passes before a sentinel begins another failover."""

SETTLE_S: Final = 45.0
DURABLE: Final = ("--appendonly", "yes", "--appendfsync", "always", "--maxmemory-policy", "noeviction")
CLUSTERED: Final = (
    *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
    *("--cluster-node-timeout", "600", "--cluster-replica-validity-factor", "0"),
)
SHARDS: Final = 3
SLOTS: Final = 16_384
_POLL_S: Final = 0.02

T = TypeVar("T")


class Deployment:
    """One server. Subclasses add its replicas."""

    can_fail_over = False

    def __init__(self, folder: Path) -> None:
        require_program()
        self._folder = folder
        self.data: list[ServerProcess] = []
        """The servers that are hurt: a primary, and its replicas if it has any."""
        self._others: list[ServerProcess] = []
        self._dead: list[ServerProcess] = []
        self._held_back: list[ServerProcess] = []

    @property
    def url(self) -> str:
        return self.data[0].url

    def __enter__(self) -> Self:
        try:
            with uninterrupted():
                self._start_all()
            self.settle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for server in [*self.data, *self._others]:
            server.kill()

    def _new(self, name: str, *options: str) -> ServerProcess:
        server = ServerProcess(VALKEY, self._folder / name, *options)
        server.start()
        return server

    def _start_all(self) -> None:
        self.data = [self._new("primary", *DURABLE)]

    @staticmethod
    def stores(user: str) -> bool:
        """Return whether a user's sessions are on the servers that are hurt."""
        return True

    def settle(self) -> None:
        """Wait until there is one primary, and the replicas have all its writes."""
        _wait(self._is_settled, f"{type(self).__name__} is not settled")

    def is_settled(self) -> bool:
        """Return whether there is one primary now, and the replicas have all its writes."""
        return _now(self._is_settled) or False

    def _is_settled(self) -> bool:
        roles = [_role(server) for server in self.data]
        if sorted(role[0] for role in roles) != [b"master", *[b"slave"] * (len(roles) - 1)]:
            return False
        replicas = [role for role in roles if role[0] == b"slave"]
        primary = next(role for role in roles if role[0] == b"master")
        return all(role[3] == b"connected" and role[4] == primary[1] for role in replicas)

    def primary(self) -> ServerProcess | None:
        """Return the server that is a primary; None unless there is exactly one."""
        running = [server for server in self.data if server.process is not None]
        found = [
            server for server in running if server not in self._held_back and _role(server)[0] == b"master"
        ]
        return found[0] if len(found) == 1 else None

    def known_primary(self) -> ServerProcess:
        """Return the primary. Wait for it: servers and sentinels of a busy machine may disagree for a moment."""
        return _wait(self.primary, "there is no primary")

    def _replicas(self) -> list[ServerProcess]:
        primary = self.primary()
        return [server for server in self.data if server is not primary]

    # --- faults --------------------------------------------------------------------------------------

    def kill(self) -> None:
        for server in self.data:
            server.kill()

    def start(self) -> None:
        for server in self.data:
            server.start()
        self.settle()

    def stop(self) -> None:
        """Stop the processes, so that they hang."""
        for server in self.data:
            server.stop()

    def go_on(self) -> None:
        for server in self.data:
            server.go_on()
        self.settle()

    def fill(self) -> None:
        """Refuse writes for want of memory."""
        self._configure("maxmemory", 1)

    def drain(self) -> None:
        self._configure("maxmemory", 0)

    def make_read_only(self) -> None:
        self.data[0].command("REPLICAOF", "127.0.0.1", DEAD_PORT)

    def make_writable(self) -> None:
        self.data[0].command("REPLICAOF", "NO", "ONE")

    def _configure(self, name: str, value: int) -> None:
        for server in self.data:
            server.command("CONFIG", "SET", name, value)

    def hold_back(self) -> None:
        """Keep further writes from the replicas, also those that a stopped process would read when it goes on."""
        self._held_back = self._replicas()
        for replica in self._held_back:
            replica.stop()
        primary = next(server for server in self.data if server not in self._held_back)
        primary.command("CLIENT", "KILL", "TYPE", "replica")

    def let_go(self) -> None:
        """Let replicas go on that were held back, without the writes of a primary that was hurt meanwhile."""
        for replica in self._held_back:
            replica.go_on()
        self._held_back = []

    def fail_over(self) -> None:
        """Begin a planned failover."""
        _wait(self._begin_failover, "no failover begins")

    def _begin_failover(self) -> bool:
        """Begin a planned failover; return whether it has begun. Where one `can_fail_over`."""
        raise NotImplementedError

    def kill_primary(self) -> None:
        """Kill the primary; its replicas go on, even if they were held back."""
        primary = self.known_primary()
        primary.kill()
        self.let_go()
        self._dead = [primary]

    def repair(self) -> None:
        """Undo all faults."""
        self._held_back, self._dead = [], []
        for server in self.data:
            if server.process is None:
                server.start()
            server.go_on()
        self.drain()
        self.make_writable()
        self.settle()

    def await_failover(self, since: ServerProcess) -> None:
        """Wait until another server than `since` is the primary, and a killed one is its replica."""
        _wait(lambda: self.primary() not in (None, since), "there is no new primary")
        for server in self._dead:
            server.start()
        self._dead = []
        self.settle()


class WithReplica(Deployment):
    can_fail_over = True

    def make_read_only(self) -> None:
        self._configure("min-replicas-to-write", 9)

    def make_writable(self) -> None:
        self._configure("min-replicas-to-write", 0)


class WithSentinel(WithReplica):
    """A primary, its replicas, and three sentinels that replace it."""

    def __init__(self, folder: Path, replicas: int = 1) -> None:
        super().__init__(folder)
        self._replica_count = replicas

    @property
    def url(self) -> str:
        addresses = ",".join(sentinel.address for sentinel in self._others)
        return f"valkey+sentinel://{addresses}/{SERVICE}"

    def _start_all(self) -> None:
        for number in range(1 + self._replica_count):
            self.data.append(self._new(f"server-{number}", *DURABLE))
        first = self.data[0].port
        for replica in self.data[1:]:
            replica.command("REPLICAOF", "127.0.0.1", first)
        for number in range(SENTINELS):
            self._others.append(self._new(f"sentinel-{number}", *_monitor(first)))

    def start(self) -> None:
        """Start both servers in the roles that they had last."""
        for server in self.data:
            server.start()
        self.settle()

    def _is_settled(self) -> bool:
        primary = self.primary()
        return (
            primary is not None
            and super()._is_settled()
            and all(self._agrees(each, primary) for each in self._others)
        )

    def _agrees(self, sentinel: ServerProcess, primary: ServerProcess) -> bool:
        """Return whether a sentinel monitors this primary, and knows of its replicas and of the other sentinels."""
        about, port = _about(sentinel), str(primary.port).encode()
        replicas = [_pairs(each) for each in sentinel.command("SENTINEL", "REPLICAS", SERVICE)]
        return (
            (about[b"port"], about[b"flags"]) == (port, b"master")
            and int(about[b"num-other-sentinels"]) == SENTINELS - 1
            and [(each[b"flags"], each[b"master-port"]) for each in replicas]
            == [(b"slave", port)] * self._replica_count
        )

    def kill(self) -> None:
        self._note_roles()
        super().kill()

    def kill_primary(self) -> None:
        super().kill_primary()
        self._set_role(self._dead[0], next(server for server in self.data if server is not self._dead[0]))

    def _note_roles(self) -> None:
        primary = self.known_primary()
        for server in self.data:
            self._set_role(server, primary if server is not primary else None)

    @staticmethod
    def _set_role(server: ServerProcess, primary: ServerProcess | None) -> None:
        """Start a server as a replica of `primary` the next time."""
        more = () if primary is None else ("--replicaof", f"127.0.0.1 {primary.port}")
        server.options = (*DURABLE, *more)

    def primary(self) -> ServerProcess | None:
        """Return the primary that the sentinels agree about; the old one calls itself a primary for ten seconds."""
        ports = {_about(sentinel)[b"port"] for sentinel in self._others}
        found = [server for server in self.data if {str(server.port).encode()} == ports]
        return found[0] if found else None

    def _begin_failover(self) -> bool:
        self._others[0].command("SENTINEL", "FAILOVER", SERVICE)
        return True

    def settle(self) -> None:
        primary = self.known_primary()
        if _role(primary)[0] == b"master":  # do now what the sentinels do in ten seconds
            for server in self.data:
                if server is not primary and _role(server)[0] == b"master":
                    server.command("REPLICAOF", "127.0.0.1", primary.port)
        super().settle()


class Cluster(WithReplica):
    """Three primaries with a third of the slots each. The first one has a replica; both are what is hurt."""

    @property
    def url(self) -> str:
        addresses = ",".join(server.address for server in [*self._others, *self.data])
        return f"valkey+cluster://{addresses}"

    def _start_all(self) -> None:
        primaries = [self._new(f"primary-{number}", *DURABLE, *CLUSTERED) for number in range(SHARDS)]
        self._others = primaries[1:]
        self.data = [primaries[0]]
        replica = self._new("replica", *DURABLE, *CLUSTERED)
        self.data.append(replica)
        for number, server in enumerate([*primaries, replica]):
            server.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < SHARDS:
                server.command("CLUSTER", "ADDSLOTSRANGE", *_slots_of(number))
            if number:
                primaries[0].command("CLUSTER", "MEET", "127.0.0.1", server.port)
        everyone = [*primaries, replica]
        _wait(lambda: all(_knows(server, len(everyone)) for server in everyone), "the cluster does not meet")
        replica.command("CLUSTER", "REPLICATE", primaries[0].command("CLUSTER", "MYID"))

    @staticmethod
    def stores(user: str) -> bool:
        first, last = _slots_of(0)
        return first <= int(key_slot(b"{" + tag_of(user) + b"}")) <= last

    def _is_settled(self) -> bool:
        primary = self.primary()
        return (
            primary is not None
            and super()._is_settled()
            and all(self._agrees(server, primary) for server in [*self.data, *self._others])
        )

    def _agrees(self, server: ServerProcess, primary: ServerProcess) -> bool:
        if b"cluster_state:ok" not in server.command("CLUSTER", "INFO"):
            return False
        slots = [each for each in server.command("CLUSTER", "SLOTS") if each[0] == 0]
        return bool(slots) and [node[1] for node in slots[0][2:]] == [primary.port, self._replicas()[0].port]

    def _begin_failover(self) -> bool:
        self._replicas()[0].command("CLUSTER", "FAILOVER")
        return True


def _slots_of(shard: int) -> tuple[int, int]:
    return shard * SLOTS // SHARDS, (shard + 1) * SLOTS // SHARDS - 1


def _knows(server: ServerProcess, count: int) -> bool:
    nodes = server.command("CLUSTER", "NODES")
    return len(nodes.splitlines()) == count and b"handshake" not in nodes


def _role(server: ServerProcess) -> Sequence[Any]:
    with suppress(redis.RedisError, OSError):
        role: Sequence[Any] = server.command("ROLE")
        return role
    return (b"unknown",)


def _monitor(port: int) -> Sequence[str]:
    """Return the arguments of a sentinel that monitors the primary on a port."""
    return (
        "--sentinel",
        f"sentinel monitor {SERVICE} 127.0.0.1 {port} {SENTINELS // 2 + 1}",
        f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}",
        f"sentinel failover-timeout {SERVICE} {FAILOVER_MS}",
    )


def _about(sentinel: ServerProcess) -> dict[bytes, bytes]:
    return _pairs(sentinel.command("SENTINEL", "MASTER", SERVICE))


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the fields of a reply in which names and values alternate."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _wait(read: Callable[[], T | None], fault: str) -> T:
    """Return what a function returns once that is true."""
    end = time.monotonic() + SETTLE_S
    while not (found := _now(read)):
        if time.monotonic() > end:
            raise ZcprotoError(f"{fault} within {SETTLE_S:.0f} s")
        time.sleep(_POLL_S)
    return found


def _now(read: Callable[[], T | None]) -> T | None:
    """Return what a function returns; None if a server does not answer."""
    with suppress(redis.RedisError, OSError, KeyError):
        return read()
    return None
