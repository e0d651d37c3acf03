"""A cluster: slots that move, failover, and outages of its servers."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.crc import key_slot

from tests.limits import TIMEOUT
from tests.stores.contract import (
    DAY,
    FIVE,
    KEEP,
    KEEP_ENDED,
    LEASE,
    WALL,
    digest,
    ended,
    rotated,
    rotation,
    session,
)
from tests.stores.valkey.helpers import ALL, ClusterOf, _offset, impatient, is_done, opened
from tests.stores.valkey.server_process import PROGRAMS, ServerProcess, free_port, running, until
from zcproto.errors import Code
from zcproto.sessions.health import StoreHealth
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.stores.answers import AnswerLimits
from zcproto.stores.base import Change, ChangeKind, Claim, ClaimState, Created, LimitReached, StoreUnavailable
from zcproto.stores.operations import CircuitBreaker
from zcproto.stores.valkey import store as module
from zcproto.stores.valkey.link import Target
from zcproto.stores.valkey.scripts import tag_of
from zcproto.stores.valkey.servers import Cluster, Hooks
from zcproto.stores.valkey.store import ValkeyStore


def slot_of(record: SessionRecord) -> int:
    slot: int = key_slot(b"{" + tag_of(record.user) + b"}")
    return slot


@pytest.fixture
def empty_cluster(cluster: ClusterOf) -> ClusterOf:
    for node in cluster.nodes:
        if node.command("ROLE")[0] == b"master":
            node.command("FLUSHALL")
    return cluster


MANY = [session(number, f"user-{number}") for number in range(60)]


async def test_sessions_are_distributed_over_a_cluster(empty_cluster: ClusterOf) -> None:
    async with opened(empty_cluster.url) as (store, changes), opened(empty_cluster.url) as (other, heard):
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
        await until(lambda: {change.id for change in changes} == set(ids))
        assert await store.end_all(Code.TOKEN_REVOKED, WALL) == 30
        await until(lambda: len(heard) == 30)
        assert await store.count() == 0
        removed = 0
        while gone := await store.expire(WALL + KEEP_ENDED, KEEP_ENDED, 40):
            removed += gone
        assert removed == 60
        kept = {key for node in empty_cluster.nodes[:3] for key in node.command("KEYS", "*")}
        assert {key.split(b":")[1] for key in kept} == {b"v", b"n"}


async def test_limit_applies_to_concurrent_openings_in_a_cluster(empty_cluster: ClusterOf) -> None:
    url = empty_cluster.url
    async with opened(url) as (store, _), opened(url) as (other, _):
        racing = [session(number) for number in range(50)]
        results = await asyncio.gather(
            *((store, other)[number % 2].create(record, FIVE) for number, record in enumerate(racing))
        )
        assert (results.count(Created()), results.count(LimitReached())) == (5, 45)
        assert await store.count() == 5  # refused openings leave nothing
        found = [await store.find(record.token_digest) for record in racing]
        assert sum(record is not None for record in found) == 5


async def test_refreshed_token_leads_to_its_session_as_long_as_it_lasts(empty_cluster: ClusterOf) -> None:
    wanted = rotation(session())
    async with opened(empty_cluster.url) as (store, _):
        await store.create(session(), FIVE)
        await store.rotate(wanted)
    key = b"zcp:t:" + wanted.token_digest
    assert empty_cluster.nodes[empty_cluster.owner(key_slot(key))].command("PTTL", key) > 29 * DAY


async def test_lowered_limit_of_answers_applies_at_once_in_a_cluster(empty_cluster: ClusterOf) -> None:
    body = digest("body")
    async with opened(empty_cluster.url) as (store, _):
        for number in range(80):
            await store.claim("alice", f"key {number}", body, LEASE)
            await store.keep_answer("alice", f"key {number}", b"answer", KEEP)
    async with opened(empty_cluster.url, answers=AnswerLimits(count=16)) as (store, _):
        assert await store.claim("alice", "late", body, LEASE) == Claim(ClaimState.NEW)


async def test_slot_moved_to_another_server(empty_cluster: ClusterOf) -> None:
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
        assert isinstance(await store.rotate(wanted), SessionRecord)
        empty_cluster.end_move(slot, sink)
        await until(lambda: empty_cluster.owner(slot) == sink)
        assert await store.create(session(2), FIVE) == Created()  # by MOVED
        assert await other.list("alice") == [rotated(record, wanted), session(2)]
        heard.clear()
        await store.end([record.id], Code.TOKEN_REVOKED, WALL)
        await until(lambda: Change(ChangeKind.SESSION, record.id) in heard)


def move_one(cluster: ClusterOf, kind: bytes, slot: int, source: int, sink: int) -> None:
    """Move one key of a slot to another server, as a client that moves all of them does in turn."""
    keys = cluster.nodes[source].command("CLUSTER", "GETKEYSINSLOT", slot, 100)
    key = next(key for key in keys if key.startswith(b"zcp:" + kind + b":"))
    port = cluster.nodes[sink].port
    cluster.nodes[source].command("MIGRATE", "127.0.0.1", port, key, 0, int(TIMEOUT * 1000))


def scripts_that_wait(node: ServerProcess) -> bool:
    return b"cmdstat_cluster|countkeysinslot:" in node.command("INFO", "commandstats")


@pytest.mark.parametrize("first", [b"u", b"s", b"q"])
async def test_operation_waits_until_all_keys_of_its_user_are_moved(
    empty_cluster: ClusterOf, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    """The new server would run a script as if the keys that it has not got yet did not exist."""
    monkeypatch.setattr(module, "MOVING_LIMIT_S", TIMEOUT)
    records = [session(number) for number in range(5)]
    slot = slot_of(records[0])
    source = empty_cluster.owner(slot)
    sink, node = (source + 1) % 3, empty_cluster.nodes[source]
    async with opened(empty_cluster.url) as (store, _):
        for record in records:
            assert await store.create(record, FIVE) == Created()
        assert (await store.claim("alice", "k", digest("body"), LEASE)).state is ClaimState.NEW
        node.command("CONFIG", "RESETSTAT")
        empty_cluster.begin_move(slot, source, sink)
        move_one(empty_cluster, first, slot, source, sink)
        asked = asyncio.gather(
            store.list("alice"),
            store.create(session(5), FIVE),
            store.claim("alice", "k", digest("body"), LEASE),
        )
        if first == b"u":
            await until(lambda: asked.done() or scripts_that_wait(node))
        await asyncio.to_thread(empty_cluster.move_keys, slot, source, sink)
        listed, created, claim = await asked  # by ASK
        assert (listed, created) == (records, LimitReached())
        assert (claim.state, claim.is_own) == (ClaimState.RUNNING, True)
        empty_cluster.end_move(slot, sink)
        assert await store.list("alice") == records


async def test_slot_that_is_moved_begins_no_outage(
    empty_cluster: ClusterOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOVING_LIMIT_S", 0.0)
    record = session()
    slot = slot_of(record)
    source = empty_cluster.owner(slot)
    sink = (source + 1) % 3
    async with opened(empty_cluster.url) as (store, _):
        health = StoreHealth(grace_s=0, timeout_s=0.0, random=lambda: 0.5, on_alert=lambda alert: None)
        breaker = CircuitBreaker(store, health, 0.0, asyncio.get_running_loop().time)
        assert await breaker.call(store.create(record, FIVE)) == Created()
        empty_cluster.begin_move(slot, source, sink)
        move_one(empty_cluster, b"s", slot, source, sink)
        with pytest.raises(StoreUnavailable, match="moving its keys"):
            await breaker.call(store.list("alice"))
        assert health.is_healthy
        empty_cluster.move_keys(slot, source, sink)
        empty_cluster.end_move(slot, sink)
        assert await breaker.call(store.list("alice")) == [record]


async def test_logins_succeed_while_slots_are_moved(
    empty_cluster: ClusterOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOVING_LIMIT_S", TIMEOUT)
    async with opened(empty_cluster.url) as (store, _):
        await asyncio.gather(*(store.create(record, FIVE) for record in MANY))
        moved = sorted({slot_of(record) for record in MANY})

        def move() -> None:
            for slot in moved:
                source = empty_cluster.owner(slot)
                sink = (source + 1) % 3
                empty_cluster.begin_move(slot, source, sink)
                for kind in (b"u", b"l"):
                    move_one(empty_cluster, kind, slot, source, sink)
                empty_cluster.move_keys(slot, source, sink)
                empty_cluster.end_move(slot, sink)

        moving = asyncio.create_task(asyncio.to_thread(move))
        opened_sessions = list(MANY)
        while not moving.done() or len(opened_sessions) < 2 * len(MANY):
            number = len(opened_sessions)
            record = session(number, f"user-{number % len(MANY)}")
            if number < 5 * len(MANY):
                assert await store.create(record, FIVE) == Created()
                opened_sessions.append(record)
            else:
                assert len(await store.list(record.user)) == 5
        await moving
        for user in (record.user for record in MANY):
            expected = [record for record in opened_sessions if record.user == user]
            assert await store.list(user) == expected


async def test_slot_moved_under_load(empty_cluster: ClusterOf) -> None:
    """Operations may fail while keys move, but no acknowledged change is lost and no ended session revived."""
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
            unsure: list[SessionRecord] = []  # it may have been created without a reply, and counts
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


async def test_changes_of_a_new_server_are_reported(empty_cluster: ClusterOf) -> None:
    """Its sessions are cached, so it gets no commands, but its changes are reported."""
    record = session()
    slot = slot_of(record)
    source = empty_cluster.owner(slot)
    async with opened(empty_cluster.url) as (store, changes), opened(empty_cluster.url) as (other, _):
        await store.create(record, FIVE)
        empty_cluster.begin_move(slot, source, 3)
        empty_cluster.move_keys(slot, source, 3)
        empty_cluster.end_move(slot, 3)
        await until(lambda: changes == [ALL])  # it was not connected to the new one before
        await other.end([record.id], Code.TOKEN_REVOKED, WALL)
        await until(lambda: changes == [ALL, Change(ChangeKind.SESSION, record.id)])
        empty_cluster.nodes[3].command("CONFIG", "RESETSTAT")
        await until(lambda: is_done(store.ping))
        assert b"cmdstat_ping:" in empty_cluster.nodes[3].command("INFO", "commandstats")
        empty_cluster.begin_move(slot, 3, source)
        empty_cluster.move_keys(slot, 3, source)
        empty_cluster.end_move(slot, source)
        await until(lambda: empty_cluster.owner(slot) == source)

        async def is_ended() -> bool:
            try:
                return isinstance(await store.get(record.id), EndedRecord)
            except StoreUnavailable:  # the invalidation of the moved keys drops this connection again
                return False

        await until(is_ended)


async def test_failover_to_a_replica_in_a_cluster(empty_cluster: ClusterOf) -> None:
    record = session()
    primary = empty_cluster.owner(slot_of(record))
    mine = [each for each in MANY if empty_cluster.owner(slot_of(each)) == primary]
    replica = empty_cluster.nodes[3]
    replica.command("CLUSTER", "REPLICATE", empty_cluster.ids[primary])
    await until(lambda: b"master_link_status:up" in replica.command("INFO", "replication"))
    async with opened(empty_cluster.url) as (store, changes):
        await asyncio.gather(*(store.create(each, FIVE) for each in MANY))
        await until(lambda: _offset(replica) >= _offset(empty_cluster.nodes[primary]))
        empty_cluster.nodes[primary].stop()
        with impatient(store, 1.0):
            assert not await is_done(lambda: store.list(mine[0].user))
            replica.command("CLUSTER", "FAILOVER", "TAKEOVER")
            await until(lambda: is_done(lambda: store.list(mine[0].user)))
        assert ALL in changes
        await until(lambda: is_done(store.count))
        assert await store.list() == MANY
        assert await store.end([mine[0].id], Code.TOKEN_REVOKED, WALL) == [ended(mine[0])]
        empty_cluster.nodes[primary].go_on()


class ReplicaLink:
    """A connection to a server of a cluster that became a replica."""

    lost = ""
    is_silent = False

    async def call(self, *command: object) -> dict[bytes, bytes]:
        return {b"version": b"8.1.1", b"mode": b"cluster", b"role": b"replica"}

    def lose(self, reason: str) -> None:
        self.lost = reason


async def test_server_of_a_cluster_that_became_a_replica_is_dropped_by_the_check(
    scripted_cluster: Cluster,
) -> None:
    link: Any = ReplicaLink()
    scripted_cluster._connection(("seed", 7000))._link = link
    with pytest.raises(StoreUnavailable, match="is a replica"):
        await scripted_cluster.confirm()
    assert link.lost


async def test_closed_cluster_makes_no_connections(
    scripted_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = ("seed", 7000)
    slots = asyncio.sleep(0, (16_384 * [address], {address}))
    monkeypatch.setattr(scripted_cluster, "_query", lambda: slots)
    scripted_cluster._connection(address)
    await scripted_cluster.close()
    scripted_cluster.lose("an operation found a replica")
    assert scripted_cluster._refreshing is not None
    await asyncio.wait({scripted_cluster._refreshing})
    assert scripted_cluster._connections == {}


async def test_server_that_was_never_reached_is_not_dropped(scripted_cluster: Cluster) -> None:
    connection = scripted_cluster._connection(("seed", 7000))
    connection.lose("all its keys were deleted")
    assert connection.up is None


async def test_failed_attempt_that_no_caller_waits_for_is_silent(scripted_cluster: Cluster) -> None:
    connection = scripted_cluster._connection(("127.0.0.1", free_port()))
    calling = asyncio.create_task(connection.link())
    await asyncio.sleep(0)
    calling.cancel()
    await until(lambda: connection._connecting is None)
    del calling
    gc.collect()  # it would report the exception of a task that no caller has retrieved


class Scripted:
    """A server of a cluster with a script of replies."""

    def __init__(self, *replies: object) -> None:
        self.replies = list(replies)
        self.received: list[object] = []

    async def link(self) -> Scripted:
        return self

    async def call(self, *command: object) -> object:
        self.received.append(command[0])
        await asyncio.sleep(0)
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        if isinstance(reply, Exception):
            raise reply
        return reply

    def send(self, *command: object) -> asyncio.Future[object]:
        self.received.append(command[0])
        future: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        future.set_result(b"OK")
        return future


MOVING = redis.ResponseError("Script attempted to access a non local key in a cluster node")


@pytest.fixture
def scripted_cluster() -> Cluster:
    return Cluster(
        (("seed", 7000),),
        lambda address: Target(*address),
        Hooks(
            timeout=0.05,
            prepare=lambda link, was_flushed: asyncio.sleep(0),
            on_keys_changed=lambda keys: None,
            on_lost=lambda: None,
            on_reconnected=lambda: None,
        ),
    )


@pytest.mark.parametrize(
    "replies",
    [
        [redis.exceptions.TryAgainError("later")],
        [redis.exceptions.ClusterDownError("down"), redis.exceptions.ClusterDownError("down")],
        [MOVING],
        [redis.exceptions.AskError("1 :7001")],
        [redis.exceptions.MovedError("1 other:7001")],
    ],
    ids=["try again", "down", "moving", "ask", "moved"],
)
async def test_cluster_redirects_and_temporary_errors_are_retried(
    replies: list[Exception], scripted_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = scripted_cluster
    first, second = Scripted(*replies, b"done"), Scripted(redis.exceptions.TryAgainError("later"), b"done")
    lines = {("seed", 7000): first, ("seed", 7001): second, ("other", 7001): second}
    monkeypatch.setattr(cluster, "_connection", lines.__getitem__)
    monkeypatch.setattr(cluster, "_refresh", lambda: None)
    cluster._slots = 16_384 * [("seed", 7000)]
    assert await cluster.call(b"key", "GET", b"key") == b"done"
    if isinstance(replies[0], redis.exceptions.AskError) and not isinstance(
        replies[0], redis.exceptions.MovedError
    ):
        assert second.received == ["ASKING", "GET"]
    first.replies = [replies[0]]
    second.replies = [redis.exceptions.TryAgainError("later")]
    with pytest.raises(StoreUnavailable, match=r"moving its keys|is down: down"):
        await cluster.call(b"key", "GET", b"key")
    for line in (first, second):
        line.replies = [redis.ResponseError("ERR no such thing")]
    with pytest.raises(redis.ResponseError, match="no such thing"):
        await cluster.call(b"key", "GET", b"key")
    cluster._slots = 16_384 * [None]
    with pytest.raises(StoreUnavailable, match="no server for some"):
        await cluster.call(b"key", "GET", b"key")
    await cluster.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await cluster.call(b"key", "GET", b"key")


async def test_script_is_redirected_when_no_key_of_its_slot_is_left(
    scripted_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, moved = redis.exceptions.AskError("1 :7001"), redis.exceptions.MovedError("1 :7001")
    first, second = Scripted(ask, 3, ask, 0, moved), Scripted(b"done")
    lines = {("seed", 7000): first, ("seed", 7001): second}
    monkeypatch.setattr(scripted_cluster, "_connection", lines.__getitem__)
    monkeypatch.setattr(scripted_cluster, "_refresh", lambda: None)
    scripted_cluster._slots = 16_384 * [("seed", 7000)]
    assert await scripted_cluster.call(b"key", "EVALSHA", b"sha", 1, b"key") == b"done"
    assert first.received == 2 * ["EVALSHA", "CLUSTER"]
    assert second.received == ["ASKING", "EVALSHA"]
    assert await scripted_cluster.call(b"key", "EVALSHA", b"sha", 1, b"key") == b"done"
    assert scripted_cluster._slots.count(("seed", 7001)) == 1


async def test_server_that_gets_its_first_slot_stays_connected(
    scripted_cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed, new = ("seed", 7000), ("seed", 7001)
    for address in (seed, new):
        scripted_cluster._connection(address)
    monkeypatch.setattr(scripted_cluster, "_connection", {new: Scripted(b"done")}.__getitem__)
    assert await scripted_cluster._ask(new, ("GET", b"key")) == b"done"
    monkeypatch.undo()
    assert scripted_cluster._use((16_384 * [seed], {seed})) == []
    scripted_cluster._asked[new] = 0.0
    unneeded = scripted_cluster._connections[new]
    assert scripted_cluster._use((16_384 * [seed], {seed})) == [unneeded]
    await scripted_cluster.close()


async def test_open_fails_without_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_close_during_an_outage_of_the_cluster(empty_cluster: ClusterOf) -> None:
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
