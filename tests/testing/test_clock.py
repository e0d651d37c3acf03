"""Time that a test moves."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

import zcproto
from zcproto import App, Config, Context, SessionsConfig
from zcproto.testing import MemoryServer, MovableClock, connect_in_memory

HOUR = 3600.0


@pytest.fixture
def sleeps() -> asyncio.Event:
    """Set when the method has begun."""
    return asyncio.Event()


@pytest.fixture
def app(sleeps: asyncio.Event) -> App:
    app = App()

    @app.method("sleep")
    async def sleep(seconds: float) -> str:
        sleeps.set()
        await asyncio.sleep(seconds)
        return "slept"

    @app.method("left")
    def left(context: Context) -> float | None:
        return context.time_left

    return app


@pytest.mark.usefixtures("stopped_time")
async def test_method_that_sleeps_wakes_when_the_clock_is_advanced(app: App, sleeps: asyncio.Event) -> None:
    clock = MovableClock()
    async with connect_in_memory(app, user="ada", clock=clock) as client:
        call = asyncio.create_task(client.call("sleep", seconds=20.0))
        await sleeps.wait()
        clock.advance(20)
        assert await call == "slept"


@pytest.mark.usefixtures("stopped_time")
async def test_deadline_of_a_call_passes_when_the_clock_is_advanced(app: App, sleeps: asyncio.Event) -> None:
    clock = MovableClock()
    async with connect_in_memory(app, user="ada", clock=clock) as client:
        call = asyncio.create_task(client.call("sleep", seconds=HOUR, timeout=30))
        await sleeps.wait()
        assert not call.done()
        clock.advance(31)
        with pytest.raises(zcproto.DeadlineExceeded):
            await call


@pytest.mark.usefixtures("stopped_time")
async def test_session_expires_when_the_clock_is_advanced(app: App) -> None:
    clock = MovableClock()
    config = Config(sessions=SessionsConfig(lifetime=HOUR, refresh=False))
    async with MemoryServer(app, config, clock=clock) as server, server.connect("ada") as client:
        before = client.session
        clock.advance(HOUR + 1)
        assert await client.call("left") is not None
        assert client.session is not None
        assert before is not None
        assert client.session.id != before.id  # opened again with the key


async def test_session_is_kept_while_the_clock_advances_in_steps(app: App) -> None:
    clock = MovableClock()
    async with connect_in_memory(app, user="ada", clock=clock) as client:
        assert client.session is not None
        opened = client.session.id
        for _ in range(12):
            clock.advance(HOUR / 2)
            await client.call("left")
        assert client.session.id == opened


async def test_loop_has_its_own_time_again_after_the_block(app: App) -> None:
    loop, clock = asyncio.get_running_loop(), MovableClock()
    async with (
        connect_in_memory(app, clock=clock),
        connect_in_memory(app, clock=clock),  # as often as one likes
    ):
        before = loop.time()
        clock.advance(HOUR)
        assert loop.time() >= before + HOUR
        assert clock.wall() - zcproto.common.clock.system_clock.wall() == pytest.approx(HOUR * 1000, abs=1000)
    assert loop.time() < before + HOUR


async def test_second_clock_for_a_loop_is_refused(app: App) -> None:
    async with connect_in_memory(app, clock=MovableClock()):
        with pytest.raises(RuntimeError, match="pass the same one as clock="):
            async with connect_in_memory(app, clock=MovableClock()):
                pass


def test_clock_of_uvloop_cannot_be_moved(app: App) -> None:
    async def main() -> None:
        async with connect_in_memory(app, clock=MovableClock()):
            pass

    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        pytest.raises(RuntimeError, match="run this test on asyncio's own loop"),
    ):
        runner.run(main())


def test_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="time does not go back"):
        MovableClock().advance(-1)
