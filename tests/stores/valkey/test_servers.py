"""Which server is asked, and as whom: a cluster whose slots move, sentinels, TLS, users, sockets."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from redis.crc import key_slot

from tests.stores.contract import FIVE, KEEP_ENDED, WALL, digest, ended, rotated, rotation, session
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, free_port, running, until, wait_for
from zcproto.errors import Code, ConfigError
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.base import Change, ChangeKind, Created, LimitReached, Rotated, StoreUnavailable
from zcproto.stores.valkey.link import Target
from zcproto.stores.valkey.records import tag_of
from zcproto.stores.valkey.servers import Cluster, Hooks
from zcproto.stores.valkey.store import ValkeyStore

ALL = Change(ChangeKind.ALL)
PASSWORD = "hunter2/@:%?#"
ESCAPED = "hunter2%2F%40%3A%25%3F%23"


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[tuple[ValkeyStore, list[Change]]]:
    told: list[Change] = []
    store = ValkeyStore(url, **options)
    await store.open(told.append)
    try:
        yield store, told
    finally:
        await store.close()


async def fault_of(url: str, **options: Any) -> str:
    """What is wrong with a configuration."""
    with pytest.raises(ConfigError) as error:
        await ValkeyStore(url, **options).open(lambda change: None)
    return str(error.value)


def slot_of(record: SessionRecord) -> int:
    slot: int = key_slot(b"{" + tag_of(record.user) + b"}")
    return slot


async def is_done(operation: Any) -> bool:
    try:
        await operation()
    except StoreUnavailable:
        return False
    return True


# --- a cluster ---------------------------------------------------------------------------------------------------


class ClusterOf:
    """Primaries that have a third of the slots each, and a node with none."""

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


@pytest.fixture(scope="module", params=PROGRAMS)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterOf]:
    with ExitStack() as stack:
        folder = tmp_path_factory.mktemp("cluster")
        nodes = [
            stack.enter_context(
                running(
                    request.param,
                    folder / str(number),
                    *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
                )
            )
            for number in range(4)
        ]
        for number, node in enumerate(nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            if number < 3:
                first, last = 5462 * number, min(5462 * number + 5461, 16_383)
                node.command("CLUSTER", "ADDSLOTSRANGE", first, last)
        for node in nodes[1:]:
            nodes[0].command("CLUSTER", "MEET", "127.0.0.1", node.port)
        for node in nodes:
            wait_for(
                lambda node=node: (
                    len(node.command("CLUSTER", "SLOTS")) == 3
                    and len(node.command("CLUSTER", "NODES").splitlines()) == 4
                    and b"cluster_state:ok" in node.command("CLUSTER", "INFO")
                ),
                within=20,
            )
        yield ClusterOf(nodes)


@pytest.fixture
def empty_cluster(cluster: ClusterOf) -> ClusterOf:
    for node in cluster.nodes:
        if node.command("ROLE")[0] == b"master":
            node.command("FLUSHALL")
    return cluster


MANY = [session(number, f"user-{number}") for number in range(60)]


async def test_sessions_are_spread_over_a_cluster(empty_cluster: ClusterOf) -> None:
    async with opened(empty_cluster.url) as (store, told), opened(empty_cluster.url) as (other, heard):
        assert await asyncio.gather(*(store.create(record, FIVE) for record in MANY)) == 60 * [Created()]
        assert all(node.command("DBSIZE") > 20 for node in empty_cluster.nodes[:3])
        assert await store.count() == 60
        assert await other.list() == MANY
        for record in MANY:
            assert await other.find(record.token_digest) == record
            assert await other.get(record.id) == record
        await store.touch([(record.id, WALL + 1) for record in MANY])
        assert {record.last_used_at for record in await store.list()} == {WALL + 1}
        ids = [record.id for record in reversed(MANY[:30])]
        assert [gone.id for gone in await other.end(ids, Code.TOKEN_REVOKED, WALL)] == ids
        await until(lambda: {change.id for change in told} == set(ids))
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 30
        await until(lambda: len(heard) == 30)
        assert await store.count() == 0
        removed = 0
        while gone := await store.expire(WALL + KEEP_ENDED, KEEP_ENDED, 40):
            removed += gone
        assert removed == 60
        kept = {key for node in empty_cluster.nodes[:3] for key in node.command("KEYS", "*")}
        assert {key.split(b":")[1] for key in kept} == {b"v", b"n"}


async def test_the_limit_and_a_race_in_a_cluster(empty_cluster: ClusterOf) -> None:
    async with opened(empty_cluster.url) as (store, _), opened(empty_cluster.url) as (other, _):
        racing = [session(number) for number in range(50)]
        results = await asyncio.gather(
            *((store, other)[number % 2].create(record, FIVE) for number, record in enumerate(racing))
        )
        assert (results.count(Created()), results.count(LimitReached())) == (5, 45)
        assert await store.count() == 5  # nothing is left of those that were refused
        found = [await store.find(record.token_digest) for record in racing]
        assert sum(record is not None for record in found) == 5


async def test_a_slot_that_moves_to_another_server(empty_cluster: ClusterOf) -> None:
    record = session()
    slot = slot_of(record)
    source = empty_cluster.owner(slot)
    sink = (source + 1) % 3
    async with opened(empty_cluster.url) as (store, _), opened(empty_cluster.url) as (other, heard):
        await store.create(record, FIVE)
        empty_cluster.begin_move(slot, source, sink)
        assert await store.find(record.token_digest) == record
        empty_cluster.move_keys(slot, source, sink)
        assert await store.get(record.id) == record  # by ASK
        wanted = rotation(record)
        assert isinstance(await store.rotate(wanted), Rotated)
        empty_cluster.end_move(slot, sink)
        await until(lambda: empty_cluster.owner(slot) == sink)
        assert await store.create(session(2), FIVE) == Created()  # by MOVED
        assert await other.list("alice") == [rotated(record, wanted), session(2)]
        heard.clear()
        await store.end([record.id], Code.TOKEN_REVOKED, WALL)
        await until(lambda: Change(ChangeKind.SESSION, record.id) in heard)


async def test_a_slot_that_moves_under_load(empty_cluster: ClusterOf) -> None:
    """Operations may fail while keys move, but what was acknowledged is there, and nothing comes back."""
    record = session()
    slot = slot_of(record)
    source = empty_cluster.owner(slot)
    sink = (source + 1) % 3
    async with opened(empty_cluster.url) as (store, _):
        alive: list[SessionRecord] = []
        dead: list[SessionRecord] = []
        busy = True

        async def churn() -> None:
            number = 0
            unsure: list[
                SessionRecord
            ] = []  # without an answer it may be there all the same, and take a place
            while busy:
                number += 1
                new = session(number)
                try:
                    if unsure:
                        await store.end([unsure[0].id], Code.TOKEN_REVOKED, WALL)
                        unsure.clear()
                    unsure.append(new)
                    if await store.create(new, FIVE) == Created():
                        alive.append(new)
                    unsure.clear()
                    if len(alive) >= 5:
                        await store.end([alive[0].id], Code.TOKEN_REVOKED, WALL)
                        dead.append(alive.pop(0))
                except StoreUnavailable:
                    await asyncio.sleep(0.01)

        task = asyncio.get_running_loop().create_task(churn())
        await until(lambda: len(dead) > 20)
        empty_cluster.begin_move(slot, source, sink)
        await asyncio.to_thread(empty_cluster.move_keys, slot, source, sink)
        empty_cluster.end_move(slot, sink)
        so_far = len(dead)
        await until(lambda: len(dead) > so_far + 20)
        busy = False
        await task
        for gone in dead:
            assert not isinstance(await store.get(gone.id), SessionRecord)
        for kept in alive:
            assert await store.get(kept.id) == kept


async def test_a_new_server_with_slots_is_listened_to(empty_cluster: ClusterOf) -> None:
    """One that only has sessions that are known: nobody asks it anything, but its news count."""
    record = session()
    slot = slot_of(record)
    source = empty_cluster.owner(slot)
    async with opened(empty_cluster.url) as (store, told), opened(empty_cluster.url) as (other, _):
        await store.create(record, FIVE)
        empty_cluster.begin_move(slot, source, 3)
        empty_cluster.move_keys(slot, source, 3)
        empty_cluster.end_move(slot, 3)
        await until(lambda: told == [ALL])  # it has not listened to the new one until now
        await other.end([record.id], Code.TOKEN_REVOKED, WALL)
        await until(lambda: told == [ALL, Change(ChangeKind.SESSION, record.id)])
        empty_cluster.begin_move(slot, 3, source)
        empty_cluster.move_keys(slot, 3, source)
        empty_cluster.end_move(slot, source)
        await until(lambda: empty_cluster.owner(slot) == source)

        async def is_ended() -> bool:
            try:
                return isinstance(await store.get(record.id), EndedRecord)
            except StoreUnavailable:  # the news of the keys that went away ends this link once more
                return False

        await until(is_ended)


async def test_a_primary_that_is_lost_and_a_replica_that_takes_over(empty_cluster: ClusterOf) -> None:
    record = session()
    primary = empty_cluster.owner(slot_of(record))
    mine = [each for each in MANY if empty_cluster.owner(slot_of(each)) == primary]
    replica = empty_cluster.nodes[3]
    replica.command("CLUSTER", "REPLICATE", empty_cluster.ids[primary])
    await until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
    async with opened(empty_cluster.url) as (store, told):
        await asyncio.gather(*(store.create(each, FIVE) for each in MANY))
        await until(lambda: _offset(replica) >= _offset(empty_cluster.nodes[primary]))
        empty_cluster.nodes[primary].stop()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        assert not await is_done(lambda: store.list(mine[0].user))
        assert loop.time() - begin < 0.3
        replica.command("CLUSTER", "FAILOVER", "TAKEOVER")
        await until(lambda: is_done(lambda: store.list(mine[0].user)))
        assert ALL in told
        await until(lambda: is_done(store.count))
        assert await store.list() == MANY
        assert await store.end([mine[0].id], Code.TOKEN_REVOKED, WALL) == [ended(mine[0])]
        empty_cluster.nodes[primary].go_on()


def _offset(node: ServerProcess) -> int:
    text = node.command("INFO", "replication").decode()
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines["slave_repl_offset" if lines["role"] == "slave" else "master_repl_offset"])


class Scripted:
    """A server of a cluster that says one thing after another."""

    def __init__(self, *said: object) -> None:
        self.said = list(said)
        self.heard: list[object] = []

    async def link(self) -> Scripted:
        return self

    async def call(self, *command: object) -> object:
        self.heard.append(command[0])
        await asyncio.sleep(0)
        said = self.said.pop(0) if len(self.said) > 1 else self.said[0]
        if isinstance(said, Exception):
            raise said
        return said

    def send(self, *command: object) -> asyncio.Future[object]:
        self.heard.append(command[0])
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        future.set_result(b"OK")
        return future


MOVING = redis.ResponseError("Script attempted to access a non local key in a cluster node")


@pytest.mark.parametrize(
    "said",
    [
        [redis.exceptions.TryAgainError("later")],
        [redis.exceptions.ClusterDownError("down"), redis.exceptions.ClusterDownError("down")],
        [MOVING],
        [redis.exceptions.AskError("1 :7001")],
        [redis.exceptions.MovedError("1 other:7001")],
    ],
    ids=["try again", "down", "moving", "ask", "moved"],
)
async def test_a_cluster_that_cannot_do_it_yet_is_asked_again(
    said: list[Exception], monkeypatch: Any
) -> None:
    cluster = Cluster(
        (("seed", 7000),),
        lambda address: Target(*address),
        Hooks(
            timeout=0.05,
            prepare=lambda link, was_flushed: asyncio.sleep(0),
            on_keys_changed=lambda keys: None,
            on_reconnected=lambda: None,
        ),
    )
    first, second = Scripted(*said, b"done"), Scripted(redis.exceptions.TryAgainError("later"), b"done")
    lines = {("seed", 7000): first, ("seed", 7001): second, ("other", 7001): second}
    monkeypatch.setattr(cluster, "_connection", lines.__getitem__)
    monkeypatch.setattr(cluster, "_refresh", lambda: None)
    cluster._slots = 16_384 * [("seed", 7000)]
    assert await cluster.call(b"key", "GET", b"key") == b"done"
    if isinstance(said[0], redis.exceptions.AskError) and not isinstance(
        said[0], redis.exceptions.MovedError
    ):
        assert second.heard == ["ASKING", "GET"]
    first.said = [said[0]]
    second.said = [redis.exceptions.TryAgainError("later")]
    with pytest.raises(StoreUnavailable, match="moving its keys"):
        await cluster.call(b"key", "GET", b"key")
    for line in (first, second):
        line.said = [redis.ResponseError("ERR no such thing")]
    with pytest.raises(redis.ResponseError, match="no such thing"):
        await cluster.call(b"key", "GET", b"key")
    cluster._slots = 16_384 * [None]
    with pytest.raises(StoreUnavailable, match="no server for some"):
        await cluster.call(b"key", "GET", b"key")
    await cluster.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await cluster.call(b"key", "GET", b"key")


async def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreUnavailable, match="127"):
        await ValkeyStore(f"redis+cluster://127.0.0.1:{free_port()}").open(lambda change: None)
    with running(PROGRAMS[0], tmp_path / "server", "--cluster-enabled", "yes") as server:
        store = ValkeyStore(f"redis+cluster://{server.address}")
        with pytest.raises(StoreUnavailable, match="no slots yet"):
            await store.open(lambda change: None)
        server.stop()
        monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", 0.3)
        with pytest.raises(StoreUnavailable, match="do not answer"):
            await store.open(lambda change: None)


async def test_closing_while_a_cluster_is_out(empty_cluster: ClusterOf) -> None:
    async with opened(empty_cluster.url) as (store, _):
        await asyncio.gather(*(store.create(each, FIVE) for each in MANY))
        for node in empty_cluster.nodes:
            node.stop()
        asked = [asyncio.ensure_future(store.list(each.user)) for each in MANY]
        await asyncio.sleep(0.05)
        await store.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(result) for result in results} == {StoreUnavailable}
        for node in empty_cluster.nodes:
            node.go_on()


# --- sentinels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
async def test_sentinels_say_where_the_primary_is(program: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        first = stack.enter_context(running(program, tmp_path / "first"))
        second = stack.enter_context(
            running(program, tmp_path / "second", "--replicaof", "127.0.0.1", str(first.port))
        )
        wait_for(lambda: b"master_link_status:up" in second.command("INFO", "replication"), within=10)
        sentinel = stack.enter_context(
            running(
                program,
                tmp_path / "sentinel",
                "--sentinel",
                f"sentinel monitor sessions 127.0.0.1 {first.port} 1",
                "sentinel down-after-milliseconds sessions 300",
                "sentinel failover-timeout sessions 3000",
            )
        )
        nobody = free_port()
        url = f"redis+sentinel://127.0.0.1:{nobody},{sentinel.address}/sessions"
        with pytest.raises(StoreUnavailable, match="does not monitor a service of this name"):
            await ValkeyStore(f"redis+sentinel://{sentinel.address}/others").open(lambda change: None)
        wait_for(lambda: _has_replica(sentinel), within=15)
        async with opened(url) as (store, told):
            await store.create(session(), FIVE)
            await until(lambda: _offset(second) >= _offset(first))
            first.kill()
            assert not await is_done(store.ping)
            await until(lambda: is_done(store.ping), within=20)
            assert second.command("ROLE")[0] == b"master"
            assert await store.find(session().token_digest) == session()
            assert await store.create(session(2), FIVE) == Created()
            assert second.command("EXISTS", b"zcp:t:" + digest("token 2")) == 1
            assert ALL in told


def _has_replica(sentinel: ServerProcess) -> bool:
    replicas = sentinel.command("SENTINEL", "REPLICAS", "sessions")
    return len(replicas) == 1 and b"ok" in replicas[0]


# --- TLS ---------------------------------------------------------------------------------------------------------


class Certificates:
    def __init__(self, folder: Path) -> None:
        self.ca = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.ca_file = folder / "ca.pem"
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.server = self._issue(folder / "server", "127.0.0.1")
        self.client = self._issue(folder / "client", "zcproto.example")

    def _issue(self, path: Path, name: str) -> tuple[Path, Path]:
        issued = self.ca.issue_cert(name, key_type=trustme.KeyType.ECDSA)
        certificate, key = path.with_suffix(".pem"), path.with_suffix(".key")
        issued.cert_chain_pems[0].write_to_path(certificate)
        issued.private_key_pem.write_to_path(key)
        return certificate, key


@pytest.fixture(params=PROGRAMS)
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServerProcess, Certificates]]:
    certificates, port = Certificates(tmp_path), free_port()
    options = [
        *("--port", "0", "--tls-port", str(port), "--tls-ca-cert-file", str(certificates.ca_file)),
        *("--tls-cert-file", str(certificates.server[0]), "--tls-key-file", str(certificates.server[1])),
    ]
    with running(request.param, tmp_path / "server", *options, port=port) as server:
        yield server, certificates


async def test_tls(tls: tuple[ServerProcess, Certificates], monkeypatch: pytest.MonkeyPatch) -> None:
    server, certificates = tls
    url = f"valkeys://{server.address}"
    certificate_file, key_file = certificates.client
    files: dict[str, Any] = {"certificate_file": certificate_file, "key_file": key_file}
    async with opened(url, ca_file=certificates.ca_file, **files) as (store, _):
        await store.create(session(), FIVE)
        assert await store.find(session().token_digest) == session()
    assert "is not trusted" in await fault_of(url, **files)
    # With a file of authorities, no others are trusted, whatever the system says.
    monkeypatch.setenv(ssl.get_default_verify_paths().openssl_cafile_env, str(certificates.ca_file))
    other = certificates.ca_file.with_name("other.pem")
    trustme.CA().cert_pem.write_to_path(other)
    assert "is not trusted" in await fault_of(url, ca_file=other, **files)
    with pytest.raises(StoreUnavailable):  # it wants to know its clients
        await ValkeyStore(url, ca_file=certificates.ca_file).open(lambda change: None)
    assert "not trusted" in await fault_of(
        url.replace("127.0.0.1", "localhost"), ca_file=certificates.ca_file, **files
    )


async def test_a_server_without_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", 0.3)
    with running(PROGRAMS[0], tmp_path / "server") as server, pytest.raises(StoreUnavailable):
        await ValkeyStore(f"rediss://{server.address}").open(lambda change: None)


@pytest.mark.parametrize(
    ("url", "options", "said"),
    [
        ("rediss://127.0.0.1", {"ca_file": "missing"}, "store.ca_file"),
        ("rediss://127.0.0.1", {"ca_file": "empty"}, "store.ca_file"),
        ("rediss://127.0.0.1", {"certificate_file": "empty", "key_file": "empty"}, "store.ca_file"),
        ("redis://127.0.0.1", {"ca_file": "empty"}, "rediss://"),
        ("redis://127.0.0.1", {"certificate_file": "empty"}, "rediss://"),
    ],
)
def test_files_that_cannot_be_used(url: str, options: dict[str, str], said: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match=said):
        ValkeyStore(url, **{name: tmp_path / file for name, file in options.items()})


# --- users -------------------------------------------------------------------------------------------------------

RULES = (
    *("on", f">{PASSWORD}", "~zcp:*", "&*", "-@all", "+@read", "+@write", "+@scripting", "+@connection"),
    *("-@dangerous", "+info", "+role"),
)
"""What a user needs at most."""


@pytest.fixture(params=PROGRAMS)
def guarded(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    with running(request.param, tmp_path / "server") as server:
        server.command("ACL", "SETUSER", "sessions", *RULES)
        server.command(
            "ACL",
            "SETUSER",
            "reader",
            "on",
            f">{PASSWORD}",
            "~*",
            "-@all",
            "+@connection",
            "+@read",
            "-client",
        )
        yield server


async def test_a_user_with_a_password(guarded: ServerProcess) -> None:
    url = f"redis://sessions:{ESCAPED}@{guarded.address}/0"
    async with opened(url) as (store, _), opened(url) as (other, told):
        await store.create(session(), FIVE)
        await other.find(session().token_digest)
        await store.end_all(Code.TOKEN_REVOKED, WALL)
        await until(lambda: told == [Change(ChangeKind.SESSION, session().id)])
        await store.ping()
        assert await store.count() == 0
        await store.expire(WALL, 0, 10)
        (said,) = await store.examine()
        assert "does not show" in said
        assert PASSWORD not in repr(store)
        assert "sessions@127.0.0.1" in repr(store)
    async with opened(f"redis://sessions@{guarded.address}", password=PASSWORD) as (store, _):
        await store.ping()


@pytest.mark.parametrize("password", ["wrong", "hunter3%2F%40"])
async def test_a_wrong_password_is_said_and_never_shown(guarded: ServerProcess, password: str) -> None:
    fault = await fault_of(f"redis://sessions:{password}@{guarded.address}")
    assert "refuses this user or password" in fault
    assert guarded.address in fault
    assert password not in fault
    assert "hunter" not in fault


async def test_a_user_who_may_not(guarded: ServerProcess) -> None:
    fault = await fault_of(f"redis://reader:{ESCAPED}@{guarded.address}")
    assert "does not permit this user" in fault
    assert PASSWORD not in fault


async def test_a_password_that_was_changed(guarded: ServerProcess) -> None:
    async with opened(f"redis://sessions:{ESCAPED}@{guarded.address}") as (store, told):
        guarded.command("ACL", "SETUSER", "sessions", "resetpass", ">another")  # which ends its connections
        guarded.command("CLIENT", "KILL", "USER", "sessions")
        await until(lambda: _cannot_log_in(store))
        guarded.command("ACL", "SETUSER", "sessions", f">{PASSWORD}")
        await until(lambda: is_done(store.ping))
        assert told == [ALL]


async def _cannot_log_in(store: ValkeyStore) -> bool:
    reason = ""
    try:
        await store.ping()
    except StoreUnavailable as error:
        reason = str(error)
    assert PASSWORD not in reason
    return "refuses this user or password" in reason


async def test_nobody_where_a_user_is_asked_for(tmp_path: Path) -> None:
    with running(PROGRAMS[0], tmp_path / "server", "--requirepass", PASSWORD) as server:
        assert "refuses this user or password" in await fault_of(server.url)
        async with opened(f"valkey://:{ESCAPED}@{server.address}") as (store, _):
            await store.ping()


# --- other ways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS)
async def test_a_unix_socket_and_a_database(program: str, tmp_path: Path) -> None:
    path = tmp_path / "a socket"
    with running(program, tmp_path / "server", "--unixsocket", str(path)) as server:
        async with opened(f"unix://{str(path).replace(' ', '%20')}?db=3") as (store, _):
            await store.create(session(), FIVE)
            assert await store.count() == 1
            assert "a socket/3" in repr(store)
        async with opened(f"{server.url}/3") as (store, _):
            assert await store.list() == [session()]
        async with opened(server.url) as (store, _):
            assert await store.list() == []
        assert "cannot be used" in await fault_of(f"{server.url}/9999")


async def test_a_wrong_kind_of_server(cluster: ClusterOf, tmp_path: Path) -> None:
    assert "redis+cluster://" in await fault_of(f"redis://{cluster.nodes[0].address}")
    with running(PROGRAMS[0], tmp_path / "server") as server:
        assert "does not belong to a cluster" in await fault_of(f"redis+cluster://{server.address}")
        with pytest.raises((ConfigError, StoreUnavailable)):
            await ValkeyStore(f"redis+sentinel://{server.address}/x").open(lambda change: None)


async def test_something_else_that_listens() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as other:
        port = other.sockets[0].getsockname()[1]
        with pytest.raises(StoreUnavailable):
            await ValkeyStore(f"redis://127.0.0.1:{port}").open(lambda change: None)


async def test_how_the_server_is_set_up(tmp_path: Path) -> None:
    with running(PROGRAMS[0], tmp_path / "server") as server:
        async with opened(server.url) as (store, _):
            assert [text.split()[0] for text in await store.examine()] == ["appendonly"]
            server.command("CONFIG", "SET", "appendonly", "yes")
            server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
            assert [text.split()[0] for text in await store.examine()] == ["appendfsync", "maxmemory-policy"]
            server.command("CONFIG", "SET", "appendfsync", "always")
            server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
            assert await store.examine() == []
