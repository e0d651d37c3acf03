"""One server of the fault matrix, in a process of its own, with a clock, a network and a disk that can be hurt.

The network is a proxy in the process for each server of the store. It is frozen with the process.
"""

from __future__ import annotations

import asyncio
import os
import time
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from bench.disk import Disk
from bench.proxy import Proxy
from zcproto.app.app import App, default_app
from zcproto.common.clock import wall_ms
from zcproto.config import load_config
from zcproto.errors import CallError
from zcproto.observe.log import configure_logging
from zcproto.runtime import store_setup
from zcproto.runtime.server import Server
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.sqlite.store import SqliteStore
from zcproto.stores.valkey.link import Target

RUN: Final = "matrix.run"
"""The method of requests with a key. It appends the key to a file that all servers share."""

SLOW_S: Final = 1.0
"""Of a slow store: four times its timeout."""

SQLITE_ERRORS: Final = {
    "full": (13, "SQLITE_FULL"),
    "read-only": (8, "SQLITE_READONLY"),
}


class SteppedClock:
    """The system's clock, set forward or back by `offset_ms`."""

    now = staticmethod(time.monotonic)

    def __init__(self) -> None:
        self.offset_ms = 0

    def wall(self) -> int:
        return wall_ms() + self.offset_ms


class Network:
    """The way of this process to the servers of its store."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._proxies: dict[int, Proxy] = {}
        self._starting: set[asyncio.Task[Any]] = set()
        self._held: tuple[str, ...] = ()
        self._delay_s = 0.0

    def port(self, port: int) -> int:
        """Return the port of the proxy to a port of loopback."""
        proxy = self._proxies.get(port)
        if proxy is None:
            proxy = self._proxies[port] = Proxy(port)
            self._set(proxy)
            task = asyncio.get_running_loop().create_task(self._stack.enter_async_context(proxy))
            self._starting.add(task)
        return proxy.port

    def hurt(self, held: tuple[str, ...], delay_s: float, cut: bool) -> None:
        self._held, self._delay_s = held, delay_s
        for proxy in self._proxies.values():
            if cut:
                proxy.cut()
            self._set(proxy)

    def _set(self, proxy: Proxy) -> None:
        proxy.release()
        proxy.hold(*self._held)
        proxy.delay_s = self._delay_s


class MatrixNode:
    """The server. Its methods are called by the parent process."""

    def __init__(self, home: Path, runs: Path) -> None:
        self._home = home
        self._runs = runs
        self._clock = SteppedClock()
        self._disk = Disk()
        self._stack = AsyncExitStack()
        self._network = Network(self._stack)
        self._server: Server | None = None

    async def start(self) -> int:
        """Start the server and return its port."""
        config = load_config(None, home=self._home, environ=os.environ)
        configure_logging(config.log)
        connection = Target.connection

        def by_proxy(target: Target) -> Any:
            return connection(replace(target, host="127.0.0.1", port=self._network.port(target.port)))

        setattr(Target, "connection", by_proxy)  # noqa: B010 - a method of a class with slots
        setattr(store_setup, "SqliteStore", partial(SqliteStore, connect=self._disk.connect))  # noqa: B010
        self._server = Server(self._app(), config, home=self._home, clock=self._clock)
        await self._server.start()
        return self._server.port

    def _app(self) -> App:
        app = default_app()
        runs = os.open(self._runs, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        answers = 0

        @app.method(RUN)
        def run(key: str) -> str:
            nonlocal answers
            answers += 1
            os.write(runs, key.encode() + b"\n")
            return f"{os.getpid()}-{answers}"

        return app

    async def health(self) -> str:
        assert self._server is not None
        return str(self._server.state.sessions.statistics()["state"])

    async def set_clock(self, offset_ms: int) -> None:
        self._clock.offset_ms = offset_ms

    async def hurt_network(self, held: tuple[str, ...] = (), delay_s: float = 0.0, cut: bool = False) -> None:
        """Hold directions of all connections to the store, and delay the others. With `cut`, reset them first."""
        self._network.hurt(held, delay_s, cut)

    async def hurt_disk(self, fault: str) -> None:
        disk = self._disk
        disk.mend()
        disk.delay_s = SLOW_S if fault == "slow" else 0.0
        if fault == "hanging":
            disk.hang()
            return
        disk.go_on.set()
        if fault in SQLITE_ERRORS:
            disk.fail(*SQLITE_ERRORS[fault])

    async def write_uses(self) -> bool:
        """Write last uses to the store now. Return whether it has them."""
        assert self._server is not None
        sync = self._server.parts.store
        if sync is None:
            return True
        try:
            await sync.write_uses()
        except (StoreUnavailable, CallError):
            return False
        return True
