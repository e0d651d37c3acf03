"""A store that works but refuses further operations, because too many wait."""

from __future__ import annotations

from tests.stores.faulty import BUSY
from tests.stores.service.harness import SessionProcess, StartProcess, refused
from zcproto.errors import ResourceExhausted, Unavailable
from zcproto.sessions.health import FAILURES, HealthState


async def test_callers_are_refused_and_the_store_is_not_degraded(process: SessionProcess) -> None:
    opened = await process.open()
    process.store.mode = BUSY
    for _ in range(2 * FAILURES):
        for work in (process.open(), process.refresh(opened)):
            error = await refused(work, ResourceExhausted)
            assert error.details == {"retry_after_ms": 250}
    assert process.state is HealthState.HEALTHY
    assert process.is_valid(opened)
    process.store.mode = ""
    assert process.is_valid(await process.refresh(opened))


async def test_unknown_token_is_not_refused_for_good(
    one: SessionProcess, start_process: StartProcess
) -> None:
    opened = await one.open()
    other = await start_process(one.store)
    one.store.modes["find"] = BUSY
    await refused(other.find(opened.token), ResourceExhausted)
    one.store.modes.clear()
    await other.find(opened.token)
    assert other.is_valid(opened)


async def test_sessions_of_a_key_are_revoked_although_they_cannot_be_listed(one: SessionProcess) -> None:
    opened = await one.open(key="device:phone")
    one.store.modes["list"] = BUSY
    await refused(one.sessions.revoke_key("ada", "device:phone", "removed"), Unavailable)
    assert not one.is_valid(opened)
    assert one.store.registry.kept == 0


async def test_stop_ends_although_last_uses_are_refused(process: SessionProcess) -> None:
    opened = await process.open()
    process.clock.advance(60)
    assert process.is_valid(opened)
    process.store.modes["touch"] = BUSY
    await process.sync.stop()
    assert process.store.closed == 1
