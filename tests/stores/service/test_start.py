"""At the start the store is loaded, or every token is refused until it is back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from tests.stores.faulty import FAILS, HANGS
from tests.stores.service.harness import TIMEOUT, Log, StartProcess, raw, refused
from zcproto.errors import Code, ConfigError
from zcproto.sessions import Session
from zcproto.sessions.health import MAX_DELAY_S
from zcproto.sessions.record import EndedRecord
from zcproto.stores import sync as sync_module
from zcproto.stores.base import StoreUnavailable


async def test_store_is_loaded_in_batches(start_process: StartProcess, log: Log) -> None:
    one = await start_process()
    opened = [await one.open(f"user-{number}") for number in range(1_100)]
    other = await start_process(one.store)
    assert all(other.is_valid(each) for each in opened)
    assert [line["sessions"] for line in log.of("sessions.loaded")] == [0, 1_100]
    assert one.store.calls.count("load") == 2


async def test_sessions_beyond_max_sessions_are_logged(start_process: StartProcess, log: Log) -> None:
    one = await start_process()
    for _ in range(3):
        await one.open()
    other = await start_process(one.store, max_sessions=2)
    assert other.registry.kept == 2
    assert [line["sessions"] for line in log.of("sessions.left_out")] == [1]


async def test_sessions_that_ended_before_the_start_are_remembered(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await start_process()
    opened = await one.open()
    await one.revoke(opened)
    await one.pending.close()
    other = await start_process(one.store, starts=False)
    ended = one.store.registry.ended(raw(opened))

    async def load() -> AsyncIterator[Sequence[EndedRecord | None]]:
        yield [ended]

    monkeypatch.setattr(one.store, "load", load)
    await other.sync.start()
    assert other.check(opened.token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize("mode", [FAILS, HANGS])
@pytest.mark.parametrize("is_shared", [False, True])
async def test_outage_at_start_refuses_every_token_until_recovery(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch, mode: str, is_shared: bool
) -> None:
    monkeypatch.setattr(sync_module, "OPEN_LIMIT_S", TIMEOUT)
    one = await start_process(shared=is_shared)
    opened = await one.open()
    one.store.mode = mode
    other = await start_process(one.store)
    assert await other.find(opened.token) is Code.UNAVAILABLE
    assert await other.find(b"x" * 32) is Code.UNAVAILABLE
    error = await refused(other.open())
    assert error.details["retry_after_ms"] > 0
    await other.advance(MAX_DELAY_S)
    assert await other.find(opened.token) is Code.UNAVAILABLE
    await other.recover()
    found = await other.find(opened.token)
    assert isinstance(found, Session)
    assert found.id == opened.session.id
    assert await other.find(b"x" * 32) is Code.UNAUTHENTICATED


async def test_interrupted_loading_is_repeated(start_process: StartProcess) -> None:
    one = await start_process()
    opened = [await one.open() for _ in range(3)]
    one.store.modes["load"] = FAILS
    other = await start_process(one.store)
    assert other.check(opened[0].token) is Code.UNAVAILABLE
    await other.recover()
    assert all(other.is_valid(each) for each in opened)


async def test_permanent_fault_stops_the_start(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start_process(starts=False)

    async def open_(on_change: object) -> None:
        raise ConfigError(["store.url: no such database"])

    monkeypatch.setattr(process.store, "open", open_)
    with pytest.raises(ConfigError, match="no such database"):
        await process.sync.start()
    assert process.store.closed == 1


async def test_unreadable_pending_revocations_stop_the_start(
    start_process: StartProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = await start_process(starts=False)

    async def open_() -> None:
        raise StoreUnavailable("the disk did not answer within 30000 ms")

    monkeypatch.setattr(process.pending, "open", open_)
    with pytest.raises(ConfigError, match="pending revocations cannot be read: the disk did not answer"):
        await process.sync.start()


async def test_damaged_pending_revocations_are_reported(
    start_process: StartProcess, log: Log, tmp_path: Path
) -> None:
    (tmp_path / "revocations.pending").write_bytes(b"damage\n")
    await start_process()
    (line,) = log.of("revocations.damaged")
    assert line["copy"].endswith("revocations.pending.damaged-1")
