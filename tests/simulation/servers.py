"""A server process: the product's own server above its TLS connections, on a loop of the simulation."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from tests.properties.nodes import MemoryPending
from tests.simulation.loop import SimulatedLoop
from zcproto.admin.parts import ActiveConfig
from zcproto.alerts.service import ServerAlerts
from zcproto.app.app import App
from zcproto.app.authentication import CallableAuthenticator
from zcproto.auth import Identity
from zcproto.common.deadlines import DeadlineWheel
from zcproto.config import Config
from zcproto.runs.log import RunTable
from zcproto.runs.store import MemoryRuns
from zcproto.runtime import build
from zcproto.server.durable import serve_runs
from zcproto.server.protocol import ServerProtocol
from zcproto.server.protocol_methods import protocol_methods
from zcproto.server.state import ServerState
from zcproto.stores.sync import StoreSync
from zcproto.testing.memory import NO_HOME

WALL = 1_800_000_000_000
MAX_SESSIONS = 2_000


class ProcessClock:
    """The clocks of a process. `offset_ms` is how wrong its wall clock is."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self.now = loop.time
        self.offset_ms = 0

    def wall(self) -> int:
        return WALL + round(self.now() * 1_000) + self.offset_ms


async def identify(user: Any = None, key: Any = None) -> Identity | None:
    """Accept every user whose key is the name."""
    await asyncio.sleep(0.001)
    return Identity(str(user)) if key == user else None


class Disk:
    """What survives a crash of a server."""

    def __init__(self) -> None:
        self.revocations: dict[Any, Any] = {}


class ServerProcess:
    """One run of a server. `open` starts it. It ends when its loop crashes, or with the simulation."""

    def __init__(self, loop: SimulatedLoop, app: App[Any], config: Config, link: Any, disk: Disk) -> None:
        self.loop, self.clock = loop, ProcessClock(loop)
        self._app, self._config, self.link, self._disk = app, config, link, disk
        self.state: ServerState | None = None
        self.sync: StoreSync | None = None

    @property
    def name(self) -> str:
        return self.loop.name

    async def open(self) -> None:
        config, clock, entropy = self._config, self.clock, self.loop.random.randbytes
        alerts = ServerAlerts(config.alerts, [], clock=clock, entropy=entropy)
        settings = replace(build.session_settings(config), max_sessions=MAX_SESSIONS, dead_limit=MAX_SESSIONS)
        wheel = DeadlineWheel(self.loop)
        pending = MemoryPending(self._disk.revocations)
        build.PendingRevocations, original = lambda path: pending, build.PendingRevocations
        try:
            state, self.sync = build.build_state(
                config, NO_HOME, settings, alerts, wheel, clock, entropy, self.link
            )
        finally:
            build.PendingRevocations = original
        state.run = self.name
        login = build.build_login(
            ActiveConfig(config), NO_HOME, state, [CallableAuthenticator("api_key", identify)], now=None
        ).login
        state.add_methods([*protocol_methods(state, login, app=self._app), *self._app])
        runs = MemoryRuns(RunTable(build.run_limits(config)), clock.now)
        serve_runs(state, runs, config.streams.durable_abandon_after)
        if self.sync is not None:
            await self.sync.start()
        self.state = state

    def accept(self) -> asyncio.Protocol:
        if self.state is None:
            raise ConnectionRefusedError
        return ServerProtocol(self.state)
