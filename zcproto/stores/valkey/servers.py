"""The servers behind an address: one, the one that sentinels name, or those of a cluster.

What this file decides: which server a command goes to, and when connections are made again.

Rules:
- Each server has one connection, on which it also tells what others changed. It is made again in the background
  when it is lost, and at once when a command needs it.
- Whoever hears of changes is told of each gap: what happened meanwhile is not known.
- A server that is no primary is not used.

It must not know: sessions, scripts' contents.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, Protocol

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MovedError,
    NoPermissionError,
    ResponseError,
    TryAgainError,
)

from zcproto.errors import ConfigError
from zcproto.stores.base import StoreUnavailable
from zcproto.stores.valkey.link import LAST_LOOK_S, Link, Target
from zcproto.stores.valkey.url import Address

OPEN_TIMEOUT_S: Final = 2.0
HEARTBEAT_S: Final = 0.4
"""How often a server has to show that it is there: with the timeout, well within a second."""
MIN_MAJOR: Final = 7

_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 1.0
_REDIRECTS: Final = 16
_REDIRECT_PAUSE_S: Final = 0.01
CLUSTER_SHARDS: Final = 16
_MOVING: Final = "non local key"
"""What a script says that found some of its keys gone to another server."""

Division = tuple[list[Address | None], set[Address]]
"""Which server has each slot, and all that have any."""

News = Callable[[list[bytes]], None]
Prepare = Callable[[Link, bool], Awaitable[None]]
"""Makes a new connection ready; True if somebody had all keys of its server removed meanwhile."""


class Servers(Protocol):
    """Where commands go. A command is bytes, text and numbers; `key` says which server has it."""

    @property
    def shards(self) -> int:
        """Into how many keys a large index is divided."""
        ...

    @property
    def clustered(self) -> bool: ...

    async def open(self) -> None:
        """Connect. Raises StoreUnavailable, or ConfigError for what waiting cannot mend."""
        ...

    async def close(self) -> None: ...

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        """Send a command. Raises ResponseError, StoreUnavailable, ConfigError; takes as long as it takes."""
        ...

    def lose(self, reason: str) -> None:
        """Give up all connections, and make new ones."""
        ...


class Line:
    """A connection to a server that is made again whenever it is lost.

    `find` says where the server is, `prepare` makes a new connection ready. `on_gap` is called when one was made
    again, before anything is sent on it.
    """

    def __init__(
        self,
        find: Callable[[], Awaitable[Target]],
        prepare: Prepare,
        timeout: float,
        on_news: News,
        on_gap: Callable[[], None],
    ) -> None:
        self._find = find
        self._prepare = prepare
        self._timeout = timeout
        self._on_news = on_news
        self._on_gap = on_gap
        self._link: Link | None = None
        self._connecting: asyncio.Task[Link] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._lost = asyncio.Event()
        self._closed = False
        self._was_flushed = False

    @property
    def up(self) -> Link | None:
        """The connection, if there is one."""
        return self._link if self._link is not None and not self._link.lost else None

    async def open(self) -> None:
        """Connect for the first time: there was nothing to miss before. Nothing is left behind if it fails."""
        self._link = await self._connect(OPEN_TIMEOUT_S)
        self.keep()

    def keep(self) -> None:
        """See to it from now on that there is a connection."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        self._closed = True
        tasks = [task for task in (self._keeper, self._connecting) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.close()

    async def link(self) -> Link:
        """The connection; a new one if there is none."""
        while (link := self.up) is not None:
            if not link.is_silent:
                return link
            await asyncio.sleep(LAST_LOOK_S)
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
            joined = False  # that try began before we asked: the server may have come back since

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
            task.exception()  # it was told to whoever waited for it; nobody may have

    async def _reconnect(self) -> Link:
        before = self._link
        if before is not None:
            await before.close()
        self._link = link = await self._connect(self._timeout)
        self._was_flushed = False
        self._on_gap()
        return link

    async def _connect(self, within: float) -> Link:
        where = "the server"
        try:
            async with asyncio.timeout(within):
                target = await self._find()
                where = repr(target)
                link = await Link.connect(target, self._timeout, self._take_news, self._lost.set)
                try:
                    await self._prepare(link, self._was_flushed)
                except BaseException:
                    await link.close()
                    raise
                return link
        except TimeoutError:
            raise StoreUnavailable(f"{where}: no connection within {within * 1000:.0f} ms") from None
        except NoPermissionError as error:
            raise ConfigError(
                [f"store.url: {where} does not allow this user what it takes: {error}"]
            ) from None
        except ResponseError as error:
            raise StoreUnavailable(f"{where}: {error}") from None

    def _take_news(self, keys: list[bytes] | None) -> None:
        if keys is None:
            self._was_flushed = True
            self.lose("all its keys were removed")
        else:
            self._on_news(keys)

    async def _keep(self) -> None:
        pause = _FIRST_PAUSE_S
        while True:
            link = self.up
            if link is not None:
                pause = _FIRST_PAUSE_S
                await self._watch(link)
                continue
            try:
                await self.link()
            except (StoreUnavailable, ConfigError):
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _watch(self, link: Link) -> None:
        """Return when the connection is lost, or after one heartbeat."""
        self._lost.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(HEARTBEAT_S):
                await self._lost.wait()
        with suppress(TimeoutError, StoreUnavailable, ResponseError):  # what it answers does not matter
            async with asyncio.timeout(self._timeout):
                await link.call("PING")


async def check_server(link: Link, *, cluster: bool) -> None:
    """See whether this server can keep sessions. Raises StoreUnavailable, or ConfigError."""
    hello = await link.call("HELLO")
    about = {_text(name): _text(value) for name, value in hello.items()}
    major = re.match(r"\d+", about.get("version", ""))
    if major is not None and int(major[0]) < MIN_MAJOR:
        raise ConfigError(
            [f"store.url: the server is too old: {about['version']}; it takes {MIN_MAJOR} or later"]
        )
    if about.get("mode") == "sentinel":
        raise ConfigError(["store.url: the server is a sentinel; write redis+sentinel://host,host/service"])
    is_cluster = about.get("mode") == "cluster"
    if is_cluster and not cluster:
        raise ConfigError(["store.url: the server is one of a cluster; write redis+cluster://host,host"])
    if cluster and not is_cluster:
        raise ConfigError(["store.url: the server is in no cluster; write redis://host"])
    if about.get("role") not in ("master", "primary"):
        raise StoreUnavailable("the server is a replica, which cannot be written to")


class SingleServer:
    """One server, or the one that sentinels name."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Target]],
        *,
        timeout: float,
        prepare: Prepare,
        on_news: News,
        on_gap: Callable[[], None],
    ) -> None:
        self._prepare = prepare
        self._line = Line(find, self._ready, timeout, on_news, on_gap)

    @property
    def shards(self) -> int:
        return 1

    @property
    def clustered(self) -> bool:
        return False

    async def open(self) -> None:
        await self._line.open()

    async def close(self) -> None:
        await self._line.close()

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        link = await self._line.link()
        return await link.call(*command)

    def lose(self, reason: str) -> None:
        self._line.lose(reason)

    async def _ready(self, link: Link, was_flushed: bool) -> None:
        await check_server(link, cluster=False)
        await self._prepare(link, was_flushed)


class Sentinels:
    """Those that know which server is the primary of a service."""

    def __init__(
        self,
        addresses: tuple[Address, ...],
        service: str,
        target: Callable[[Address], Target],
        timeout: float,
    ) -> None:
        self._addresses = addresses
        self._service = service
        self._target = target
        self._timeout = timeout

    async def find(self) -> Target:
        """Ask all; the first that knows is believed. Raises StoreUnavailable or ConfigError."""
        target: Target = await _first_of([self._ask(address) for address in self._addresses])
        return target

    async def _ask(self, address: Address) -> Target:
        target = self._target(address)
        target.database = 0
        try:
            found = await self._master(Target(target.host, target.port, tls=target.tls))
        except (ConfigError, ResponseError):  # it wants to know who asks
            found = await self._master(target)
        if not found:
            raise StoreUnavailable(f"the sentinel {target} knows no service of this name")
        host, port = found
        return self._target((_text(host), int(port)))

    async def _master(self, target: Target) -> list[bytes] | None:
        link = await Link.connect(target, self._timeout)
        try:
            found: list[bytes] | None = await link.call("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._service)
            return found
        finally:
            await link.close()


class Cluster:
    """All servers of a cluster that have sessions."""

    def __init__(
        self,
        addresses: tuple[Address, ...],
        target: Callable[[Address], Target],
        *,
        timeout: float,
        prepare: Prepare,
        on_news: News,
        on_gap: Callable[[], None],
    ) -> None:
        self._seeds = addresses
        self._target = target
        self._timeout = timeout
        self._prepare = prepare
        self._on_news = on_news
        self._on_gap = on_gap
        self._lines: dict[Address, Line] = {}
        self._slots: list[Address | None] = [None] * REDIS_CLUSTER_HASH_SLOTS
        self._refreshing: asyncio.Task[None] | None = None
        self._closed = False
        self._keeper: asyncio.Task[None] | None = None

    @property
    def shards(self) -> int:
        return CLUSTER_SHARDS

    @property
    def clustered(self) -> bool:
        return True

    async def open(self) -> None:
        try:
            async with asyncio.timeout(OPEN_TIMEOUT_S):
                self._take(await self._ask())
                lines = [line.open() for line in self._lines.values()]
                for error in await asyncio.gather(*lines, return_exceptions=True):
                    if error is not None:
                        raise error
        except TimeoutError:
            await self.close()
            raise StoreUnavailable("the cluster's nodes do not answer") from None
        except BaseException:
            await self.close()
            raise
        self._keeper = asyncio.get_running_loop().create_task(self._keep())

    async def close(self) -> None:
        self._closed = True
        tasks = [task for task in (self._keeper, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        lines, self._lines = list(self._lines.values()), {}
        await asyncio.gather(*(line.close() for line in lines))

    async def call(self, key: bytes, *command: bytes | str | int) -> Any:
        slot = key_slot(key)
        for _ in range(_REDIRECTS):
            address = self._slots[slot]
            if self._closed:
                raise StoreUnavailable("it is closed")
            if address is None:
                raise StoreUnavailable("the cluster has no server for some of the sessions")
            try:
                link = await self._line(address).link()
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
            except AskError as ask:
                link = await self._line(self._address(ask, address)).link()
                asking = link.send("ASKING")
                try:
                    return await link.call(*command)
                except (TryAgainError, AskError):
                    await asyncio.sleep(_REDIRECT_PAUSE_S)
                finally:
                    await asyncio.gather(asking, return_exceptions=True)
            except (TryAgainError, ClusterDownError):
                await asyncio.sleep(_REDIRECT_PAUSE_S)
            except ResponseError as error:
                if _MOVING not in str(error):
                    raise
                await asyncio.sleep(_REDIRECT_PAUSE_S)
        raise StoreUnavailable("the cluster is moving its keys")

    def lose(self, reason: str) -> None:
        for line in self._lines.values():
            line.lose(reason)
        self._refresh()

    # Parts

    def _address(self, redirect: AskError, asked: Address) -> Address:
        host, port = redirect.node_addr
        return (host or asked[0], int(port))

    def _line(self, address: Address) -> Line:
        line = self._lines.get(address)
        if line is None:
            line = self._lines[address] = self._new_line(address)
            line.keep()
        return line

    def _new_line(self, address: Address) -> Line:
        async def find() -> Target:
            return self._target(address)

        return Line(find, self._ready, self._timeout, self._on_news, self._on_gap)

    async def _ready(self, link: Link, was_flushed: bool) -> None:
        await check_server(link, cluster=True)
        await self._prepare(link, was_flushed)

    def _take(self, division: Division) -> list[Line]:
        """Use this division of slots; the connections that are of no use any more."""
        self._slots, wanted = division
        gone = [self._lines.pop(address) for address in list(self._lines) if address not in wanted]
        for address in wanted - set(self._lines):
            self._lines[address] = self._new_line(address)
            if self._keeper is not None:
                self._lines[address].keep()
        return gone

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            await asyncio.wait({self._refresh()})

    def _refresh(self) -> asyncio.Task[None]:
        """Look at the cluster; one look at a time."""
        task = self._refreshing
        if task is None:
            task = self._refreshing = asyncio.get_running_loop().create_task(self._look())
        return task

    async def _look(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                division = await self._ask()
            for line in [] if self._closed else self._take(division):
                await line.close()
        except (TimeoutError, StoreUnavailable, ConfigError):
            pass  # the servers that are known stay; each command finds out for itself
        finally:
            self._refreshing = None

    async def _ask(self) -> Division:
        """Which server has which slot: what the first says that answers."""
        asks: list[Coroutine[Any, Any, Division]] = [
            self._ask_one(address, link)
            for address, line in self._lines.items()
            if (link := line.up) is not None
        ]
        if not asks:
            asks = [self._ask_one(address, None) for address in {*self._seeds, *self._lines}]
        division: Division = await _first_of(asks)
        return division

    async def _ask_one(self, address: Address, link: Link | None) -> Division:
        new = None if link is not None else await Link.connect(self._target(address), self._timeout)
        link = link or new
        assert link is not None
        try:
            ranges = await link.call("CLUSTER", "SLOTS")
        except ResponseError as error:
            raise ConfigError([f"store.url: {self._target(address)} is in no cluster: {error}"]) from None
        finally:
            if new is not None:
                await new.close()
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


async def _first_of(coroutines: list[Coroutine[Any, Any, Any]]) -> Any:
    """The first result; the first error if there is none."""
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
