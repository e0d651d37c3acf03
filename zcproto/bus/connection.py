"""A connection of a process to Valkey or Redis beside that of its sessions: scripts, and channels.

Decides: when it is up, and how long a command is repeated.

Rules:
- The servers are those of the session store, on a connection of their own: no session waits behind it.
- In a cluster channels are sharded. A server that gives a slot away ends its subscriptions, which are made again.
- A command without an answer loses the connection: whether it was executed is unknown.

It must not know: what scripts and channels are for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from hashlib import sha1
from typing import Any, Final

from redis.exceptions import AskError, MovedError, NoScriptError, ResponseError

from zcproto.common.backoff import backoff_s
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.stores.base import KeysMoving, StoreUnavailable
from zcproto.stores.valkey.link import Link, OnMessage
from zcproto.stores.valkey.servers import Cluster, Hooks, ValkeyConnection

LONGEST_PAUSE_S: Final = 1.0
MOVING_LIMIT_S: Final = 2.0

Connect = Callable[[Hooks], ValkeyConnection | Cluster]

log = get_logger(__name__)


class Script:
    """A script, which servers keep under its SHA-1."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()


class BusConnection:
    """The connection for one purpose, `name` in the log. `connect` returns the servers, not connected.

    `channel` is one that the user must be allowed to subscribe to. `timeout` is in seconds, for each command.
    `on_up` and `on_down` are called when the connection is made and lost, `on_message` as in `Hooks`.
    """

    def __init__(
        self,
        connect: Connect,
        name: str,
        channel: bytes,
        scripts: Sequence[Script],
        timeout: float,
        *,
        on_up: Callable[[], object],
        on_down: Callable[[], object],
        on_message: OnMessage,
    ) -> None:
        hooks = Hooks(timeout, self._prepare, lambda keys: None, self._lost, self._reconnected, on_message)
        self._connect = partial(connect, hooks)
        self._servers = self._connect()
        self._is_cluster = isinstance(self._servers, Cluster)
        self._name = name
        self._channel = channel
        self._scripts = scripts
        self._timeout = timeout
        self._on_up = on_up
        self._on_down = on_down
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_stopped = False
        self.is_up = False

    def start(self) -> None:
        """Connect, and stay connected."""
        self.begin(self._open())

    async def stop(self) -> None:
        """Disconnect, and cancel what was begun."""
        self._is_stopped = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._servers.close()

    async def check(self) -> None:
        """Connect, publish to the own channel, and disconnect. Raises StoreUnavailable, ConfigError."""
        try:
            await self._servers.open()
            await self.call(self._channel, self.command("PUBLISH"), self._channel, b"")
        except (ResponseError, TimeoutError) as error:
            raise ConfigError(
                [f"store.url: an event cannot be published: {str(error) or 'no answer'}"]
            ) from None
        finally:
            await self._servers.close()

    def begin(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine until `stop`."""
        task = asyncio.get_running_loop().create_task(work, name=f"zcproto-{self._name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def command(self, name: str) -> str:
        """Return the name of a command of channels, which are sharded in a cluster."""
        return f"S{name}" if self._is_cluster else name

    def lose(self, reason: str) -> None:
        """Drop the connection and make a new one."""
        self._servers.lose(reason)
        self._lost()

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        """Send a command, again while a cluster moves its keys. Raises TimeoutError, or as `Cluster.call`."""
        loop = asyncio.get_running_loop()
        until = loop.time() + MOVING_LIMIT_S
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._servers.call(key, *command)
            except KeysMoving:
                if loop.time() >= until:
                    raise

    async def run(self, script: Script, key: bytes, *arguments: bytes | str | int) -> Any:
        """Run a script whose keys are in the slot of `key`. Raises as `call`."""
        try:
            return await self.call(key, "EVALSHA", script.digest, 1, key, *arguments)
        except NoScriptError:  # the server was replaced, or its scripts flushed
            return await self.call(key, "EVAL", script.source, 1, key, *arguments)

    async def subscribe(self, channel: bytes) -> None:
        await self.call(channel, self.command("SUBSCRIBE"), channel)

    async def unsubscribe(self, channel: bytes) -> None:
        with suppress(StoreUnavailable, ConfigError, ResponseError, TimeoutError):
            await self.call(channel, self.command("UNSUBSCRIBE"), channel)

    async def _open(self) -> None:
        failures = 0
        while True:
            try:
                await self._servers.open()
                break
            except (StoreUnavailable, ConfigError) as error:
                failures += 1
                if failures == 1:
                    log.warning(f"{self._name}.away", reason=str(error))
            await asyncio.sleep(backoff_s(failures, self._timeout, LONGEST_PAUSE_S))
            self._servers = self._connect()
        self._found()

    async def _prepare(self, link: Link, was_flushed: bool) -> None:
        """Load the scripts, and find out whether this user may subscribe."""
        for script in self._scripts:
            await link.call("SCRIPT", "LOAD", script.source)
        with suppress(MovedError, AskError):
            await link.call(self.command("SUBSCRIBE"), self._channel)

    def _lost(self) -> None:
        if self.is_up:
            self.is_up = False
            if not self._is_stopped:
                log.warning(f"{self._name}.away", reason="the connection to the store was lost")
                self._on_down()

    def _reconnected(self) -> None:
        self._lost()  # a command may have needed the connection before its end was noticed
        self._found()

    def _found(self) -> None:
        if not self.is_up and not self._is_stopped:
            self.is_up = True
            log.info(f"{self._name}.back")
            self._on_up()
