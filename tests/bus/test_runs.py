"""Durable runs of several servers over real Valkey and Redis servers, alone and as a cluster."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from tests.limits import TIMEOUT
from tests.runs.contract import LIMITS, agree, info_of
from tests.stores.valkey.helpers import url_of
from tests.stores.valkey.server_process import ServerProcess, until
from zcproto.bus import runs as bus_runs
from zcproto.bus.runs import ValkeyRuns
from zcproto.bus.sealing import Opener, Sealer
from zcproto.common.clock import system_entropy
from zcproto.errors import DataLoss, Unavailable
from zcproto.runs import shared
from zcproto.runs.log import Opening, RunKey, Superseded
from zcproto.runs.shared import SharedRuns
from zcproto.stores.valkey.store import ValkeyStore

KEY = RunKey("ada", "one")
INFO = info_of(0)
MANY = 100, 1 << 20
KEYS = (bytes(32),)


def carrier_of(url: str, process: str, keys: tuple[bytes, ...] = KEYS, time: int | None = None) -> ValkeyRuns:
    store = ValkeyStore(url, timeout=TIMEOUT)
    return ValkeyRuns(
        *(store.make_servers, b"zcp:", Sealer(keys, system_entropy), Opener(keys), LIMITS, process, TIMEOUT),
        time=None if time is None else lambda: time,
    )


@asynccontextmanager
async def nodes(url: str, count: int = 2) -> AsyncIterator[list[SharedRuns]]:
    async with AsyncExitStack() as stack:
        found = [
            SharedRuns(carrier_of(url, f"node{number}"), LIMITS, f"node{number}") for number in range(count)
        ]
        for node in found:
            await node.start()
            stack.push_async_callback(node.stop)
        await until(lambda: all(node.is_up for node in found))
        yield found


def opening(attachment: str = "first", position: int = 0, *, starts: bool = True) -> Opening:
    return Opening("chat", b"digest", position, attachment, False, INFO if starts else None)


@pytest.mark.parametrize("seed", range(4))
async def test_random_operations_have_the_answers_of_the_table(server: ServerProcess, seed: int) -> None:
    carrier = carrier_of(url_of(server), "p", time=0)
    runs = SharedRuns(carrier, LIMITS, "p")
    await runs.start()
    await until(lambda: runs.is_up)
    try:
        assert await agree(carrier, seed, 600) > 100
    finally:
        await runs.stop()


async def test_run_of_one_server_is_read_at_another_and_is_sealed(server: ServerProcess) -> None:
    async with nodes(url_of(server)) as (first, second):
        is_new, _ = await first.open(KEY, opening())
        woken = asyncio.Event()
        second.watch(KEY, woken.set)
        await second.open(KEY, opening("second", starts=False))
        state = await first.append(KEY, INFO.generation, 0, [b"very secret"], None)
        await woken.wait()
        assert (is_new, (await second.read(KEY, "second", 0, *MANY))[1]) == (True, [b"very secret"])
        assert state is not None
        assert state.info.owner == "node0"
        with pytest.raises(Superseded):
            await first.read(KEY, "first", 0, *MANY)
        for key in server.command("KEYS", "zcp:*"):
            if not key.startswith(b"zcp:v"):
                assert b"secret" not in server.command("DUMP", key)
                assert server.command("PTTL", key) > 0
        second.unwatch(KEY, woken.set)


async def test_item_of_another_key_ends_the_attachment(server: ServerProcess) -> None:
    async with nodes(url_of(server), 1) as (first,):
        await first.open(KEY, opening())
        await first.append(KEY, INFO.generation, 0, [b"a"], None)
        stranger = SharedRuns(carrier_of(url_of(server), "stranger", (b"x" * 32,)), LIMITS, "stranger")
        await stranger.start()
        await until(lambda: stranger.is_up)
        try:
            await stranger.open(KEY, opening("second", starts=False))
            with pytest.raises(DataLoss):
                await stranger.read(KEY, "second", 0, *MANY)
            await first.append(KEY, INFO.generation, 1, [], (0, b"done"))
            with pytest.raises(DataLoss):
                await stranger.read(KEY, "second", 1, *MANY)
            ((key, state),) = await stranger.runs("ada")
            assert (key, state.end) == (KEY, (0, b"")), "it can be listed and forgotten"
        finally:
            await stranger.stop()


async def test_log_that_a_failover_has_shortened_is_repaired(server: ServerProcess) -> None:
    """An older state of the keys, as of a replica that lags."""
    async with nodes(url_of(server)) as (first, second):
        await first.open(KEY, opening())
        await first.append(KEY, INFO.generation, 0, [b"a", b"b"], None)
        older = {key: server.command("DUMP", key) for key in server.command("KEYS", "zcp:[djk]:*")}
        await second.open(KEY, opening("second", starts=False))
        await second.take(KEY, "second", 1)
        await first.append(KEY, INFO.generation, 2, [b"c"], None)
        await first.append(KEY, INFO.generation, 3, [b"d"], None)
        for key, dumped in older.items():
            server.command("RESTORE", key, 0, dumped, "REPLACE")
        assert (await second.read(KEY, "second", 4, *MANY))[1] == []  # the reader waits
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await until(lambda: first.repaired == 1)

        async def is_repaired() -> bool:
            state, bodies = await second.read(KEY, "second", 1, *MANY)
            return bodies == [b"b", b"c", b"d"] and state.taken == 1

        await until(is_repaired)


async def test_flushed_store_gets_the_runs_back(server: ServerProcess) -> None:
    async with nodes(url_of(server), 1) as (first,):
        await first.open(KEY, opening())
        await first.append(KEY, INFO.generation, 0, [b"a"], None)
        assert server.command("FLUSHALL") == b"OK"
        state = await first.append(KEY, INFO.generation, 1, [b"b"], (0, b"done"))
        assert state is not None
        assert (state.next, state.end) == (2, (0, b"done"))
        assert (await first.read(KEY, "first", 0, *MANY))[1] == [b"a", b"b"]


async def test_killed_server_is_awaited(server: ServerProcess) -> None:
    async with nodes(url_of(server), 1) as (first,):
        await first.open(KEY, opening())
        server.command("CLIENT", "PAUSE", 200)
        appending = asyncio.create_task(first.append(KEY, INFO.generation, 0, [b"a"], None))
        server.command("CLIENT", "KILL", "TYPE", "pubsub")
        state = await appending
        assert state is not None
        assert state.next == 1


async def test_owner_without_a_sign_of_life_is_lost_and_finds_its_run_ended(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "CHECK_S", 0.01)
    monkeypatch.setattr(bus_runs, "RENEW_S", 1_000.0)
    async with nodes(url_of(server)) as (first, second):
        await first.open(KEY, opening())
        await first.append(KEY, INFO.generation, 0, [b"a"], None)
        await second.open(KEY, opening("second", starts=False))
        server.command("DEL", "zcp:y:node0")
        monkeypatch.setattr(shared, "LOST_S", 0.0)

        async def has_ended() -> bool:
            return (await second.read(KEY, "second", 0, *MANY))[0].end is not None

        await until(has_ended)
        assert await first.append(KEY, INFO.generation, 1, [b"b"], None) is None
        assert first.size == 0
        state, bodies = await second.read(KEY, "second", 0, *MANY)
        assert (state.end, bodies) == (shared.owner_lost(1), [b"a"])


async def test_full_store_starts_no_run_and_those_that_run_wait(
    server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(url_of(server), 1) as (first,):
        await first.open(KEY, opening())
        await first.append(KEY, INFO.generation, 0, [b"a"], None)
        server.command("CONFIG", "SET", "maxmemory", 1)
        monkeypatch.setattr(shared, "OPEN_WITHIN_S", 0.05)
        with pytest.raises(Unavailable):
            await first.open(RunKey("ada", "two"), opening())
        appending = asyncio.create_task(first.append(KEY, INFO.generation, 1, [b"b"], None))
        assert (await first.read(KEY, "first", 0, *MANY))[1] == [b"a"]
        await first.take(KEY, "first", 1)
        assert not appending.done()
        server.command("CONFIG", "SET", "maxmemory", 0)
        state = await appending
        assert state is not None
        assert (state.next, state.taken) == (2, 1)
