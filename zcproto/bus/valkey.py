"""The topics of several servers: one script in Valkey or Redis numbers and publishes the events of a topic.

    publish -> queue -> script: number, PUBLISH -> the channel of the topic -> `received`
    follow  -> SUBSCRIBE, then the last number -> `at`

Decides: the keys and the script; when a topic is followed again.

Rules:
- The events of one turn of the loop are one script for each topic, and one script of a topic is sent after the
  other: events stay in order, also while a cluster moves its slots.
- Bodies are sealed. One that does not open counts as lost, and in `unreadable`.
- Events of servers that are slower than `client-output-buffer-limit pubsub` are lost with their connection.

It must not know: topics of the application, sessions.
"""

from __future__ import annotations

import asyncio
from typing import Final

import msgpack
from redis.exceptions import ResponseError

from zcproto.bus.connection import BusConnection, Connect, Script
from zcproto.bus.sealing import Opener, Sealer
from zcproto.bus.topics import SharedTopics
from zcproto.common.clock import Entropy
from zcproto.errors import ConfigError
from zcproto.observe.log import get_logger
from zcproto.stores.base import StoreUnavailable

KEEP_MS: Final = 86_400_000
"""How long the number of a topic is kept after its last event. Then it begins again, with another epoch."""

ABSENCE_S: Final = 10.0
"""A server that lives finds the next primary within this time."""

EPOCH_SIZE: Final = 8

_PUBLISH: Final = Script("""
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
""")

log = get_logger(__name__)


class ValkeyTopics:
    """The carrier of one process. `connect` returns the servers, not connected; `timeout` is in seconds.

    `unreadable` counts events that none of the keys opens: another server has another key.
    """

    def __init__(
        self,
        connect: Connect,
        prefix: bytes,
        sealer: Sealer,
        opener: Opener,
        entropy: Entropy,
        timeout: float,
    ) -> None:
        self._prefix = prefix + b"e:"
        self._connection = BusConnection(
            connect,
            "topics",
            self._key(""),
            [_PUBLISH],
            timeout,
            on_up=self._up,
            on_down=self._down,
            on_message=self._message,
        )
        self._sealer = sealer
        self._opener = opener
        self._entropy = entropy
        self._topics: SharedTopics | None = None
        self._queue: dict[str, list[bytes | int]] = {}
        self._wake = asyncio.Event()
        self.waiting = 0
        self.unreadable = 0
        self.absence_s = ABSENCE_S

    async def start(self, topics: SharedTopics) -> None:
        self._topics = topics
        self._connection.start()
        self._connection.begin(self._send())

    async def stop(self) -> None:
        self._topics = None
        await self._connection.stop()

    async def check(self) -> None:
        """Connect as `start` does, send an event that no process reads, and disconnect. Raises ZcprotoError."""
        await self._connection.check()

    async def _send(self) -> None:
        """Send what is published."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            queue, self._queue, self.waiting = self._queue, {}, 0
            await asyncio.gather(*(self._publish(name, messages) for name, messages in queue.items()))

    def _up(self) -> None:
        if self._topics is not None:
            self._topics.up()

    def _down(self) -> None:
        self._queue, self.waiting = {}, 0
        if self._topics is not None:
            self._topics.down()

    def _key(self, name: str) -> bytes:
        return self._prefix + b"{%s}" % name.encode()

    # --- from this process -----------------------------------------------------------------------------

    def publish(self, name: str, lost: int, body: bytes | None) -> None:
        sealed = b"" if body is None else self._sealer.seal(self._key(name), body)
        self._queue.setdefault(name, []).extend((lost, sealed))
        self.waiting += len(sealed)
        self._wake.set()

    async def _publish(self, name: str, messages: list[bytes | int]) -> None:
        connection = self._connection
        fixed = connection.command("PUBLISH"), self._entropy(EPOCH_SIZE), KEEP_MS, self._sealer.sender
        try:
            receivers = await connection.run(_PUBLISH, self._key(name), *fixed, *messages)
        except ResponseError as error:  # the script did nothing
            log.warning("topics.refused", topic=name, reason=str(error))
            receivers = None
        except (StoreUnavailable, ConfigError, TimeoutError) as error:
            connection.lose(f"events were not published: {str(error) or 'no answer in time'}")
            return
        if self._topics is not None and connection.is_up:
            for index in range(len(messages) // 2):
                if receivers is None:
                    self._topics.failed(name)
                else:
                    self._topics.acknowledged(name, receivers[index])

    def follow(self, name: str) -> None:
        self._connection.begin(self._follow(name))

    async def _follow(self, name: str) -> None:
        key = self._key(name)
        try:
            await self._connection.subscribe(key)
            epoch, number = await self._connection.call(key, "HMGET", key, "e", "n")
        except (StoreUnavailable, ConfigError, ResponseError, TimeoutError) as error:
            self._connection.lose(f"a topic cannot be followed: {str(error) or 'no answer in time'}")
            return
        if self._topics is not None:
            self._topics.at(name, epoch or b"", int(number or 0))

    def unfollow(self, name: str) -> None:
        self._connection.begin(self._connection.unsubscribe(self._key(name)))

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
