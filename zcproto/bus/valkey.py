"""The topics of several servers: one script in Valkey or Redis numbers and publishes the events of a topic.

    publish -> queue -> script: number, PUBLISH -> the channel of the topic -> `received`
    follow  -> SUBSCRIBE, then the last number -> `at`

Decides: the keys and the script; when a topic is followed again.

Rules:
- The servers are those of the session store, on a connection of their own: no session waits behind an event.
- The events of one turn of the loop are one script for each topic, and one script of a topic is sent after the
  other: events stay in order, also while a cluster moves its slots.
- In a cluster channels are sharded. A server that gives a slot away ends its subscriptions, which are made again.
- A script without an answer loses the connection: whether its events were published is unknown.
- Bodies are sealed. One that does not open counts as lost, and in `unreadable`.
- Events of servers that are slower than `client-output-buffer-limit pubsub` are lost with their connection.

It must not know: topics of the application, sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from hashlib import sha1
from typing import Any, Final

import msgpack
from redis.exceptions import AskError, MovedError, NoScriptError, ResponseError

from zcproto.bus.sealing import Opener, Sealer
from zcproto.bus.topics import SharedTopics
from zcproto.common.backoff import backoff_s
from zcproto.common.clock import Entropy
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.stores.base import KeysMoving, StoreUnavailable
from zcproto.stores.valkey.link import Link
from zcproto.stores.valkey.servers import Cluster, Hooks, ValkeyConnection

KEEP_MS: Final = 86_400_000
"""How long the number of a topic is kept after its last event. Then it begins again, with another epoch."""

LONGEST_PAUSE_S: Final = 1.0
MOVING_LIMIT_S: Final = 2.0
ABSENCE_S: Final = 10.0
"""A server that lives finds the next primary within this time."""

EPOCH_SIZE: Final = 8

_SCRIPT: Final = """
local key, publish, fresh, keep, sender = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local receivers = {}
redis.call('HSETNX', key, 'e', fresh)
local epoch = redis.call('HGET', key, 'e')
for i = 5, #ARGV, 2 do
  local lost, body = tonumber(ARGV[i]), ARGV[i + 1]
  local number = redis.call('HINCRBY', key, 'n', lost + (body == '' and 0 or 1))
  receivers[#receivers + 1] = redis.call(publish, key, cmsgpack.pack({epoch, number, lost, sender, body}))
end
redis.call('PEXPIRE', key, keep)
return receivers
"""
_DIGEST: Final = sha1(_SCRIPT.encode(), usedforsecurity=False).hexdigest()

log = get_logger(__name__)


class ValkeyTopics:
    """The carrier of one process. `connect` returns the servers, not connected; `timeout` is in seconds.

    `unreadable` counts events that none of the keys opens: another server has another key.
    """

    def __init__(
        self,
        connect: Callable[[Hooks], ValkeyConnection | Cluster],
        prefix: bytes,
        sealer: Sealer,
        opener: Opener,
        entropy: Entropy,
        timeout: float,
    ) -> None:
        hooks = Hooks(timeout, self._prepare, lambda keys: None, self._lost, self._reconnected, self._message)
        self._connect = partial(connect, hooks)
        self._servers = self._connect()
        self._is_cluster = isinstance(self._servers, Cluster)
        self._prefix = prefix + b"e:"
        self._sealer = sealer
        self._opener = opener
        self._entropy = entropy
        self._timeout = timeout
        self._topics: SharedTopics | None = None
        self._queue: dict[str, list[bytes | int]] = {}
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_up = False
        self.waiting = 0
        self.unreadable = 0
        self.absence_s = ABSENCE_S

    async def start(self, topics: SharedTopics) -> None:
        self._topics = topics
        self._begin(self._run())

    async def stop(self) -> None:
        self._topics = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._servers.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work, name="zcproto-topics")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- the connection --------------------------------------------------------------------------------

    async def _run(self) -> None:
        """Connect, then send what is published."""
        failures = 0
        while True:
            try:
                await self._servers.open()
                break
            except (StoreUnavailable, ConfigError) as error:
                failures += 1
                if failures == 1:
                    log.warning("topics.away", reason=str(error))
            await asyncio.sleep(backoff_s(failures, self._timeout, LONGEST_PAUSE_S))
            self._servers = self._connect()
        self._found()
        while True:
            await self._wake.wait()
            self._wake.clear()
            queue, self._queue, self.waiting = self._queue, {}, 0
            await asyncio.gather(*(self._publish(name, messages) for name, messages in queue.items()))

    async def _prepare(self, link: Link, was_flushed: bool) -> None:
        """Load the script, and find out whether this user may subscribe."""
        await link.call("SCRIPT", "LOAD", _SCRIPT)
        with suppress(MovedError, AskError):
            await link.call(self._command("SUBSCRIBE"), self._key(""))

    def _lost(self) -> None:
        if self._is_up:
            self._is_up = False
            self._queue, self.waiting = {}, 0
            if self._topics is not None:
                log.warning("topics.away", reason="the connection to the store was lost")
                self._topics.down()

    def _reconnected(self) -> None:
        self._lost()  # a command may have needed the connection before its end was noticed
        self._found()

    def _found(self) -> None:
        if not self._is_up and self._topics is not None:
            self._is_up = True
            log.info("topics.back")
            self._topics.up()

    def _command(self, name: str) -> str:
        return f"S{name}" if self._is_cluster else name

    def _key(self, name: str) -> bytes:
        return self._prefix + b"{%s}" % name.encode()

    async def _call(self, key: bytes, *command: bytes | str | int) -> Any:
        """Send a command, again while a cluster moves its keys."""
        loop = asyncio.get_running_loop()
        until = loop.time() + MOVING_LIMIT_S
        while True:
            try:
                async with asyncio.timeout(self._timeout):
                    return await self._servers.call(key, *command)
            except KeysMoving:
                if loop.time() >= until:
                    raise

    # --- from this process -----------------------------------------------------------------------------

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        sealed = b"" if body is None else self._sealer.seal(self._key(name), body)
        self._queue.setdefault(name, []).extend((lost, sealed))
        self.waiting += len(sealed)
        self._wake.set()

    async def _publish(self, name: str, messages: list[bytes | int]) -> None:
        key = self._key(name)
        fixed = self._command("PUBLISH"), self._entropy(EPOCH_SIZE), KEEP_MS, self._sealer.sender
        arguments = 1, key, *fixed, *messages
        try:
            try:
                receivers = await self._call(key, "EVALSHA", _DIGEST, *arguments)
            except NoScriptError:  # the server was replaced, or its scripts flushed
                receivers = await self._call(key, "EVAL", _SCRIPT, *arguments)
        except ResponseError as error:  # the script did nothing
            log.warning("topics.refused", topic=name, reason=str(error))
            receivers = None
        except (StoreUnavailable, ConfigError, TimeoutError) as error:
            self._servers.lose(f"events were not published: {str(error) or 'no answer in time'}")
            self._lost()
            return
        if self._topics is not None and self._is_up:
            for index in range(len(messages) // 2):
                if receivers is None:
                    self._topics.failed(name)
                else:
                    self._topics.acknowledged(name, receivers[index])

    def follow(self, name: str) -> None:
        self._begin(self._follow(name))

    async def _follow(self, name: str) -> None:
        key = self._key(name)
        try:
            await self._call(key, self._command("SUBSCRIBE"), key)
            epoch, number = await self._call(key, "HMGET", key, "e", "n")
        except (StoreUnavailable, ConfigError, ResponseError, TimeoutError) as error:
            self._servers.lose(f"a topic cannot be followed: {str(error) or 'no answer in time'}")
            self._lost()
            return
        if self._topics is not None:
            self._topics.at(name, epoch or b"", int(number or 0))

    def unfollow(self, name: str) -> None:
        self._begin(self._unfollow(name))

    async def _unfollow(self, name: str) -> None:
        key = self._key(name)
        with suppress(StoreUnavailable, ConfigError, ResponseError, TimeoutError):
            await self._call(key, self._command("UNSUBSCRIBE"), key)

    # --- from the servers ------------------------------------------------------------------------------

    def _message(self, channel: bytes, message: bytes | None) -> None:
        name = channel[len(self._prefix) + 1 : -1].decode("utf-8", "replace")
        if self._topics is None or not name:
            return
        if message is None:  # the slot is moved
            if self._topics.follows(name):
                self.follow(name)
            return
        try:
            epoch, number, lost, sender, sealed = msgpack.unpackb(message, raw=True)
            number, lost = int(number), int(lost)
        except (ValueError, TypeError, msgpack.UnpackException):
            self.unreadable += 1
            return
        is_own = sender == self._sealer.sender
        body: bytes | None = None
        if sealed and not is_own:
            body = self._opener.open(self._key(name), sealed)
            if body is None:
                self.unreadable += 1
                lost += 1
        elif sealed:
            body = b""
        self._topics.received(name, epoch, number, lost, body, is_own=is_own)
