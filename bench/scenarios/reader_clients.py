"""The clients of `readers`, `topics` and `durable_costs`. Each class runs in a process of its own (`helper`)."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgpack

from bench.compare.client import Connection, context_for
from bench.scenarios.harness import for_each
from bench.scenarios.sessions import open_session
from bench.stage import HOST
from zcproto.client.client import Client
from zcproto.client.options import ConnectOptions
from zcproto.common.clock import system_clock
from zcproto.connection.client_streams import ClientStream
from zcproto.errors import Code, ZcprotoError
from zcproto.load.caller import Caller, LoadTarget
from zcproto.load.plan import Credential
from zcproto.tls.client import ALPN
from zcproto.wire.frame import CANCEL, CREDIT, OPEN, Kind, encode_frame
from zcproto.wire.message import encode_body, encode_request

WINDOW: Final = (64, 262_144)
UNLIMITED: Final = (2**53 - 1, 2**53 - 1)
AT_ONCE: Final = 32
PAIRS: Final = 100
"""Streams that are opened in one write, and cancelled in the next: more than may be in flight."""

FIRST: Final = 100
"""The number of the first of them."""


class Subscriber(Caller):
    """A connection with one stream of a topic."""

    __slots__ = ("_stream", "last_at", "numbers")

    def subscribe(self, topic: str) -> None:
        self.numbers: list[int] = []
        self.last_at = 0.0
        self._stream: ClientStream = self.conversation.open_stream(
            topic, {}, token=self.token, window=WINDOW, wall=system_clock.wall()
        )
        self.flush()

    def item_received(self, stream: int) -> None:
        event = self.conversation.take_item(self._stream, system_clock.wall())
        self.numbers.append(event["number"])
        self.last_at = time.monotonic()


class Subscribers:
    """Clients that subscribe, each on its connection, and read what arrives."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential], topic: str) -> None:
        self._target = LoadTarget(HOST, HOST, port, ca_file)
        self._users = users
        self._topic = topic
        self._made: list[Subscriber] = []

    async def open(self) -> None:
        async def open_one(user: Credential) -> None:
            subscriber = await self._target.connect(Subscriber(self._target.wheel))
            subscriber.token = (await open_session(subscriber, user)).token
            subscriber.subscribe(self._topic)
            self._made.append(subscriber)

        await for_each(self._users, open_one, AT_ONCE)

    async def complete(self, events: int, within_s: float) -> int:
        """Return how many subscribers have received every event once and in order."""
        expected, end = [*range(events)], time.monotonic() + within_s
        while True:
            complete = sum(one.numbers == expected for one in self._made)
            if complete == len(self._made) or time.monotonic() > end:
                return complete
            await asyncio.sleep(0.1)

    async def last_at(self) -> float:
        """Return when the last subscriber got its last event, by the machine's monotonic clock."""
        return max(one.last_at for one in self._made)


class StreamConnection(Connection):
    """A connection whose frames are written by hand."""

    def __init__(self, port: int, ca_file: Path, user: Credential) -> None:
        super().__init__(port, context_for(ca_file, ALPN))
        self.open_session(*user)

    def frame_of(self, head: int, stream: int, body: bytes = b"") -> bytes:
        self.counter += 1
        return encode_frame(head, stream, system_clock.wall(), self.salt, self.counter, self.token, body)

    def open_of(self, stream: int, method: str, params: dict[str, Any], credit: tuple[int, int]) -> bytes:
        return self.frame_of(OPEN, stream, encode_request(method, params, {"credit": credit}))


class Unread:
    """Clients that open a stream each and stop reading, with credit without limit."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential]) -> None:
        self._target = (port, ca_file)
        self._users = users
        self._made: list[StreamConnection] = []

    async def open(self, method: str, params: dict[str, Any]) -> None:
        """Open the streams, without credit yet."""
        for user in self._users:
            one = StreamConnection(*self._target, user)
            one.send([one.open_of(9, method, params, (0, 0))])
            self._made.append(one)

    async def allow(self) -> None:
        """Give the credit, and read nothing more."""
        for one in self._made:
            one.send([one.frame_of(CREDIT, 9, encode_body(UNLIMITED))])


class RunReaders:
    """Clients that read streams of numbers, each on its connection."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential]) -> None:
        self._clients = [
            Client(f"{HOST}:{port}", ConnectOptions(user=user, key=key, ca_file=ca_file))
            for user, key in users
        ]

    async def open(self) -> None:
        await for_each(self._clients, Client.open, AT_ONCE)

    async def read(self, method: str, total: int, pause: float) -> int:
        """Read one stream in each client at once; return how many got every number once and in order."""

        async def is_complete(client: Client) -> bool:
            stream = client.stream(method, durable=method == "durable", total=total, pause=pause)
            return [number async for number in stream] == [*range(total)]

        return sum(await asyncio.gather(*map(is_complete, self._clients)))

    async def leave(self, runs: int) -> None:
        """Start so many durable runs in each client, and leave each after its first number."""

        async def start(client: Client) -> None:
            for _ in range(runs):
                async with client.stream("durable", durable=True, total=2, pause=-1.0) as stream:
                    await stream.receive()

        await for_each(self._clients, start, AT_ONCE)


class Hasty:
    """Connections that open streams and cancel them without reading the answers first."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential], pairs: int) -> None:
        self._made = [StreamConnection(port, ca_file, user) for user in users]
        self._pairs = pairs // len(users)
        self.counts: Counter[str] = Counter()

    async def run(self) -> Counter[str]:
        """Open and cancel so many streams in all; return their answers by name."""
        threads = [threading.Thread(target=self._run, args=(one,), daemon=True) for one in self._made]
        for thread in threads:
            thread.start()
        for thread in threads:
            await asyncio.to_thread(thread.join)
        return self.counts

    def _run(self, one: StreamConnection) -> None:
        counts, sent = Counter[str](), 0
        reader = threading.Thread(target=self._read, args=(one, counts), daemon=True)
        reader.start()
        with suppress(OSError):
            while sent < self._pairs:
                numbers = range(FIRST + sent, FIRST + min(sent + PAIRS, self._pairs))
                one.send([one.open_of(number, "hold", {}, WINDOW) for number in numbers])
                one.send([one.frame_of(CANCEL, number) for number in numbers])
                sent += PAIRS
        reader.join()
        self.counts += counts

    def _read(self, one: StreamConnection, counts: Counter[str]) -> None:
        try:
            for _ in range(self._pairs):
                kind, stream, _, body = one.receive()
                answer = Code(msgpack.unpackb(body)[0]).name if kind == Kind.ERROR else Kind(kind).name
                counts[answer if stream else f"{answer} for the connection"] += 1
        except (OSError, ZcprotoError):
            counts["connections lost"] += 1
