"""A server that is killed, hung, slow, full, a replica or cut off: operations fail in time, then recover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.proxy import FROM_SERVER, TO_SERVER, Proxy
from tests.stores.contract import FIVE, WALL, ended, session
from tests.stores.valkey.helpers import impatient
from tests.stores.valkey.server_process import VALKEY_FIRST, ServerProcess, running, until
from zcproto.errors import Code, ConfigError, ResourceExhausted
from zcproto.sessions.record import UserLimit
from zcproto.stores.base import Change, ChangeKind, Created, StoreUnavailable
from zcproto.stores.valkey.servers import ValkeyConnection
from zcproto.stores.valkey.store import ValkeyStore

SOON = 0.2
"""The timeout of operations while the server does not answer."""

ALL = Change(ChangeKind.ALL)
EMPTIED = Change(ChangeKind.EMPTIED)
FLUSHED = Change(ChangeKind.FLUSHED)


@pytest.fixture(params=VALKEY_FIRST)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with running(request.param, tmp_path / "server", *options) as process:
        yield process


@pytest.fixture
async def proxy(server: ServerProcess) -> AsyncIterator[Proxy]:
    async with Proxy(server.port) as proxy:
        yield proxy


class Open:
    """An open store, the changes reported to it, and how often its connection was reported as lost."""

    def __init__(self, url: str, **options: Any) -> None:
        self.store = ValkeyStore(url, **options)
        self.changes: list[Change] = []
        self.lost = 0

    async def __aenter__(self) -> Open:
        await self.store.open(self.handle)
        return self

    def handle(self, change: Change) -> None:
        if change.kind is ChangeKind.LOST:
            self.lost += 1
        else:
            self.changes.append(change)

    async def __aexit__(self, *error: object) -> None:
        await self.store.close()

    @property
    def awaits_reply(self) -> bool:
        assert isinstance(self.store._servers, ValkeyConnection)
        link = self.store._servers.up
        return link is None or bool(link._waiting)


def every_operation(store: ValkeyStore) -> dict[str, Callable[[], Awaitable[Any]]]:
    record = session(9, "carol")
    return {
        "ping": store.ping,
        "create": lambda: store.create(record, FIVE),
        "find": lambda: store.find(record.token_digest),
        "get": lambda: store.get(record.id),
        "touch": lambda: store.touch([(record.id, WALL)]),
        "end": lambda: store.end([record.id], Code.TOKEN_REVOKED, WALL),
        "end_user": lambda: store.end_user("carol", Code.TOKEN_REVOKED, WALL),
        "end_all": lambda: store.end_all(Code.TOKEN_REVOKED, WALL),
        "list": store.list,
        "list of a user": lambda: store.list("carol"),
        "count": store.count,
        "expire": lambda: store.expire(WALL, 0, 10),
        "claim": lambda: store.claim("carol", "k", b"", 1),
        "keep_answer": lambda: store.keep_answer("carol", "k", b"", 1),
        "release_claim": lambda: store.release_claim("carol", "k"),
        "examine": lambda: store.examine(WALL),
    }


async def refused(operation: Callable[[], Awaitable[Any]]) -> str:
    """Return why an operation failed."""
    with pytest.raises(StoreUnavailable) as error:
        await operation()
    return error.value.reason


async def is_back(store: ValkeyStore) -> bool:
    try:
        await store.ping()
    except StoreUnavailable:
        return False
    return True


async def test_killed_server_is_an_outage_until_restarted(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.kill()
        for name, operation in every_operation(store).items():
            reason = await refused(operation)
            assert server.address in reason or "Connection closed" in reason, name
        assert here.changes == []  # nothing is reported before the store is back
        server.start()
        assert await store.find(session().token_digest) == session()
        assert here.changes == [ALL]
        assert await store.create(session(2), FIVE) == Created()


async def test_killed_server_is_detected_without_an_operation(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.kill()
        server.start()
        await until(lambda: here.changes == [ALL])


async def test_acknowledged_changes_survive_a_kill(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        records = [session(number, f"user-{number}") for number in range(500)]
        kept = []

        async def create(number: int) -> None:
            await here.store.create(records[number], FIVE)
            kept.append(records[number])
            if len(kept) == 200:
                server.kill()

        results = await asyncio.gather(*map(create, range(500)), return_exceptions=True)
        assert {type(result) for result in results} <= {type(None), StoreUnavailable}
        assert len(kept) >= 200
        server.start()
        await until(lambda: is_back(here.store))
        for record in kept:
            assert await here.store.get(record.id) == record


async def test_hung_server_fails_every_operation_within_the_timeout(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.stop()
        every = list(every_operation(store).values())
        with impatient(store, SOON):
            for operations in (every, every[:1], every[1:2]):
                for reason in await asyncio.gather(*map(refused, operations)):
                    assert f"within {SOON * 1000:.0f} ms" in reason
        assert here.changes == []
        server.go_on()
        assert await store.find(session().token_digest) == session()
        assert here.changes == [ALL]


async def test_hung_server_with_many_concurrent_operations(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.stop()
        with impatient(here.store, SOON):  # in sequence they would take half an hour
            results = await asyncio.gather(
                *(here.store.find(bytes([number % 256]) * 32) for number in range(9_000)),
                return_exceptions=True,
            )
        assert {type(result) for result in results} == {StoreUnavailable, ResourceExhausted}
        server.go_on()
        assert await here.store.count() == 0


async def test_slow_network_fails_operations_within_the_timeout(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(proxy.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        proxy.delay_s = 10 * SOON
        with impatient(store, SOON):
            for operation in list(every_operation(store).values())[:4]:
                assert f"{SOON * 1000:.0f} ms" in await refused(operation)
        proxy.delay_s = 0.0
        await until(lambda: is_back(store))
        assert await store.find(session().token_digest) == session()
        assert here.changes == [ALL]


async def test_delay_below_the_timeout_is_not_an_outage(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(proxy.url) as here:
        proxy.delay_s = 0.05
        await asyncio.gather(*(here.store.create(session(n, f"user-{n}"), FIVE) for n in range(20)))
        assert await here.store.count() == 20
        assert here.changes == []


async def test_network_that_drops_all_packets_is_an_outage(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(proxy.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        proxy.hold(TO_SERVER, FROM_SERVER)
        with impatient(store, SOON):
            await refused(store.count)
            await refused(store.count)
        proxy.release()
        await until(lambda: is_back(store))
        assert await store.find(session().token_digest) == session()
        assert here.changes == [ALL]


async def test_silent_network_is_detected_without_an_operation(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(proxy.url) as here:
        await until(lambda: not here.awaits_reply)  # else the check in progress would have the long timeout
        with impatient(here.store, SOON):
            proxy.hold(TO_SERVER, FROM_SERVER)
            await until(lambda: proxy.accepted > 1)
            assert here.lost == 1
            await until(lambda: here.lost > 2)  # reported until the server is reached
        proxy.release()
        await until(lambda: here.changes == [ALL])


async def test_reconnect_after_the_connection_was_cut(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(proxy.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        for number in range(1, 4):
            asked = asyncio.ensure_future(store.find(session().token_digest))
            await asyncio.sleep(0)
            proxy.cut()
            await asyncio.gather(asked, return_exceptions=True)
            await until(lambda number=number: len(here.changes) == number)
            assert await store.find(session().token_digest) == session()
        assert here.changes == 3 * [ALL]


async def test_reconnect_after_the_network_was_down(
    server: ServerProcess, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.servers._MIN_PAUSE_S", 3600.0)
    async with Open(proxy.url) as here:
        proxy.refuses = True
        proxy.cut()
        for _ in range(5):
            await refused(here.store.ping)
        proxy.refuses = False
        await until(lambda: is_back(here.store))  # an operation does not wait for the pause
        assert here.changes == [ALL]


async def test_server_restarted_without_data_is_reported_as_emptied(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.kill()
        for path in (server.folder / "appendonlydir").iterdir():
            path.unlink()
        server.start()
        await until(lambda: here.changes == [EMPTIED])
        assert await here.store.find(session().token_digest) is None
        assert await here.store.create(session(), FIVE) == Created()
        server.kill()
        server.start()
        await until(lambda: here.changes == [EMPTIED, ALL])
        assert await here.store.find(session().token_digest) == session()


async def test_flushed_server_is_reported_as_flushed_not_as_emptied(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("FLUSHALL")
        await until(lambda: here.changes[:1] == [FLUSHED])
        await until(lambda: is_back(here.store))
        assert EMPTIED not in here.changes
        assert await here.store.count() == 0
        # The mark is written again, so a later loss is reported correctly.
        await until(lambda: server.command("EXISTS", "zcp:v:{0}") == 1)
        changes = len(here.changes)
        server.kill()
        for path in (server.folder / "appendonlydir").iterdir():
            path.unlink()
        server.start()
        await until(lambda: EMPTIED in here.changes[changes:])


async def test_server_that_became_a_replica_is_an_outage(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("REPLICAOF", "127.0.0.1", 1)
        reason = await refused(here.store.ping)
        assert "replica" in reason
        reason = await refused(lambda: here.store.find(session().token_digest))
        assert "replica" in reason
        server.command("REPLICAOF", "NO", "ONE")
        assert await here.store.find(session().token_digest) == session()
        assert here.changes[-1] == ALL


async def test_primary_that_became_a_replica_is_noticed_without_an_operation(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.command("REPLICAOF", "127.0.0.1", 1)
        await until(lambda: not _has_tracking_client(server))
        server.command("REPLICAOF", "NO", "ONE")
        await until(lambda: here.changes == [ALL])


def _has_tracking_client(server: ServerProcess) -> bool:
    return any(b"cmd=client" not in line for line in server.command("CLIENT", "LIST").splitlines())


async def test_missing_replicas_are_an_outage(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("CONFIG", "SET", "min-replicas-to-write", 1)
        for operation in (here.store.ping, lambda: here.store.create(session(2), FIVE)):
            reason = await refused(operation)
            assert "replicas" in reason
        assert await here.store.find(session().token_digest) == session()
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)
        await here.store.ping()
        assert await here.store.list() == [session()]
        assert here.changes == []


async def test_full_server_is_an_outage_for_writes(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.command("CONFIG", "SET", "maxmemory", 1)
        for operation in (store.ping, lambda: store.create(session(2), FIVE)):
            reason = await refused(operation)
            assert "memory" in reason
        assert await store.find(session().token_digest) == session()
        # A revocation needs no memory, so it succeeds.
        gone = ended(session(), wall=WALL + 1)
        assert await store.end([session().id], Code.TOKEN_REVOKED, WALL + 1) == [gone]
        server.command("CONFIG", "SET", "maxmemory", 0)
        await store.ping()
        assert await store.get(session().id) == gone
        assert await store.get(session(2).id) is None
        assert here.changes == []


async def test_full_server_executes_no_script_partially(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        first = session()
        await store.create(first, FIVE)
        server.command("CONFIG", "SET", "maxmemory", 1)
        evicting = UserLimit(1, "evict_oldest", None)
        await refused(lambda: store.create(session(2), evicting))
        server.command("CONFIG", "SET", "maxmemory", 0)
        assert await store.list() == [first]


async def test_flushed_scripts_are_loaded_again(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("SCRIPT", "FLUSH")
        assert await here.store.find(session().token_digest) == session()
        assert here.changes == []


async def test_reconnects_leave_one_connection(server: ServerProcess) -> None:
    def connections() -> int:
        clients = server.command("CLIENT", "LIST").splitlines()
        return sum(b"tracking" in line or b"lib-name=redis-py" in line for line in clients) - 1

    async with Open(server.url) as here:
        await asyncio.gather(*(here.store.create(session(n, f"{n}"), FIVE) for n in range(300)))
        assert connections() == 1
        for _ in range(3):
            server.stop()
            with impatient(here.store, SOON):
                await refused(here.store.count)
            server.go_on()
            await here.store.count()
        await until(lambda: connections() == 1)
    await until(lambda: connections() == 0)


async def test_cancelled_operation_affects_no_other(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        for _ in range(20):
            given_up = [asyncio.ensure_future(here.store.find(bytes(32))) for _ in range(10)]
            await asyncio.sleep(0)
            other = asyncio.ensure_future(here.store.create(session(), FIVE))
            for task in given_up:
                task.cancel()
            assert await other == Created()
            assert await here.store.get(session().id) == session()
        assert here.changes == []


async def test_open_fails_without_a_server_and_can_be_retried(server: ServerProcess) -> None:
    server.kill()
    store = ValkeyStore(server.url)
    with pytest.raises(StoreUnavailable, match="127"):
        await store.open(lambda change: None)
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.ping()
    server.start()
    changes: list[Change] = []
    await store.open(changes.append)
    await store.ping()
    await store.close()
    assert changes == []


async def test_open_fails_on_a_hung_server(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    server.stop()
    store = ValkeyStore(server.url)
    with monkeypatch.context() as patch:
        patch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", SOON)
        with pytest.raises(StoreUnavailable, match="no connection within"):
            await store.open(lambda change: None)
    server.go_on()
    await store.open(lambda change: None)
    await store.close()


async def test_close_during_an_outage(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.stop()
        asked = [asyncio.ensure_future(here.store.count()) for _ in range(5)]
        await asyncio.sleep(0)
        await here.store.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(result) for result in results} == {StoreUnavailable}
    server.kill()
    with pytest.raises(StoreUnavailable):
        await here.store.open(here.changes.append)


async def test_data_of_a_newer_version_is_refused(server: ServerProcess) -> None:
    server.command("SET", "zcp:v:{0}", "2 mark")
    store = ValkeyStore(server.url)
    with pytest.raises(ConfigError, match="schema 2; this one supports 1"):
        await store.open(lambda change: None)
    async with Open(server.url, prefix="other:") as here:
        await here.store.create(session(), FIVE)
        assert {key.partition(b":")[0] for key in server.command("KEYS", "*")} == {b"other", b"zcp"}
        # After an upgrade by another process the store becomes unavailable, with the reason.
        server.command("SET", "other:v:{0}", "3 mark")
        await until(lambda: server.command("CLIENT", "KILL", "TYPE", "normal") is not None)
        await asyncio.sleep(0)
        await until(lambda: _says(here.store, "newer version"))


async def _says(store: ValkeyStore, what: str) -> bool:
    try:
        await store.ping()
    except StoreUnavailable as error:
        return what in error.reason
    return False
