"""A server that is killed, hangs, is slow, full, read-only, emptied or cut off: nobody waits, and it is over when
it is over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.stores.contract import FIVE, WALL, ended, session
from tests.stores.valkey.server_process import PROGRAMS, Proxy, ServerProcess, running, until
from zcproto.errors import Code, ConfigError
from zcproto.sessions.record import UserLimit
from zcproto.stores.base import Change, ChangeKind, Created, StoreUnavailable
from zcproto.stores.valkey.store import ValkeyStore

TIMEOUT = 0.25
AT_MOST = TIMEOUT + 0.05

ALL = Change(ChangeKind.ALL)
EMPTIED = Change(ChangeKind.EMPTIED)


@pytest.fixture(params=PROGRAMS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerProcess]:
    options = ("--appendonly", "yes", "--appendfsync", "always")
    with running(request.param, tmp_path / "server", *options) as process:
        yield process


@pytest.fixture
async def proxy(server: ServerProcess) -> AsyncIterator[Proxy]:
    proxy = Proxy(server.port)
    await proxy.start()
    yield proxy
    await proxy.close()


class Open:
    """An open store, and what it told."""

    def __init__(self, url: str, **options: Any) -> None:
        self.store = ValkeyStore(url, **{"timeout": TIMEOUT, **options})
        self.told: list[Change] = []

    async def __aenter__(self) -> Open:
        await self.store.open(self.told.append)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.store.close()


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
        "claim": lambda: store.claim("carol", "k", b"", WALL, 1),
        "keep_answer": lambda: store.keep_answer("carol", "k", b"", WALL, 1),
        "release_claim": lambda: store.release_claim("carol", "k"),
        "examine": store.examine,
    }


async def refused(operation: Callable[[], Awaitable[Any]]) -> tuple[str, float]:
    """Why an operation failed, and after how many seconds."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    with pytest.raises(StoreUnavailable) as error:
        await operation()
    took = loop.time() - begin
    assert took < AT_MOST
    return error.value.reason, took


async def is_back(store: ValkeyStore) -> bool:
    try:
        await store.ping()
    except StoreUnavailable:
        return False
    return True


async def test_killed_and_started_again(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.kill()
        for name, operation in every_operation(store).items():
            reason, _ = await refused(operation)
            assert server.address in reason or "Connection closed" in reason, name
        assert here.told == []  # what is known goes on until the store can be asked
        server.start()
        assert await store.find(session().token_digest) == session()
        assert here.told == [ALL]
        assert await store.create(session(2), FIVE) == Created()


async def test_it_is_noticed_without_being_asked(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.kill()
        server.start()
        await until(lambda: here.told == [ALL])


async def test_what_was_acknowledged_survives_a_kill(server: ServerProcess) -> None:
    async with Open(server.url, timeout=5.0) as here:  # 500 at once take a busy machine some time
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


async def test_hung(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.stop()
        every = list(every_operation(store).values())
        for operations in (every, every[:1], every[1:2]):
            for reason, took in await asyncio.gather(*map(refused, operations)):
                assert f"within {TIMEOUT * 1000:.0f} ms" in reason
                assert took >= TIMEOUT * 0.9
        assert here.told == []
        server.go_on()
        assert await store.find(session().token_digest) == session()
        assert here.told == [ALL]


async def test_hung_while_many_ask(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.stop()
        loop = asyncio.get_running_loop()
        begin = loop.time()
        results = await asyncio.gather(
            *(here.store.find(bytes([number % 256]) * 32) for number in range(9_000)), return_exceptions=True
        )
        assert {type(result) for result in results} == {StoreUnavailable}
        assert loop.time() - begin < 20  # one after the other they would take half an hour
        assert any("too many" in result.reason for result in results if isinstance(result, StoreUnavailable))
        server.go_on()
        assert await here.store.count() == 0


async def test_slow(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        store = here.store
        await store.create(session(), FIVE)
        proxy.delay = 2.0
        for operation in list(every_operation(store).values())[:4]:
            reason, _ = await refused(operation)
            assert "250 ms" in reason
        proxy.delay = 0.0
        assert await store.find(session().token_digest) == session()
        assert here.told == [ALL]


async def test_a_little_slow_is_no_outage(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        proxy.delay = 0.05
        await asyncio.gather(*(here.store.create(session(n, f"user-{n}"), FIVE) for n in range(20)))
        assert await here.store.count() == 20
        assert here.told == []


async def test_a_network_that_loses_everything(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        store = here.store
        await store.create(session(), FIVE)
        proxy.silent = True
        await refused(store.count)
        await refused(store.count)
        proxy.silent = False
        assert await store.find(session().token_digest) == session()
        assert here.told == [ALL]


async def test_silence_is_noticed_without_being_asked(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        connections = proxy.accepted
        proxy.silent = True
        assert await until(lambda: proxy.accepted > connections) < 1.0
        proxy.silent = False
        await until(lambda: here.told == [ALL])


async def test_cut(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        store = here.store
        await store.create(session(), FIVE)
        for number in range(1, 4):
            asked = asyncio.ensure_future(store.find(session().token_digest))
            await asyncio.sleep(0)
            proxy.cut()
            await asyncio.gather(asked, return_exceptions=True)
            await until(lambda number=number: len(here.told) == number)
            assert await store.find(session().token_digest) == session()
        assert here.told == 3 * [ALL]


async def test_cut_off_for_a_while(server: ServerProcess, proxy: Proxy) -> None:
    async with Open(f"redis://127.0.0.1:{proxy.port}") as here:
        proxy.refuses = True
        proxy.cut()
        for _ in range(5):
            await refused(here.store.ping)
        proxy.refuses = False
        assert await until(lambda: is_back(here.store)) < 0.3
        assert here.told == [ALL]


async def test_back_without_its_data(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.kill()
        for path in (server.folder / "appendonlydir").iterdir():
            path.unlink()
        server.start()
        await until(lambda: here.told == [EMPTIED])
        assert await here.store.find(session().token_digest) is None
        assert await here.store.create(session(), FIVE) == Created()
        server.kill()
        server.start()
        await until(lambda: here.told == [EMPTIED, ALL])
        assert await here.store.find(session().token_digest) == session()


async def test_emptied_by_hand(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("FLUSHALL")
        await until(lambda: here.told[:1] == [ALL])
        await until(lambda: is_back(here.store))
        assert EMPTIED not in here.told
        assert await here.store.count() == 0
        # The mark is there again: what comes later is told as what it is.
        await until(lambda: server.command("EXISTS", "zcp:v:{0}") == 1)
        told = len(here.told)
        server.kill()
        for path in (server.folder / "appendonlydir").iterdir():
            path.unlink()
        server.start()
        await until(lambda: EMPTIED in here.told[told:])


async def test_a_replica(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("REPLICAOF", "127.0.0.1", 1)
        reason, _ = await refused(here.store.ping)
        assert "replica" in reason
        reason, _ = await refused(lambda: here.store.find(session().token_digest))
        assert "replica" in reason
        server.command("REPLICAOF", "NO", "ONE")
        assert await here.store.find(session().token_digest) == session()
        assert here.told[-1] == ALL


async def test_replicas_that_are_missing(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("CONFIG", "SET", "min-replicas-to-write", 1)
        for operation in (here.store.ping, lambda: here.store.create(session(2), FIVE)):
            reason, _ = await refused(operation)
            assert "replicas" in reason
        assert await here.store.find(session().token_digest) == session()
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)
        await here.store.ping()
        assert await here.store.list() == [session()]
        assert here.told == []


async def test_full(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        await store.create(session(), FIVE)
        server.command("CONFIG", "SET", "maxmemory", 1)
        for operation in (store.ping, lambda: store.create(session(2), FIVE)):
            reason, _ = await refused(operation)
            assert "memory" in reason
        assert await store.find(session().token_digest) == session()
        # A revocation needs no room: it is done.
        gone = ended(session(), wall=WALL + 1)
        assert await store.end([session().id], Code.TOKEN_REVOKED, WALL + 1) == [gone]
        server.command("CONFIG", "SET", "maxmemory", 0)
        await store.ping()
        assert await store.get(session().id) == gone
        assert await store.get(session(2).id) is None
        assert here.told == []


async def test_a_full_server_does_not_do_things_by_halves(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        store = here.store
        first = session()
        await store.create(first, FIVE)
        server.command("CONFIG", "SET", "maxmemory", 1)
        evicting = UserLimit(1, "evict_oldest", None)
        await refused(lambda: store.create(session(2), evicting))
        server.command("CONFIG", "SET", "maxmemory", 0)
        assert await store.list() == [first]


async def test_scripts_that_were_forgotten(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        await here.store.create(session(), FIVE)
        server.command("SCRIPT", "FLUSH")
        assert await here.store.find(session().token_digest) == session()
        assert here.told == []


async def test_there_is_one_connection_whatever_happens(server: ServerProcess) -> None:
    def connections() -> int:
        clients = server.command("CLIENT", "LIST").splitlines()
        return sum(b"tracking" in line or b"lib-name=redis-py" in line for line in clients) - 1

    async with Open(server.url) as here:
        await asyncio.gather(*(here.store.create(session(n, f"{n}"), FIVE) for n in range(300)))
        assert connections() == 1
        for _ in range(3):
            server.stop()
            await refused(here.store.count)
            server.go_on()
            await here.store.count()
        await until(lambda: connections() == 1)
    await until(lambda: connections() == 0)


async def test_a_caller_that_gives_up_hurts_nobody(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        for _ in range(20):
            given_up = [asyncio.ensure_future(here.store.find(bytes(32))) for _ in range(10)]
            await asyncio.sleep(0)
            other = asyncio.ensure_future(here.store.create(session(), FIVE))
            for task in given_up:
                task.cancel()
            assert await other == Created()
            assert await here.store.get(session().id) == session()
        assert here.told == []


async def test_not_there_at_the_start(server: ServerProcess) -> None:
    server.kill()
    store = ValkeyStore(server.url)
    with pytest.raises(StoreUnavailable, match="127"):
        await store.open(lambda change: None)
    with pytest.raises(StoreUnavailable, match="not open"):
        await store.ping()
    server.start()
    told: list[Change] = []
    await store.open(told.append)
    await store.ping()
    await store.close()
    assert told == []


async def test_hung_at_the_start(server: ServerProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zcproto.stores.valkey.servers.OPEN_TIMEOUT_S", 0.3)
    server.stop()
    store = ValkeyStore(server.url)
    with pytest.raises(StoreUnavailable, match="no connection within"):
        await store.open(lambda change: None)
    server.go_on()
    await store.open(lambda change: None)
    await store.close()


async def test_closing_while_it_is_out(server: ServerProcess) -> None:
    async with Open(server.url) as here:
        server.stop()
        asked = [asyncio.ensure_future(here.store.count()) for _ in range(5)]
        await asyncio.sleep(0)
        await here.store.close()
        results = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(result) for result in results} == {StoreUnavailable}
    server.kill()
    async with asyncio.timeout(2):
        with pytest.raises(StoreUnavailable):
            await here.store.open(here.told.append)


async def test_what_a_newer_version_has_written(server: ServerProcess) -> None:
    server.command("SET", "zcp:v:{0}", "2 mark")
    store = ValkeyStore(server.url)
    with pytest.raises(ConfigError, match="schema 2; this one supports 1"):
        await store.open(lambda change: None)
    async with Open(server.url, prefix="other:") as here:
        await here.store.create(session(), FIVE)
        assert {key.partition(b":")[0] for key in server.command("KEYS", "*")} == {b"other", b"zcp"}
        # Upgraded while this one runs: it stops to use it, and says why.
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
