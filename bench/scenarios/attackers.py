"""The attackers of a server, and the clients that they must not harm.

Each class runs in a process of its own (`helper`). Attackers run at a lower priority: the server has one processor,
all its clients share another, and the latency of the others must be the server's and not the machine's.
"""

from __future__ import annotations

import asyncio
import errno
import random
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgpack

from bench.compare.client import NO_TOKEN, RESPONSE, Connection, context_for
from bench.scenarios.harness import LAST_ANSWERS_S, cause_of
from bench.scenarios.sessions import open_session
from bench.scenarios.storm_clients import Others, Served
from bench.stage import HOST, NAME
from zcproto.client import Client, connect
from zcproto.common.clock import system_clock
from zcproto.errors import Code, ConnectionClosed, ZcprotoError
from zcproto.load.pacer import Pacer, poisson_times
from zcproto.load.plan import Credential
from zcproto.load.record import Latencies
from zcproto.tls.client import ALPN
from zcproto.tls.proxy import SIGNATURE
from zcproto.wire.frame import CANCEL, CREDIT, END, ITEM, MIN_LENGTH, Kind, encode_frame
from zcproto.wire.message import encode_body

HELD: Final = 1_000
"""Connections that an attacker holds open; beyond it the oldest is reset."""

AT_ONCE: Final = 64
"""Connections opened between two looks at the clock, without a rate."""

TURN_S: Final = 0.01
IN_FLIGHT: Final = 100
"""Requests sent in one write on a connection, before their answers are read."""

LARGE_FRAME: Final = 1_048_576
THREADS: Final = 16

BLOCKING_CALLS: Final = 16
"""As many as the server has threads."""
BLOCKED_S: Final = 12.0
BLOCKING_PAUSE_S: Final = 0.2
ITEM_BYTES: Final = 65_000
"""Nearly the largest item."""
MAX_OPEN: Final = 64
"""The default of `streams.max_open`."""

OPEN_PAUSE_S: Final = 0.02
SEND_PAUSE_S: Final = 0.001

SHORT_BLOCK_S: Final = 0.005
CHUNKS: Final = 4
CHUNK_BYTES: Final = 4_096

_BIND_ADDRESS_NO_PORT: Final = 24  # IP_BIND_ADDRESS_NO_PORT: `connect` finds the port, once for each peer
_RESET: Final = struct.pack("ii", 1, 0)


def client_hello() -> bytes:
    """Return the first bytes of an OpenSSL client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols([ALPN])
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=NAME).do_handshake()
    return outgoing.read()


def first_bytes(name: str) -> bytes:
    """Return what the connections of one kind of flood send, and then nothing more."""
    hello = client_hello()
    return {
        "nothing": b"",
        "half a ClientHello": hello[: len(hello) // 2],
        "half a PROXY header": SIGNATURE + b"\x21",
        "a ClientHello": hello,
    }[name]


class Sockets:
    """Open connections from one address, at a rate or, with rate 0, as fast as the system allows."""

    def __init__(self, port: int, source: str, first: str, rate: float) -> None:
        self._port = port
        self._source = source
        self._first = first_bytes(first)
        self._rate = rate
        self._held: deque[socket.socket] = deque()
        self._counts: Counter[str] = Counter()
        self._flood: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        self._flood = asyncio.create_task(self._run())

    async def _run(self) -> None:
        began, made = time.monotonic(), 0
        while True:
            due = int((time.monotonic() - began) * self._rate) - made if self._rate else AT_ONCE
            for _ in range(due):
                made += 1
                self._open()
            await asyncio.sleep(TURN_S if self._rate else 0)

    def _open(self) -> None:
        one = socket.socket()
        one.setblocking(False)
        one.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)  # no TIME_WAIT: ports would run out
        one.bind((self._source, 0))
        error = one.connect_ex((HOST, self._port))
        if error not in (0, errno.EINPROGRESS):
            self._counts[errno.errorcode[error]] += 1
            one.close()
            return
        self._counts["connects"] += 1
        if self._first:
            with suppress(OSError):  # not accepted yet, or reset
                one.send(self._first)
        self._held.append(one)
        if len(self._held) > HELD:
            self._held.popleft().close()

    async def end(self) -> Counter[str]:
        if self._flood is not None:
            self._flood.cancel()
        for one in self._held:
            one.close()
        return self._counts


class Requests:
    """Send requests flat out on some connections of one address, and read their answers.

    They have a session if `user` is given, and an idempotency key each if they are `keyed`.
    """

    def __init__(
        self,
        port: int,
        ca_file: Path,
        source: str,
        connections: int,
        method: str,
        user: Credential | None = None,
        keyed: bool = False,
    ) -> None:
        self._target = (port, context_for(ca_file, ALPN), source)
        self._connections = connections
        self._method = method
        self._user = user
        self._keyed = keyed
        self._counts: Counter[str] = Counter()
        self._made: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._ended = False

    async def begin(self) -> None:
        for number in range(self._connections):
            connection = Connection(*self._target)
            if self._user is not None and not number:
                connection.open_session(*self._user)
            elif self._user is not None:
                connection.token = self._made[0].token
            self._made.append(connection)
            self._threads.append(threading.Thread(target=self._run, args=(number,), daemon=True))
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        """Send on a connection, and on a new one when the server has ended it."""
        counts = Counter[str]()
        while not self._ended:
            try:
                self._send(self._made[number], counts)
            except (OSError, ZcprotoError):
                if not self._ended:
                    counts["connections ended by the server"] += 1
                    token, self._made[number] = self._made[number].token, Connection(*self._target)
                    self._made[number].token = token
        self._counts += counts

    def _send(self, connection: Connection, counts: Counter[str]) -> None:
        while not self._ended:
            connection.send([connection.frame(self._method, {}, *self._meta()) for _ in range(IN_FLIGHT)])
            for _ in range(IN_FLIGHT):
                kind, stream, _, body = connection.receive()
                if not stream:
                    raise ConnectionClosed("an error or GOAWAY")
                counts["answered" if kind == RESPONSE else Code(msgpack.unpackb(body)[0]).name] += 1

    def _meta(self) -> list[dict[str, str]]:
        return [{"idempotency_key": secrets.token_hex(8)}] if self._keyed else []

    async def end(self) -> Counter[str]:
        self._ended = True
        for connection in self._made:
            with suppress(OSError):
                socket.socket.shutdown(connection.tls, socket.SHUT_RDWR)  # the threads still read by TLS
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        return self._counts


class HandWritten(Connection):
    """A connection that can send any frame."""

    def frame_of(self, kind: int, stream: int, body: bytes = b"") -> bytes:
        self.counter += 1
        return encode_frame(kind, stream, system_clock.wall(), self.salt, self.counter, self.token, body)


class Owned:
    """Attack on many connections, with the sessions of one user or of several. They stay open until `end`."""

    def __init__(
        self, port: int, ca_file: Path, source: str, connections: int, users: Sequence[Credential]
    ) -> None:
        self._target = (port, context_for(ca_file, ALPN), source)
        self._connections = connections
        self._users = users
        self._made: list[HandWritten] = []
        self._counts: Counter[str] = Counter()

    async def begin(self) -> None:
        tokens = []
        for user in self._users:
            connection = self._connect()
            connection.open_session(*user)
            tokens.append(connection.token)
        await asyncio.to_thread(
            self._attack, [tokens[number % len(tokens)] for number in range(self._connections)]
        )

    def _connect(self, token: bytes = NO_TOKEN) -> HandWritten:
        connection = HandWritten(*self._target)
        self._made.append(connection)
        connection.token = token
        return connection

    def _attack(self, tokens: Sequence[bytes]) -> None:
        """Attack on a connection for each of these tokens."""
        raise NotImplementedError

    async def end(self) -> Counter[str]:
        for connection in self._made:
            connection.close()
        self._made.clear()
        return self._counts


class Frames(Owned):
    """Send all but the last byte of a large frame on each connection."""

    def _attack(self, tokens: Sequence[bytes]) -> None:
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(self._send, tokens))

    def _send(self, token: bytes) -> None:
        try:
            connection = self._connect(token)
            connection.send([connection.frame("echo", {})])
            connection.receive()  # a large frame needs a session that is known on this connection
            connection.send([connection.frame("echo", {"data": bytes(LARGE_FRAME - 200)})[:-1]])
        except (OSError, ZcprotoError):
            self._counts["cut while sending"] += 1
        else:
            self._counts["sent"] += 1


class Threaded:
    """Attack on each connection in a thread of its own, until the end; connect again if the server ends one."""

    def __init__(
        self, port: int, ca_file: Path, source: str, connections: int, user: Credential | None = None
    ) -> None:
        self._target = (port, context_for(ca_file, ALPN), source)
        self._user = user
        self._token = NO_TOKEN
        self._counts: Counter[str] = Counter()
        self._ended = threading.Event()
        self._made: list[HandWritten | None] = [None] * connections
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(connections)
        ]

    async def begin(self) -> None:
        if self._user is not None:
            connection = HandWritten(*self._target)
            connection.open_session(*self._user)
            self._token = connection.token
            self._made.append(connection)
        for thread in self._threads:
            thread.start()

    def _run(self, number: int) -> None:
        counts = Counter[str]()
        while not self._ended.is_set():
            try:
                connection = self._made[number] = HandWritten(*self._target)
                connection.token = self._token
                while not self._ended.is_set():
                    self._attack(connection, counts)
            except (OSError, ZcprotoError):
                counts["connections ended"] += 1
        self._counts += counts

    def _attack(self, connection: HandWritten, counts: Counter[str]) -> None:
        raise NotImplementedError

    async def end(self) -> Counter[str]:
        self._ended.set()
        for connection in self._made:
            if connection is not None:
                with suppress(OSError):
                    socket.socket.shutdown(connection.tls, socket.SHUT_RDWR)  # the threads still use TLS
        for thread in self._threads:
            await asyncio.to_thread(thread.join)
        return self._counts


class Wasters(Threaded):
    """Send frames that have no effect, flat out."""

    def _attack(self, connection: HandWritten, counts: Counter[str]) -> None:
        body = encode_body([1, 1])
        frames = [
            connection.frame_of(kind, 1, body if kind == CREDIT else b"")
            for _ in range(IN_FLIGHT)
            for kind in (CANCEL, END, CREDIT)
        ]
        connection.send(frames)
        counts["frames"] += len(frames)


class Occupants(Threaded):
    """Send calls that block for long, and cancel them at once."""

    def _attack(self, connection: HandWritten, counts: Counter[str]) -> None:
        first = connection.stream + 1
        calls = [connection.frame("attack.block", {"seconds": BLOCKED_S}) for _ in range(BLOCKING_CALLS)]
        cancels = [connection.frame_of(CANCEL, first + number) for number in range(BLOCKING_CALLS)]
        connection.send([*calls, *cancels])
        for _ in range(BLOCKING_CALLS):
            _, _, _, body = connection.receive()
            counts[Code(msgpack.unpackb(body)[0]).name] += 1
        self._ended.wait(BLOCKING_PAUSE_S)


class Hoarders(Owned):
    """Open streams on each connection, and send all the items that the server has granted once it granted all."""

    def _attack(self, tokens: Sequence[bytes]) -> None:
        """Take a few seconds: this is about memory, and not about a flood."""
        granted = []
        for token in tokens:
            granted.append(self._open(token))
            time.sleep(OPEN_PAUSE_S)
        for connection, streams in granted:
            self._send(connection, streams)

    def _open(self, token: bytes) -> tuple[HandWritten, dict[int, tuple[int, int]]]:
        """Open streams, and return what may be sent on each."""
        connection = self._connect(token)
        connection.send([connection.frame("attack.hoard", {}, kind=Kind.OPEN) for _ in range(MAX_OPEN)])
        granted = dict[int, tuple[int, int]]()
        for _ in range(MAX_OPEN):
            kind, stream, _, body = connection.receive()
            if kind == Kind.CREDIT:
                items, size = msgpack.unpackb(body)
                granted[stream] = items, size
            else:
                self._counts[f"refused: {Code(msgpack.unpackb(body)[0]).name}"] += 1
        return connection, granted

    def _send(self, connection: HandWritten, granted: dict[int, tuple[int, int]]) -> None:
        body = encode_body(bytes(ITEM_BYTES))
        length = MIN_LENGTH + len(body)
        try:
            for stream, (items, size) in granted.items():
                allowed = min(items, -(-size // length))
                connection.send([connection.frame_of(ITEM, stream, body) for _ in range(allowed)])
                self._counts["items"] += allowed
                time.sleep(SEND_PAUSE_S)
        except OSError:
            self._counts["cut while sending"] += 1


@dataclass(slots=True)
class Logins:
    """What became of clients that each connected and opened a session. Latency is from when one was due."""

    begun: int = 0
    opened: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    latency: Latencies = field(default_factory=Latencies)
    lag: Latencies = field(default_factory=Latencies)


async def begin_at(
    rate: float, seconds: float, work: Callable[[float], Coroutine[None, None, None]], lag: Latencies
) -> Counter[str]:
    """Begin work at random times, `rate` times a second, each with the time at which it is due.

    Return how much of it has not ended LAST_ANSWERS_S after the last one began. `lag` is how late each began.
    """
    tasks = set[asyncio.Task[None]]()

    def begin(due: float) -> None:
        lag.add(time.monotonic() - due)
        task = asyncio.create_task(work(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    order = random.Random(1)  # noqa: S311 - no secret
    await Pacer(asyncio.get_running_loop()).run(poisson_times(rate, seconds, order), begin)
    if tasks:
        await asyncio.wait(tasks, timeout=LAST_ANSWERS_S)
    return Counter({"no answer": len(tasks)})


class Steady(Others):
    """Clients of the library that stay connected and use one kind of method: one of `ACTS`."""

    def __init__(self, port: int, ca_file: Path, users: Sequence[Credential], rate: float, act: str) -> None:
        super().__init__(port, ca_file, users, rate)
        self._clients = [
            connect(f"{HOST}:{port}", user=user, key=key, ca_file=ca_file) for user, key in users
        ]
        self._act = getattr(self, f"_{act}")

    async def open(self) -> None:
        for client in self._clients:
            await client.__aenter__()

    async def load(self, seconds: float) -> Served:
        served = Served(0, 0, len(self._clients))

        def use(due: float) -> Coroutine[None, None, None]:
            client = self._clients[served.sent % len(self._clients)]
            served.sent += 1
            return self._use(served, client, due)

        served.failed += await begin_at(self._rate, seconds, use, served.lag)
        return served

    async def _use(self, served: Served, client: Client, due: float) -> None:
        try:
            equal = await self._act(client)
        except ZcprotoError as error:
            served.failed[cause_of(error)] += 1
        else:
            served.equal += equal
            served.latency.add(time.monotonic() - due)

    @staticmethod
    async def _call(client: Client) -> bool:
        return bool(await client.call("echo", {"n": 1}) == {"n": 1})

    @staticmethod
    async def _block(client: Client) -> bool:
        return bool(await client.call("attack.block", {"seconds": SHORT_BLOCK_S}) == SHORT_BLOCK_S)

    @staticmethod
    async def _upload(client: Client) -> bool:
        async with client.stream("attack.upload", items=CHUNKS * [bytes(CHUNK_BYTES)]) as stream:
            return bool(await stream.finished() == CHUNKS * CHUNK_BYTES)


class Newcomers(Others):
    """Clients that connect, open a session, send one request and leave."""

    async def load(self, seconds: float) -> Logins:
        logins = Logins()

        def log_in(due: float) -> Coroutine[None, None, None]:
            user = self._users[logins.begun % len(self._users)]
            logins.begun += 1
            return self._log_in(logins, user, due)

        logins.failed += await begin_at(self._rate, seconds, log_in, logins.lag)
        return logins

    async def _log_in(self, logins: Logins, user: Credential, due: float) -> None:
        try:
            caller = await self._target.caller()
            try:
                caller.token = (await open_session(caller, user)).token
                logins.latency.add(time.monotonic() - due)
                await caller.call("echo", {})
                logins.opened += 1
                await caller.call("session.close", {})
            finally:
                await caller.disconnect()
        except ZcprotoError as error:
            logins.failed[cause_of(error)] += 1
