"""Last uses, cleaning, stopping; and sessions in memory."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from tests.helpers import FakeClock, drive
from tests.sessions.helpers import CountedEntropy
from tests.stores.faulty import FAILS
from tests.stores.service.harness import (
    ADDRESS,
    CLIENT,
    DAY_MS,
    HOUR_MS,
    Log,
    SessionProcess,
    StartProcess,
    raw,
)
from zcproto.errors import Code
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.stores import sync as sync_module
from zcproto.stores.base import Change, ChangeKind, StoreUnavailable
from zcproto.stores.service import SessionService


async def test_last_uses_are_written_with_delay(process: SessionProcess) -> None:
    one, other = await process.open(), await process.open()
    await process.sync.write_uses()
    process.store.calls.clear()
    process.clock.advance(60)
    assert process.is_valid(one)
    await process.sync.write_uses()
    assert process.store.calls == ["touch"]
    used, unused = (process.store.registry.record(raw(each)) for each in (one, other))
    assert used is not None
    assert unused is not None
    assert used.last_used_at - unused.last_used_at == 60_000
    await process.sync.write_uses()
    process.clock.wall_ms -= HOUR_MS
    process.store.calls.clear()
    await process.sync.write_uses()  # the clock was set back: written twice rather than never
    assert process.store.calls == ["touch"]


async def test_last_uses_are_searched_without_a_pause(process: SessionProcess) -> None:
    writing = asyncio.create_task(process.sync.write_uses())
    for _ in range(20):
        await asyncio.sleep(0)
    assert writing.done()


async def test_last_use_is_written_once(process: SessionProcess) -> None:
    await process.open()
    process.clock.advance(0.001)
    await process.sync.write_uses()
    process.store.calls.clear()
    await process.sync.write_uses()
    assert process.store.calls == []


async def test_last_uses_that_failed_are_written_later(process: SessionProcess) -> None:
    opened = await process.open()
    process.clock.advance(60)
    assert process.is_valid(opened)
    process.store.modes["touch"] = FAILS
    with pytest.raises(StoreUnavailable):
        await process.sync.write_uses()
    process.store.modes.clear()
    await process.sync.write_uses()
    record = process.stored(opened)
    assert record.last_used_at == process.clock.wall()


async def test_stop_writes_last_uses_and_closes_the_store(process: SessionProcess) -> None:
    opened = await process.open()
    process.clock.advance(60)
    assert process.is_valid(opened)
    await process.sync.stop()
    record = process.stored(opened)
    assert record.last_used_at == process.clock.wall()
    assert process.store.closed == 1


async def test_expired_sessions_are_removed_here_and_in_the_store(start_process: StartProcess) -> None:
    process = await start_process(refresh=False)
    for number in range(1_500):
        await process.open(f"user-{number}")
    process.clock.advance(2 * DAY_MS / 1000)
    await process.sync.clean()
    assert process.registry.kept == 0
    assert process.store.registry.kept == 0


async def test_upkeep_continues_after_exceptions(
    start_process: StartProcess, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync_module, "TOUCH_INTERVAL_S", 0.001)
    process = await start_process()
    calls = itertools.count()

    async def touch(uses: Any) -> None:
        number = next(calls)
        if number == 0:
            raise ValueError("a bug")
        if number == 1:
            raise StoreUnavailable("the test makes it fail")
        done.set()

    done = asyncio.Event()
    monkeypatch.setattr(process.store, "touch", touch)
    opened = await process.open()
    while not done.is_set():
        process.clock.advance(0.005)
        assert process.is_valid(opened)
        await asyncio.sleep(0.001)
    (line,) = log.of("store.upkeep_failed")
    assert line["what"] == "write_uses"


async def test_in_memory_no_coroutine_suspends(clock: FakeClock) -> None:
    registry = SessionRegistry(SessionSettings(), CountedEntropy())
    sessions = SessionService(registry, clock)

    opened = drive(sessions.open("ada", client=CLIENT, address=ADDRESS))
    again = drive(sessions.refresh(opened.refresh_token, client=CLIENT, address=ADDRESS))
    assert again.session.id == opened.session.id
    assert [info.id for info in drive(sessions.list("ada"))] == [opened.session.id]
    assert drive(sessions.look_up(b"x" * 32, ADDRESS, Code.UNAUTHENTICATED)) is None
    assert drive(sessions.revoke(again.session.id, user="ada", reason=""))
    assert registry.kept == 0
    for _ in range(3):
        opened = drive(sessions.open("ada", client=CLIENT, address=ADDRESS))
    assert drive(sessions.revoke(opened.session.id, user="ada", reason=""))
    assert drive(sessions.revoke_user("ada", "")) == 2
    opened = drive(sessions.open("ada", client=CLIENT, address=ADDRESS, key="device:phone"))
    assert drive(sessions.find_by_refresh_token(opened.refresh_token)).user == "ada"
    assert drive(sessions.revoke_key("ada", "device:phone", "")) == 1
    drive(sessions.open("ada", client=CLIENT, address=ADDRESS))
    assert drive(sessions.revoke_all("")) == 1
    assert sessions.statistics() == {"state": "healthy"}
    assert not sessions.looks_up


async def test_misconfigured_store_is_reported_at_the_start_and_when_it_is_mended(
    start_process: StartProcess, log: Log
) -> None:
    process = await start_process(shared=True, starts=False)
    reported: list[tuple[str, Any]] = []
    process.sync.on_event = lambda event, values: reported.append((event, values["faults"]))
    process.store.problems = ["appendonly is off", "the clocks differ"]
    await process.sync.start()
    await process.settle()
    assert process.sync.problems == ("appendonly is off", "the clocks differ")
    assert log.events.count("store.misconfigured") == 1
    process.store.problems = []
    await process.sync.examine()
    await process.sync.examine()
    assert reported == [
        ("store.misconfigured", "appendonly is off; the clocks differ"),
        ("store.misconfigured", ""),
    ]
    assert process.sync.problems == ()


async def test_store_is_examined_after_an_outage(start_process: StartProcess) -> None:
    process = await start_process(shared=True)
    await process.settle()
    assert process.sync.problems == ()
    await process.outage()
    process.store.problems = ["appendonly is off"]
    await process.recover()
    assert process.sync.problems == ("appendonly is off",)


async def test_flushed_store_ends_its_sessions_and_is_reported(
    shared_process: SessionProcess, log: Log
) -> None:
    process = shared_process
    opened = await process.open()
    process.use(opened)
    process.store.lose_all()
    process.store.on_change(Change(ChangeKind.FLUSHED))
    await process.settle()
    assert not process.is_valid(opened)
    assert "store.flushed" in log.events
    assert "store.emptied" not in log.events
