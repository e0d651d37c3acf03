"""A coordinator and its workers in one event loop: what they share over their links."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

import zcproto
from tests.server.helpers import PATIENT_CLIENT, configuration
from tests.workers.hub_harness import until
from zcproto.auth import UserFile
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.common.unix_socket import listen_unix
from zcproto.errors import NotFound, Unavailable, ZcprotoError
from zcproto.runtime.server import Server
from zcproto.workers import fleet
from zcproto.workers.figures import FRESH_S, Member
from zcproto.workers.fleet import Membership
from zcproto.workers.hub import HubStore
from zcproto.workers.limits import SharedMemory, memory_size

WORKERS = 2
ADDRESS = ("192.0.2.1", 7443)


class Fleet:
    """A coordinator with the number 0, and its workers: the part and the server of each."""

    def __init__(self, folder: Path, certs: Path) -> None:
        self.home = Home(folder / "home")
        self.home.path.mkdir(mode=0o700)
        shutil.copytree(certs, self.home.certs)
        self.key = UserFile(self.home.users).add("ada")
        self.config = configuration(self.home.path, server__workers=WORKERS, limits__login_failures=1)
        self._memory = SharedMemory(bytearray(memory_size(WORKERS, 10)), WORKERS, 10, bytes(32))
        self._stacks: dict[int, AsyncExitStack] = {}
        self.parts: dict[int, Membership] = {}
        self.servers: dict[int, Server] = {}

    async def start(self, number: int, restarts: int = 0) -> None:
        """Start a process."""
        member = Member(number, 1_000 + 10 * number + restarts, restarts, 1)
        own: dict[str, Any] = {}
        if number:
            joining = fleet.worker(member, self.config, self.home.workers, self._memory.worker(number - 1))
        else:
            own["addresses"] = [ADDRESS]
            listening = listen_unix(self.home.workers, 4)
            joining = fleet.coordinator(member, WORKERS, listening, self.config, self.home)
        stack = self._stacks[number] = AsyncExitStack()
        part = self.parts[number] = await stack.enter_async_context(joining)
        server = Server(zcproto.App(), self.config, home=self.home.path, control=False, role=part.role, **own)
        self.servers[number] = await stack.enter_async_context(server)
        if not number:
            part.serve_parts(server.parts)

    async def stop(self, number: int) -> None:
        await self._stacks.pop(number).aclose()

    async def close(self) -> None:
        for number in sorted(self._stacks, reverse=True):
            await self.stop(number)

    async def lines(self, asked: int = 1) -> dict[str, dict[str, Any]]:
        """Return the lines of all processes in the status that one reports."""
        reports = self.servers[asked].parts.fleet
        assert reports is not None
        return {line["worker"]: line for line in (await reports.status())["workers"]}

    def client(self, number: int) -> zcproto.Client:
        """Return a client of a worker, with a session of ada."""
        address = f"localhost:{self.servers[number].port}"
        known = {"user": "ada", "key": self.key, "ca_file": self.home.certs / "ca.crt"}
        return zcproto.connect(address, **known, **PATIENT_CLIENT)

    def sessions(self) -> int:
        """Return how many sessions the server has, as the coordinator counts them."""
        store = self.parts[0].role.store
        assert isinstance(store, HubStore)
        return store._hub.sessions


@pytest.fixture
async def server(tmp_path: Path, certs: Path) -> AsyncIterator[Fleet]:
    made = Fleet(tmp_path, certs)
    for number in range(WORKERS + 1):
        await made.start(number)
    yield made
    await made.close()


async def test_any_process_reports_the_figures_of_all(server: Fleet) -> None:
    async with server.client(1):
        for number in range(WORKERS + 1):
            await asyncio.sleep(FRESH_S)
            lines = await server.lines(number)
            assert {name: line["state"] for name, line in lines.items()} == dict.fromkeys(
                ["coordinator", "1", "2"], "serving"
            )
            assert [lines[name]["pid"] for name in lines] == [1_000, 1_010, 1_020]
            assert [lines[name]["connections"] for name in ("1", "2")] == [1, 0]
        reports = server.servers[2].parts.fleet
        assert reports is not None
        assert (await reports.status())["sessions"]["live"] == (await reports.stats())["sessions"] == 1
        assert (await reports.readiness())["ready"]
        assert (await reports.status())["addresses"]
        assert (await reports.metrics()).series()["zcproto_sessions"]["live",] == 1


async def test_counters_of_a_worker_that_ends_stay_and_its_successor_takes_its_line(server: Fleet) -> None:
    async with server.client(2) as client:
        for _ in range(3):
            await client.call("server.info")
    await server.stop(2)
    await server.start(2, restarts=1)
    await until(lambda: len(server.parts[0].server.links) == 2 * WORKERS)  # type: ignore[union-attr]
    await asyncio.sleep(FRESH_S)
    reports = server.servers[1].parts.fleet
    assert reports is not None
    status = await reports.status()
    assert status["requests"]["total"] >= 4  # with the login
    (line,) = [line for line in status["workers"] if line["worker"] == "2"]
    assert (line["state"], line["restarts"], line["requests"]) == ("serving", 1, 0)


async def test_connections_of_a_session_are_found_in_the_other_workers(server: Fleet) -> None:
    async with server.client(1) as client:
        (session_id,) = server.servers[1].state.session_connections
        found = await server.servers[2].state.connections_elsewhere([session_id])
        assert len(found[session_id]) == 1
        assert (await server.servers[1].state.connections_elsewhere([session_id]))[session_id] == []
        assert await client.call("server.info")


async def test_removed_user_reported_by_a_worker_loses_the_sessions(server: Fleet) -> None:
    async with server.client(1) as client:
        assert server.sessions() == 1
        UserFile(server.home.users).disable("ada")
        await server.parts[2].role.report_gone(UserFile.kind, "ada", "ada")
        assert server.sessions() == 0
        with pytest.raises(ZcprotoError):
            await client.call("server.info")


async def test_failed_login_at_one_worker_delays_those_at_all(server: Fleet) -> None:
    for number in (1, 2):
        throttle, now = server.servers[number].parts.login.throttle, system_clock.now()
        checked = throttle.check("ada", "192.0.2.9", now)
        assert (checked if isinstance(checked, int) else await checked) == (0 if number == 1 else 1_000)
        if number == 1:
            counted = throttle.failed("ada", "192.0.2.9", now)
            assert counted is not None
            await counted


async def test_level_that_an_operator_sets_reaches_workers_now_and_later(
    server: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[str] = []
    monkeypatch.setattr(fleet, "set_level", levels.append)
    server.parts[0].share_log_level()
    await until(lambda: len(levels) == WORKERS)
    monkeypatch.setattr(fleet, "level", lambda: "debug")
    await server.stop(2)
    await server.start(2, restarts=1)
    await until(lambda: levels[WORKERS:] == ["debug"])


async def test_workers_check_certificates_when_the_coordinator_serves_new_ones(server: Fleet) -> None:
    noticed: list[int] = []
    for number in (1, 2):
        server.parts[number].topics.notices[fleet.CERTIFICATES] = lambda link, number=number: noticed.append(
            number
        )
    server.parts[0].certificates_changed()
    await until(lambda: sorted(noticed) == [1, 2])


async def test_workers_serve_on_and_join_again_when_the_coordinator_is_replaced(server: Fleet) -> None:
    async with server.client(1) as client:
        await server.stop(0)
        assert await client.call("server.info")
        with pytest.raises(Unavailable):
            await server.lines(1)
        await server.start(0, restarts=1)
        await until(lambda: len(server.parts[0].server.links) == 2 * WORKERS)  # type: ignore[union-attr]
        await asyncio.sleep(FRESH_S)
        assert {line["state"] for line in (await server.lines(1)).values()} == {"serving"}


async def test_coordinator_lists_and_decides_calls_by_any_worker(server: Fleet) -> None:
    calls = server.parts[0].role.calls
    assert calls is not None
    assert await calls.list(None) == ([], True)
    with pytest.raises(NotFound):
        await calls.decide("unknown", True, None, "root")
    for number in range(1, WORKERS + 1):
        await server.stop(number)
    with pytest.raises(Unavailable, match="no worker has answered"):
        await calls.list(None)
