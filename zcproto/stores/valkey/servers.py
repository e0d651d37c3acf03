"""The servers behind a URL: one server, the primary that sentinels report, or a cluster.

Decides: which server gets a command, and when connections are dropped and made again.

Rules:
- Each server has one connection, which also carries its client tracking. A lost connection is made again in the
  background, and at once when a command needs it.
- Every reconnection is reported, because changes during the gap were not.
- A server that is not a primary is not used. Its role is read at every heartbeat, and the sentinels are asked
  whether it is still their primary: after a failover the old one accepts writes, which are lost, for about ten
  seconds (WATCH_ROLE in spec/store.pml).
- While a cluster moves a slot, a command for one key follows the key. A script waits until all keys of its slot are
  on one server. The cluster client of redis-py is not used: it runs the script on the new server, as if the keys
  that are still to be moved did not exist, and it has no client tracking.

It must not know: sessions, the content of scripts.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    ResponseError,
    TryAgainError,
)

from zcproto.common.backoff import backoff_s
from zcproto.errors import ConfigError
from zcproto.stores.base import HEARTBEAT_S, KeysMoving, StoreUnavailable
from zcproto.stores.valkey.link import LAST_CHECK_S, Link, OnMessage, Target
from zcproto.stores.valkey.url import Address

OPEN_TIMEOUT_S: Final = 2.0
MIN_MAJOR: Final = 7

_MIN_PAUSE_S: Final = 0.05
_REDIRECTS: Final = 16
_REDIRECT_PAUSE_S: Final = 0.01
_MOVING_S: Final = 0.1
"""How long a command waits for a slot that is moved, until its operation is begun again with a new time limit."""

_ASKED_S: Final = 10.0
"""How long a server is used that has got no slot yet, but keys of one."""

_SCRIPTS: Final = ("EVALSHA", "EVAL")
"""Commands that use more keys of the slot than the one by which a server redirects. They have to wait until all
keys of the slot are moved: the new server would run them as if those that are missing did not exist."""

_MOVING: Final = "non local key"
"""The error of a script that found some of its keys moved to another server."""

_PATIENCE: Final = 0.25
"""The part of the time limit given to sentinels that have not answered while others have."""

Division = tuple[list[Address | None], set[Address]]
"""The server of each slot, and all servers that have slots."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a connection needs from the store. `timeout` is in seconds, for connecting."""

    timeout: float
    prepare: Callable[[Link, bool], Awaitable[None]]
    """The flag is True if all keys of the server were deleted deliberately meanwhile."""
    on_keys_changed: Callable[[list[bytes]], None]
    on_lost: Callable[[], None]
    """Called when a connection is lost, and again before each attempt to make a new one in the background."""
    on_reconnected: Callable[[], None]
    """Called before anything is sent on the new connection."""
    on_message: OnMessage = lambda channel, message: None
    """Called with a message of a channel, or None if another server has the channel now."""


class NotPrimary(StoreUnavailable):
    """The server is not, or no longer, the primary."""


class ValkeyConnection:
    """A connection to a server that is made again whenever it is lost.

    The server is `target`, or the primary that the sentinels report.
    """

    def __init__(self, target: Target | Sentinels, hooks: Hooks, *, clustered: bool = False) -> None:
        self._sentinels = target if isinstance(target, Sentinels) else None
        self._target = target if isinstance(target, Target) else None
        self._hooks = hooks
        self._clustered = clustered
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._closed = False
        self._was_flushed = False

    @property
    def up(self) -> Link | None:
        """The current connection, if it is up."""
        return self._link if self._link is not None and not self._link.lost else None

    async def open(self) -> None:
        """Connect for the first time, without `on_reconnected`. Leaves no connection open if it fails."""
        try:
            self._link = await self._connect(OPEN_TIMEOUT_S)
        except BaseException:
            if self._sentinels is not None:
                await self._sentinels.close()
            raise
        self.watch()

    def watch(self) -> None:
        """Reconnect in the background from now on."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch())

    async def close(self) -> None:
        self._closed = True
        tasks = [task for task in (self._watcher, self._connecting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()
        if self._sentinels is not None:
            await self._sentinels.close()

    async def link(self) -> Link:
        """Return the connection, or make a new one."""
        while (link := self.up) is not None:
            if not link.is_silent:
                return link
            await asyncio.sleep(LAST_CHECK_S)
        joined = self._connecting is not None
        while True:
            if self._closed:
                raise StoreUnavailable("it is closed")
            task = self._connecting or self._start()
            await asyncio.wait({task})
            if task.cancelled():
                continue
            if not joined or task.exception() is None:
                return task.result()
            joined = False  # that attempt began before this call; the server may have come back since

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        """Send a command as in `Cluster.call`; the key does not matter."""
        return await (await self.link()).call(*command)

    def lose(self, reason: str) -> None:
        if self._link is not None:
            self._link.lose(reason)

    def _start(self) -> asyncio.Task[Link]:
        task = self._connecting = asyncio.get_running_loop().create_task(self._reconnect())
        task.add_done_callback(self._connected)
        return task

    def _connected(self, task: asyncio.Task[Link]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # retrieved, in case no caller waits for it

    async def _reconnect(self) -> Link:
        before = self._link
        if before is not None:
            await before.close()
        self._link = link = await self._connect(self._hooks.timeout)
        self._was_flushed = False
        self._hooks.on_reconnected()
        return link

    async def _connect(self, within: float) -> Link:
        where = "the server"
        try:
            async with asyncio.timeout(within):
                target = self._target = await self._find()
                where = repr(target)
                hooks = self._hooks
                link = await Link.connect(
                    target, hooks.timeout, self._keys_changed, self._lost.set, hooks.on_message
                )
                try:
                    await check_server(link, clustered=self._clustered)
                    await self._hooks.prepare(link, self._was_flushed)
                except BaseException:
                    await link.close()
                    raise
                return link
        except TimeoutError:
            raise StoreUnavailable(f"{where}: no connection within {within * 1000:.0f} ms") from None
        except NoPermissionError as error:
            raise ConfigError(
                [f"store.url: {where} does not permit this user a command that zcproto needs: {error}"]
            ) from None
        except ResponseError as error:
            raise StoreUnavailable(f"{where}: {error}") from None

    async def _find(self) -> Target:
        if self._sentinels is not None:
            return await self._sentinels.primary()
        assert self._target is not None
        return self._target

    def _keys_changed(self, keys: list[bytes] | None) -> None:
        if keys is None:
            self._was_flushed = True
            self.lose("all its keys were deleted")
        else:
            self._hooks.on_keys_changed(keys)

    async def _watch(self) -> None:
        failures = 0
        while True:
            link = self.up
            if link is not None:
                failures = 0
                await self._await_loss(link)
                continue
            self._hooks.on_lost()
            try:
                await self.link()
            except (StoreUnavailable, ConfigError):
                failures += 1
                await asyncio.sleep(backoff_s(failures, _MIN_PAUSE_S, HEARTBEAT_S))

    async def _await_loss(self, link: Link) -> None:
        """Wait until the connection is lost, or check after one heartbeat whether it is to the primary."""
        self._lost.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._lost.wait()
        with suppress(TimeoutError, StoreUnavailable, ResponseError, ConfigError):  # any reply will do
            async with asyncio.timeout(self._hooks.timeout):
                await self._confirm(link)

    async def confirm(self) -> None:
        """Check that the server is the primary, without a time limit. Raises as `call` does."""
        await self._confirm(await self.link())

    async def _confirm(self, link: Link) -> None:
        try:
            await check_server(link, clustered=self._clustered)
            found = self._target
            # Sentinels that do not answer do not make the primary unusable.
            with suppress(TimeoutError, StoreUnavailable, ResponseError, ConfigError):
                async with asyncio.timeout(self._hooks.timeout / 2):
                    found = await self._find()
            if found != self._target:
                raise NotPrimary("the sentinels report another primary")
        except NotPrimary as error:
            link.lose(error.reason)
            raise


class Sentinels:
    """The sentinels at `addresses`, which monitor `service`. `within` is in seconds, for all answers.

    All of them are asked, on connections that are kept. The answer with the highest configuration epoch counts: a
    sentinel that was cut off reports the primary of an earlier one. They report a new primary as soon as it is
    promoted, before `+switch-master` is published.
    """

    def __init__(
        self, addresses: tuple[Address, ...], service: str, target: Callable[[Address], Target], within: float
    ) -> None:
        self._addresses = addresses
        self._service = service
        self._target = target
        self._patience = within * _PATIENCE
        self._links: dict[Address, Link] = {}
        self._lock = asyncio.Lock()

    async def primary(self) -> Target:
        """Return the current primary, without a time limit. Raises StoreUnavailable or ConfigError."""
        async with self._lock:
            tasks = [asyncio.ensure_future(self._ask(address)) for address in self._addresses]
            try:
                done, left = await asyncio.wait(tasks, timeout=self._patience)
                while left and all(task.exception() is not None for task in done):
                    more, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                    done |= more
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        answers = [task.result() for task in tasks if task in done and task.exception() is None]
        if answers:
            return self._target(max(answers, key=lambda answer: answer[0])[1])
        errors = [task.exception() for task in tasks]
        error = next((error for error in errors if isinstance(error, ConfigError)), errors[0])
        assert error is not None
        raise error

    async def close(self) -> None:
        async with self._lock:
            links, self._links = list(self._links.values()), {}
            await asyncio.gather(*(link.close() for link in links))

    async def _ask(self, address: Address) -> tuple[int, Address]:
        """Return the configuration epoch and the primary that one sentinel reports."""
        target = self._target(address)
        target.database = 0
        link = self._links.get(address)
        if link is not None and not link.lost:
            return await self._query(link, target)
        try:
            return await self._connect(Target(target.host, target.port, tls=target.tls), address)
        except (ConfigError, ResponseError):  # it requires a login
            return await self._connect(target, address)

    async def _connect(self, target: Target, address: Address) -> tuple[int, Address]:
        link = await Link.connect(target, self._patience)
        try:
            answer = await self._query(link, target)
        except BaseException:
            await link.close()
            raise
        self._links[address] = link
        return answer

    async def _query(self, link: Link, target: Target) -> tuple[int, Address]:
        found: Any
        about: Any
        found, about = await asyncio.gather(
            link.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service),
            link.call("SENTINEL", "MASTER", self._service),
            return_exceptions=True,
        )
        if isinstance(found, BaseException):
            raise found
        if not found:
            raise StoreUnavailable(f"the sentinel {target} does not monitor a service of this name")
        # Without permission for the second command, the answers of the other sentinels are preferred.
        epoch = -1 if isinstance(about, BaseException) else int(about[b"config-epoch"])
        host, port = found
        return epoch, (host.decode("utf-8", "replace"), int(port))


async def check_server(link: Link, *, clustered: bool) -> None:
    """Check that a server can store sessions. Raises StoreUnavailable, or ConfigError."""
    hello = await link.call("HELLO")
    about = {_text(name): _text(value) for name, value in hello.items()}
    major = re.match(r"\d+", about.get("version", ""))
    if major is not None and int(major[0]) < MIN_MAJOR:
        raise ConfigError(
            [f"store.url: the server has version {about['version']}; install {MIN_MAJOR} or later"]
        )
    if about.get("mode") == "sentinel":
        raise ConfigError(["store.url: the server is a sentinel; write redis+sentinel://host,host/service"])
    is_cluster = about.get("mode") == "cluster"
    if is_cluster and not clustered:
        raise ConfigError(["store.url: the server belongs to a cluster; write redis+cluster://host,host"])
    if clustered and not is_cluster:
        raise ConfigError(["store.url: the server does not belong to a cluster; write redis://host"])
    if about.get("role") not in ("master", "primary"):
        raise NotPrimary("the server is a replica, which cannot be written to")


class Cluster:
    """All servers of a cluster that have slots. The `key` of a command selects the server."""

    def __init__(
        self, addresses: tuple[Address, ...], target: Callable[[Address], Target], hooks: Hooks
    ) -> None:
        self._seeds = addresses
        self._target = target
        self._hooks = hooks
        self._connections: dict[Address, ValkeyConnection] = {}
        self._slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._asked: dict[Address, float] = {}  # servers that get a slot, with until when they are used
        self._refreshing: asyncio.Task[None] | None = None
        self._closed = False
        self._refresher: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect. Raises StoreUnavailable, or ConfigError for a fault that retrying cannot fix."""
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._use(await self._query())
                opening = [connection.open() for connection in self._connections.values()]
                for error in await asyncio.gather(*opening, return_exceptions=True):
                    if error is not None:
                        raise error
        except TimeoutError:
            await self.close()
            raise StoreUnavailable("the cluster's nodes do not answer") from None
        except BaseException:
            await self.close()
            raise
        self._refresher = asyncio.get_running_loop().create_task(self._refresh_forever())

    async def close(self) -> None:
        self._closed = True
        tasks = [task for task in (self._refresher, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        connections, self._connections = list(self._connections.values()), {}
        await asyncio.gather(*(connection.close() for connection in connections))

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        """Send a command, without a time limit. Raises ResponseError, StoreUnavailable, ConfigError.

        KeysMoving: the slot of the key is moved to another server.
        """
        slot, loop = key_slot(key), asyncio.get_running_loop()
        began, redirects = 0.0, 0
        while True:
            address = self._slots[slot]
            if self._closed:
                raise StoreUnavailable("it is closed")
            if address is None:
                raise StoreUnavailable("the cluster has no server for some of the slots")
            try:
                link = await self._connection(address).link()
            except (StoreUnavailable, ConfigError):
                await asyncio.wait({self._refresh()})
                if self._slots[slot] == address:
                    raise
                continue
            try:
                return await link.call(*command)
            except MovedError as moved:
                self._slots[slot] = self._address(moved, address)
                self._refresh()
                redirects += 1
                if redirects < _REDIRECTS:
                    continue
            except AskError as ask:
                if command[0] not in _SCRIPTS or not await link.call("CLUSTER", "COUNTKEYSINSLOT", slot):
                    with suppress(TryAgainError, AskError):
                        return await self._ask(self._address(ask, address), command)
            except ClusterDownError as error:
                redirects += 1
                if redirects >= _REDIRECTS:
                    raise StoreUnavailable(f"the cluster is down: {error}") from None
                self._refresh()
                await asyncio.sleep(_REDIRECT_PAUSE_S)
                continue
            except TryAgainError:
                pass
            except ResponseError as error:
                if _MOVING not in str(error):
                    raise
            began = began or loop.time()
            if loop.time() >= began + _MOVING_S:
                raise KeysMoving("the cluster is moving its keys; try again")
            await asyncio.sleep(_REDIRECT_PAUSE_S)

    async def _ask(self, address: Address, command: Sequence[bytes | str | int]) -> Any:
        """Send a command for a slot to the server that the slot is moved to."""
        self._asked[address] = asyncio.get_running_loop().time() + _ASKED_S
        link = await self._connection(address).link()
        asking = link.send("ASKING")
        try:
            return await link.call(*command)
        finally:
            await asyncio.gather(asking, return_exceptions=True)

    async def ping(self) -> None:
        """Wait for an answer from every server. Raises like `call`."""
        await asyncio.gather(*(each.call(b"", "PING") for each in list(self._connections.values())))

    async def confirm(self) -> None:
        """Check that the servers are primaries, as `ValkeyConnection.confirm` does."""
        await asyncio.gather(*(connection.confirm() for connection in self._connections.values()))

    def lose(self, reason: str) -> None:
        """Drop all connections and make new ones."""
        for connection in self._connections.values():
            connection.lose(reason)
        self._refresh()

    def _address(self, redirect: AskError, sender: Address) -> Address:
        host, port = redirect.node_addr
        return (host or sender[0], int(port))

    def _connection(self, address: Address) -> ValkeyConnection:
        connection = self._connections.get(address)
        if connection is None:
            connection = ValkeyConnection(self._target(address), self._hooks, clustered=True)
            self._connections[address] = connection
            if self._refresher is not None:  # the first ones are opened by `open`
                connection.watch()
        return connection

    def _use(self, division: Division) -> list[ValkeyConnection]:
        """Adopt a division of slots. Return the connections that are no longer needed."""
        self._slots, wanted = division
        now = asyncio.get_running_loop().time()
        self._asked = {address: until for address, until in self._asked.items() if now < until}
        unneeded = [
            self._connections.pop(address)
            for address in list(self._connections)
            if address not in wanted and address not in self._asked
        ]
        for address in wanted:
            self._connection(address)
        return unneeded

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await asyncio.wait({self._refresh()})

    def _refresh(self) -> asyncio.Task[None]:
        """Read the division of slots again; one refresh runs at a time."""
        if self._refreshing is None:
            self._refreshing = asyncio.get_running_loop().create_task(self._update())
        return self._refreshing

    async def _update(self) -> None:
        try:
            async with asyncio.timeout(self._hooks.timeout):
                division = await self._query()
            for connection in [] if self._closed else self._use(division):
                await connection.close()
        except (TimeoutError, StoreUnavailable, ConfigError):
            pass  # the known servers stay; each command will report its own failure
        finally:
            self._refreshing = None

    async def _query(self) -> Division:
        """Return the division of slots from the first server that answers."""
        queries: list[Coroutine[Any, Any, Division]] = [
            self._query_one(address, link)
            for address, connection in self._connections.items()
            if (link := connection.up) is not None
        ]
        if not queries:
            queries = [self._query_one(address, None) for address in {*self._seeds, *self._connections}]
        division: Division = await _first_of(queries)
        return division

    async def _query_one(self, address: Address, link: Link | None) -> Division:
        target, query = self._target(address), ("CLUSTER", "SLOTS")
        try:
            if link is None:
                ranges = await _call_once(target, self._hooks.timeout, *query)
            else:
                ranges = await link.call(*query)
        except ResponseError as error:
            raise ConfigError([f"store.url: {target} does not belong to a cluster: {error}"]) from None
        slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        owners: set[Address] = set()
        for first, last, primary, *_ in ranges:
            host = _text(primary[0] or b"")
            owner = (host if host not in ("", "?") else address[0], int(primary[1]))
            slots[first : last + 1] = [owner] * (last + 1 - first)
            owners.add(owner)
        if not owners:
            raise StoreUnavailable("the cluster has no slots yet")
        return slots, owners


async def _call_once(target: Target, within: float, *command: str) -> Any:
    """Send a command on a new connection, and close it."""
    link = await Link.connect(target, within)
    try:
        return await link.call(*command)
    finally:
        await link.close()


async def _first_of(coroutines: list[Coroutine[Any, Any, Any]]) -> Any:
    """Return the first result, or raise the first error if all fail."""
    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(coroutine) for coroutine in coroutines]
    left = set(tasks)
    try:
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                if task.exception() is None:
                    return task.result()
        errors = [task.exception() for task in tasks]
        error = next((error for error in errors if isinstance(error, ConfigError)), errors[0])
        assert error is not None
        raise error
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
