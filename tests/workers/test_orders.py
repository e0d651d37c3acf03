"""What a process does on the orders of its supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any
from unittest.mock import AsyncMock, Mock

import pytest

from tests.workers.hub_harness import until
from zcproto.alerts import AlertKind
from zcproto.errors import ConfigError
from zcproto.workers import processes
from zcproto.workers.channel import Channel
from zcproto.workers.fleet import CERTIFICATES
from zcproto.workers.link import Topics
from zcproto.workers.processes import MAX_NAMES, Orders


class Process:
    """A process whose server does nothing. `supervisor` is the other end of its channel."""

    def __init__(self, *, is_coordinator: bool = False, hang_limit: float | None = None) -> None:
        self.supervisor, self.channel = Channel.pair()
        self.heard: list[tuple[str, dict[str, Any]]] = []
        self.server = Mock(start=AsyncMock(), drain=AsyncMock(), reload_here=AsyncMock())
        self.server.parts.certificates.check = AsyncMock()
        self.server.state.tasks.running, self.server.parts.lifespans.is_stuck = 0, False
        self.part = Mock(server=Mock() if is_coordinator else None, topics=Topics())
        self.part.client = None if is_coordinator else Mock(on_up=[])
        self.orders = Orders(self.server, self.part, self.channel, hang_limit)
        self.is_ready = asyncio.Event()
        self.running: asyncio.Task[None] | None = None

    def begin(self) -> asyncio.Task[None]:
        self.running = asyncio.create_task(self.orders.run(lambda server: self.is_ready.set()))
        return self.running

    async def start(self) -> None:
        self.begin()
        await self.is_ready.wait()

    async def hears(self, name: str) -> dict[str, Any]:
        """Wait for a message to the supervisor; return its values."""

        def find() -> list[dict[str, Any]]:
            self.heard += self.supervisor.receive() or []
            return [values for found, values in self.heard if found == name]

        await until(find)
        return find()[-1]

    async def close(self) -> None:
        self.supervisor.close()
        if self.running is not None:
            await self.running
        asyncio.get_running_loop().remove_reader(self.channel.fileno())
        self.channel.close()


Make = Callable[..., Process]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Return a function that makes a process."""
    before, made = signal.getsignal(signal.SIGTERM), []
    monkeypatch.setattr(processes, "tune_interpreter", lambda: None)
    monkeypatch.setattr(processes, "reopen_log", lambda: None)

    def make(**options: Any) -> Process:
        made.append(Process(**options))
        return made[-1]

    yield make
    for each in made:
        await each.close()
    asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("is_coordinator", [False, True])
async def test_drain_ends_the_process_within_its_limit(make: Make, is_coordinator: bool) -> None:
    process = make(is_coordinator=is_coordinator)
    await process.start()
    process.server.drain.assert_not_awaited()
    process.supervisor.send("drain", limit=3.0, runs=60.0)
    assert process.running is not None
    await process.running
    process.server.drain.assert_awaited_once_with(3.0, 60.0)
    process.part.announce_end.assert_called_once_with()


async def test_lost_supervisor_drains_the_process_at_once(make: Make) -> None:
    process = make()
    await process.start()
    process.supervisor.close()
    assert process.running is not None
    await process.running
    process.server.drain.assert_awaited_once_with(0.0, 0.0)


async def test_sigterm_drains_a_worker_and_not_the_coordinator(make: Make) -> None:
    await make(is_coordinator=True).start()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    worker = make()
    await worker.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert worker.running is not None
    await worker.running
    worker.server.drain.assert_awaited_once_with(None, 0.0)


@pytest.mark.parametrize("is_coordinator", [False, True])
async def test_drain_during_the_start_cancels_it_and_waits_for_no_thread(
    make: Make, monkeypatch: pytest.MonkeyPatch, is_coordinator: bool
) -> None:
    monkeypatch.setattr(processes, "exit_at_once", Mock(side_effect=SystemError("ended")))
    process = make(is_coordinator=is_coordinator)
    process.server.start = AsyncMock(side_effect=asyncio.Event().wait)
    running = process.begin()
    await until(lambda: process.server.start.await_count)
    process.supervisor.send("drain", limit=3.0)
    process.running = None
    with pytest.raises(SystemError, match="ended"):
        await running
    assert not process.is_ready.is_set()
    process.server.drain.assert_not_awaited()


async def test_failed_start_is_raised(make: Make) -> None:
    process = make()
    process.server.start = AsyncMock(side_effect=ConfigError(["port"]))
    running, process.running = process.begin(), None
    with pytest.raises(ConfigError, match="port"):
        await running


async def test_process_listens_when_all_are_ready(make: Make) -> None:
    process = make()
    await process.start()
    names = [f"{number}.{'a' * 60}.example" for number in range(5_000)]
    waiting = asyncio.create_task(process.server.before_listening(names))
    assert await process.hears("ready") == {"names": names[:MAX_NAMES]}
    assert not waiting.done()
    process.supervisor.send("go")
    await waiting


@pytest.mark.parametrize(
    ("can_reload", "fault", "applied"),
    [(True, None, True), (True, ConfigError(["port"]), False), (False, ConfigError(["never read"]), True)],
)
async def test_reload_is_answered_with_its_outcome(
    make: Make, can_reload: bool, fault: Exception | None, applied: bool
) -> None:
    process = make()
    process.server.can_reload = can_reload
    process.server.reload_here.side_effect = fault
    await process.start()
    process.supervisor.send("reload")
    assert await process.hears("reloaded") == {"applied": applied}
    assert process.server.reload_here.await_count == can_reload


async def test_reload_by_the_control_socket_waits_for_the_workers(make: Make) -> None:
    process = make(is_coordinator=True)
    await process.start()
    for _ in range(2):  # the second one waits as well
        reloading = asyncio.create_task(process.server.on_reload_requested(True))
        assert await process.hears("reloaded") == {"applied": True}
        assert not reloading.done()
        process.supervisor.send("applied")
        await reloading
        process.heard.clear()


async def test_reload_by_the_control_socket_waits_no_longer_than_its_limit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "APPLIED_LIMIT", 0.0)
    process = make(is_coordinator=True)
    await process.start()
    await process.server.on_reload_requested(True)


async def test_refused_reload_by_the_control_socket_is_reported_and_waits_for_no_worker(make: Make) -> None:
    process = make(is_coordinator=True)
    await process.start()
    await process.server.on_reload_requested(False)
    assert await process.hears("reloaded") == {"applied": False}


async def test_coordinator_asks_for_a_drain_and_an_upgrade_and_hears_why_one_failed(make: Make) -> None:
    process = make(is_coordinator=True)
    await process.start()
    process.server.on_drain_requested(2.0)
    assert await process.hears("drain") == {"limit": 2.0}
    process.server.on_upgrade_requested()
    assert await process.hears("upgrade") == {}
    process.supervisor.send("upgrade_failed", reason="no memory")
    await until(lambda: process.server.upgrade_failure == "no memory")


async def test_coordinator_raises_the_alert_of_a_process_that_ended(make: Make) -> None:
    process = make(is_coordinator=True)
    await process.start()
    process.supervisor.send("ended", worker="2", reason="SIGKILL")
    raised = process.part.role.alerts.raise_
    await until(lambda: raised.call_count)
    assert (raised.call_args.args[0], raised.call_args.kwargs["about"]) == (
        AlertKind.WORKER_ENDED,
        "worker 2",
    )


async def test_worker_leaves_the_sockets_to_the_successor(make: Make) -> None:
    process = make()
    await process.start()
    process.supervisor.send("leave")
    await until(lambda: process.server.leave.call_count)


async def test_process_beats_several_times_within_the_limit_of_hung_ones(make: Make) -> None:
    process = make(hang_limit=0.03)
    await process.start()
    await until(lambda: (process.heard.extend(process.supervisor.receive() or ()), len(process.heard) > 3)[1])
    assert {name for name, _ in process.heard} == {"beat"}


async def test_worker_checks_certificates_when_the_coordinator_serves_new_ones(make: Make) -> None:
    process = make()
    await process.start()
    process.part.topics.notices[CERTIFICATES](Mock())
    for connected in process.part.client.on_up:  # the coordinator may have been replaced
        connected(Mock())
    await until(lambda: process.server.parts.certificates.check.await_count == 2)
