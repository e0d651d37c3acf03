"""A store of one kind and the servers that use it, as the fault matrix sees them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack, suppress
from pathlib import Path
from typing import Any, Final

from bench.deployments import Cluster, Deployment, WithSentinel
from bench.scenarios.helper import Helper
from bench.scenarios.matrix_cells import PER_USER, Place
from bench.scenarios.matrix_node import MatrixNode
from bench.stage import ECDSA_ONLY, HOST, Stage
from zcproto.errors import ZcprotoError
from zcproto.load.caller import LoadTarget

RECOVER_S: Final = 30.0
POLL_S: Final = 0.02

MEMORY: Final = "memory"
SQLITE: Final = "SQLite"
VALKEY: Final = "Valkey"
SENTINEL: Final = "Valkey with Sentinel"
CLUSTER: Final = "Valkey Cluster"
DEPLOYMENTS: Final[dict[str, type[Deployment]]] = {
    VALKEY: Deployment,
    SENTINEL: WithSentinel,
    CLUSTER: Cluster,
}
STORES: Final = (MEMORY, SQLITE, *DEPLOYMENTS)

SETTINGS: Final = {
    **ECDSA_ONLY,
    "server.port": 0,
    "sessions.per_user": PER_USER,
    # Nothing ends a session to make room, not even while its client connects again:
    "sessions.when_full": "refuse",
    # Longer than the hour by which a clock is set:
    "sessions.idle_timeout": "6h",
    "sessions.refresh_grace": "1m",
    "limits.connections_per_address": 0,
    "limits.public_requests_per_address": 0,
}


class Node:
    """One of the servers, as its parent process sees it."""

    def __init__(self, name: str, stage: Stage, runs: Path) -> None:
        self.name = name
        self.home = stage.home.path
        self._arguments = self.home, runs
        self._ca_file = stage.ca_file
        self._stack = AsyncExitStack()
        self._target: LoadTarget | None = None
        self._helper: Helper | None = None

    @property
    def place(self) -> Place:
        return Place(self.name, self._current_target)

    def _current_target(self) -> LoadTarget:
        if self._target is None:
            raise ZcprotoError("the server does not run")
        return self._target

    async def start(self) -> None:
        helper = Helper(MatrixNode, *self._arguments, processor=None)
        self._helper = await self._stack.enter_async_context(helper)
        port = await helper.call("start")
        self._target = LoadTarget(HOST, HOST, port, self._ca_file)
        self._stack.callback(self._target.close)

    async def call(self, method: str, *arguments: Any) -> Any:
        if self._helper is None:
            raise ZcprotoError("the server does not run")
        return await self._helper.call(method, *arguments)

    async def kill(self) -> None:
        """Kill the process. Nothing happens if it does not run."""
        if self._helper is not None:
            self._helper.signal(signal.SIGKILL)
        self._helper = self._target = None
        stack, self._stack = self._stack, AsyncExitStack()
        await stack.aclose()

    async def restart(self) -> None:
        await self.kill()
        await self.start()

    def pause(self) -> None:
        assert self._helper is not None
        self._helper.signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._helper is not None
        self._helper.signal(signal.SIGCONT)

    async def write_uses(self) -> bool:
        try:
            return bool(await self.call("write_uses"))
        except ZcprotoError:
            return False


class Site:
    """A store of one kind and its servers."""

    def __init__(self, kind: str, folder: Path, pattern: Stage) -> None:
        self.kind = kind
        self._folder = folder
        self._pattern = pattern
        self.runs = folder / "runs"
        self.deployment: Deployment | None = None
        self.nodes: list[Node] = []

    @property
    def here(self) -> Node:
        return self.nodes[0]

    @property
    def is_shared(self) -> bool:
        return self.kind in DEPLOYMENTS

    @property
    def store(self) -> Deployment:
        assert self.deployment is not None
        return self.deployment

    async def in_thread(self, work: Callable[[], Any]) -> None:
        await asyncio.to_thread(work)

    def prepare(self, stack: ExitStack) -> None:
        """Start the store, and make the home folders of the servers."""
        self._folder.mkdir()
        self.runs.touch()
        url = self.kind.lower()
        if self.is_shared:
            self.deployment = stack.enter_context(DEPLOYMENTS[self.kind](self._folder))
            url = self.deployment.url
        for name in ("here", "elsewhere") if self.is_shared else ("here",):
            stage = self._pattern.copy(self._folder / name)
            stage.configure({**SETTINGS, "store.url": url})
            self.nodes.append(Node(name, stage, self.runs))

    async def start(self) -> None:
        await asyncio.gather(*(node.start() for node in self.nodes))
        await self.await_health()

    async def restart(self) -> None:
        await asyncio.gather(*(node.restart() for node in self.nodes))
        await self.await_health()

    async def repair(self) -> None:
        """Start everything that a round has left killed, stopped or full."""
        if self.deployment is not None:
            await self.in_thread(self.deployment.repair)
        await self.restart()

    async def stop(self) -> None:
        for node in self.nodes:
            await node.kill()

    async def await_health(self) -> dict[str, float]:
        """Wait until all servers reach the store. Return when each did."""

        async def healthy(node: Node) -> float:
            end = time.monotonic() + RECOVER_S
            while await node.call("health") != "healthy":
                if time.monotonic() > end:
                    raise ZcprotoError(f"the server {node.name} is not healthy within {RECOVER_S:g} s")
                await asyncio.sleep(POLL_S)
            return time.monotonic()

        return dict(
            zip(
                [node.name for node in self.nodes],
                await asyncio.gather(*map(healthy, self.nodes)),
                strict=True,
            )
        )

    async def hold(self, *directions: str) -> None:
        """Keep back what the first server sends to its store, or the answers, and let all else pass."""
        if self.kind == SQLITE:
            await self.here.call("hurt_disk", "hanging")
        elif self.is_shared:
            await self.here.call("hurt_network", directions)

    async def release(self, cut: bool) -> None:
        with suppress(ZcprotoError):  # it was killed
            if self.kind == SQLITE:
                await self.here.call("hurt_disk", "")
            elif self.is_shared:
                await self.here.call("hurt_network", (), 0.0, cut)
