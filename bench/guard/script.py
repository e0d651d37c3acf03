"""The fixed script of requests whose cost is counted: a server and a client, without sockets and without time.

    client in memory -> Listener, TlsServerTransport -> ServerProtocol -> method -> the same way back

Rules:
- The parts are those that `build` makes for a real server. Only the raw transport, the clock and the time of the
  event loop are replaced: time stands still, so no timer fires, and every run executes the same code.
- Each step is prepared before it is counted. What is counted is the code of the package, and what it calls.
- A change of the script makes the accepted counts void. Add a step rather than change one.
"""

from __future__ import annotations

import asyncio
import gc
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import msgpack

from zcproto.app.app import App
from zcproto.auth import User, UserFile
from zcproto.auth.directory import Directory
from zcproto.auth.schemes import ApiKeyAuthenticator
from zcproto.client import Client
from zcproto.client.dial import LoopResources
from zcproto.client.endpoints import Endpoint
from zcproto.client.options import ConnectOptions
from zcproto.client.protocol import ClientProtocol, ConnectionOwner
from zcproto.common.clock import system_clock
from zcproto.common.home import Home
from zcproto.config import LogConfig, load_config
from zcproto.connection.client import ClientConnection
from zcproto.observe.log import configure_logging
from zcproto.runtime.build import build
from zcproto.server.protocol import ServerProtocol
from zcproto.tls.client import ALPN
from zcproto.tls.context import client_context
from zcproto.tls.server import TlsServerTransport
from zcproto.wire.frame import (
    HEADER,
    HEADER_SIZE,
    LENGTH_SIZE,
    NO_TOKEN,
    OPEN,
    REQUEST,
    RESPONSE,
    SALT_SIZE,
    WELCOME,
    encode_frame,
)
from zcproto.wire.message import encode_body, encode_request

USERS: Final = 100
PEER: Final = "192.0.2.7"
DEEP: Final = 16
ITEMS: Final = 50
DATA: Final = b"x" * 64
PARAMS: Final = {"n": 1, "data": DATA}
WARM_UP: Final = 4
CREDIT: Final = [10 * ITEMS, 1 << 20]
SETTINGS: Final = {
    "certificates.key_types": ["ecdsa-p256"],
    "limits.connections_per_address": 0,
    "store.url": "memory",
}

Counted = AbstractContextManager[None]
"""Counts what its block executes; may be entered again."""
NOT_COUNTED: Final[Counted] = nullcontext()

app = App()


@app.method("echo")
def echo(**params: Any) -> dict[str, Any]:
    """Return the params."""
    return params


@app.method("echo_async")
async def echo_async(**params: Any) -> dict[str, Any]:
    """Return the params, from a coroutine that does not wait."""
    return params


@dataclass
class Item:
    """A parameter that is checked against its annotations."""

    name: str
    count: int
    data: bytes


@app.method("typed")
def typed(item: Item, times: int = 1) -> Item:
    """Return a checked dataclass."""
    return item


@app.method("items")
async def items(n: int, **params: Any) -> AsyncIterator[dict[str, Any]]:
    """Send the params `n` times."""
    for _ in range(n):
        yield params


class StoppedClock:
    """A clock that stands still."""

    def __init__(self) -> None:
        self._wall, self._now = system_clock.wall(), system_clock.now()

    def wall(self) -> int:
        return self._wall

    def now(self) -> float:
        return self._now


class StoppedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time stands still."""

    def __init__(self, now: float) -> None:
        self.stopped_at: float | None = now
        super().__init__()

    def time(self) -> float:
        return super().time() if self.stopped_at is None else self.stopped_at

    def advance(self) -> None:
        """Let a second pass: call what is due by then."""
        assert self.stopped_at is not None
        self.stopped_at += 1.0
        self.call_soon(self.stop)
        self.run_forever()
        self.settle()

    def settle(self) -> None:
        """Call what is ready, until nothing is."""
        while self._ready:  # type: ignore[attr-defined]  # of asyncio's own loops
            self.call_soon(self.stop)
            self.run_forever()


class RawTransport:
    """The end of a TCP connection: keeps what is written."""

    peer = PEER

    def __init__(self) -> None:
        self.out = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        self.out += data

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: all is read at once."""

    def get_write_buffer_size(self) -> int:
        return 0

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def pause_reading(self) -> None:
        """Do nothing: the script writes when the server reads."""

    def resume_reading(self) -> None:
        """Do nothing, likewise."""

    def leaves(self) -> frozenset[bytes]:
        return frozenset()

    def peer_certificate(self) -> None:
        """Return no certificate."""

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        """Do nothing: the script closes connections."""

    def close(self) -> None:
        self.closed = True

    abort = close


class Peer:
    """A client of the server, written by hand: its cost is not counted."""

    transport: TlsServerTransport

    def __init__(self, site: Site) -> None:
        self.raw = RawTransport()
        self._site = site
        self._to_client, self._to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = site.client_tls.wrap_bio(self._to_client, self._to_server, server_hostname="localhost")
        self._counter = 0
        self.salt, self.token = bytes(SALT_SIZE), NO_TOKEN

    def start(self) -> None:
        self.transport.connection_made(cast("asyncio.Transport", self.raw))

    def handshake_step(self) -> bytes:
        """Return what the client sends next in the handshake; nothing at its end."""
        self._take()
        with suppress(ssl.SSLWantReadError):
            self._tls.do_handshake()
        return self._to_server.read()

    def receive(self, data: bytes) -> None:
        """Deliver bytes to the server, as the event loop does."""
        self.transport.get_buffer(-1)[: len(data)] = data
        self.transport.buffer_updated(len(data))

    def request(self, method: str, params: dict[str, Any], kind: int = REQUEST, **meta: Any) -> bytes:
        """Return a frame, without encrypting it."""
        self._counter += 1
        body = encode_request(method, params, meta)
        wall = self._site.clock.wall()
        return encode_frame(kind, self._counter, wall, self.salt, self._counter, self.token, body)

    def record(self, *frames: bytes) -> bytes:
        """Return the bytes of a write."""
        self._tls.write(b"".join(frames))
        return self._to_server.read()

    def _take(self) -> None:
        self._to_client.write(self.raw.out)
        self.raw.out.clear()

    def answers(self) -> list[tuple[int, bytes]]:
        """Return kind and body of all frames that the server has sent."""
        self._take()
        data = b""
        while self._to_client.pending:
            try:
                data += self._tls.read(1 << 20)
            except ssl.SSLWantReadError:
                break
        found = []
        while data:
            end = 4 + int.from_bytes(data[:4], "big")
            head = int.from_bytes(data[4:8], "big")
            if head == WELCOME:
                self.salt = data[20 : 20 + SALT_SIZE]
            found.append((head, data[HEADER_SIZE:end]))
            data = data[end:]
        return found


class Answering(RawTransport):
    """The transport of a client without TLS: the real server answers, later a fixed answer to each request."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self._server_end = RawTransport()
        self._server = ServerProtocol(site.parts.state)
        self._server.connection_made(cast("TlsServerTransport", self._server_end))
        self._site = site
        self._fixed: bytes | None = None
        self._counter = 1 << 20

    def connect(self, client: ClientProtocol) -> None:
        self._client = client
        client.connection_made(cast("asyncio.Transport", self))
        self._deliver()

    def answer_all_with(self, body: bytes) -> None:
        """Answer every request with this body from now on."""
        self._fixed = body

    def write(self, data: bytes) -> None:
        if self._fixed is None:
            self._server.data_received(bytes(data))
            self._site.loop.call_soon(self._deliver)
        else:
            self._site.loop.call_soon(self._client.data_received, self._answers(data))

    def _deliver(self) -> None:
        data = bytes(self._server_end.out)
        self._server_end.out.clear()
        if data:
            self._client.data_received(data)

    def _answers(self, data: bytes) -> bytes:
        body, made, at = self._fixed, [], 0
        assert body is not None
        while at < len(data):
            length, _, stream, wall, salt, _, token = HEADER.unpack_from(data, at)
            self._counter += 1
            size = HEADER_SIZE - LENGTH_SIZE + len(body)
            made += [HEADER.pack(size, RESPONSE, stream, wall, salt, self._counter, token), body]
            at += LENGTH_SIZE + length
        return b"".join(made)


async def _no_one_is_removed(name: str, user: User) -> int:
    raise AssertionError(name)


def _adopt(peer: Peer, transport: TlsServerTransport) -> None:
    """Connect an accepted connection, as the event loop does."""
    peer.transport = transport
    transport.connection_made(cast("asyncio.Transport", peer.raw))


class Site:
    """A server built in a folder, whose time stands still."""

    def __init__(self, folder: Path) -> None:
        self.clock = StoppedClock()
        home = Home(folder)
        home.ensure()
        self._users = iter(UserFile(home.users).add_many([f"user-{number}" for number in range(USERS)]))
        config = load_config(None, home=folder, environ={}, overrides=dict(SETTINGS))
        self.loop = StoppedLoop(self.clock.now())  # else a deadline by the clock may be due for the loop
        # The same random bytes in every run, so that tables of sessions fill in the same way.
        entropy = random.Random(0).randbytes  # noqa: S311 - no secret
        users = Directory(UserFile(home.users), on_gone=_no_one_is_removed)
        keys = ApiKeyAuthenticator(users, now=self.clock.now)
        self.parts = self.loop.run_until_complete(
            build(config, home, app, authenticators=[keys], clock=self.clock, entropy=entropy)
        )
        self.parts.acceptor.perf_counter = self.clock.now
        self.parts.listener._adopt = _adopt  # type: ignore[assignment, method-assign]
        self.client_tls = client_context(ca_file=home.certs / "ca.crt", protocols=(ALPN,))

    def close(self) -> None:
        self.loop.stopped_at = None
        state = self.parts.state
        for connection in list(state.connections):
            connection.cancel_all()
        self.loop.run_until_complete(state.tasks.close(1.0))
        state.close()
        self.loop.close()

    def connect(self, count: Counted = NOT_COUNTED) -> Peer:
        """Return a connection with a session of another user."""
        peer = Peer(self)
        with count:
            self.parts.listener._admit(cast("socket.socket", peer), (PEER, 0))
        while data := peer.handshake_step():
            with count:
                peer.receive(data)
        peer.answers()
        self.open_session(peer, count)
        return peer

    def open_session(self, peer: Peer, count: Counted = NOT_COUNTED) -> bytes:
        """Open a session of another user on a connection, whose token it uses from now on. Return the token."""
        user, key = next(self._users)
        login = {"scheme": "api_key", "user": user, "key": key, "client": "guard/1"}
        peer.token = NO_TOKEN
        data = peer.record(peer.request("session.open", login))
        with count:
            peer.receive(data)
            self.loop.settle()
        [(_, body)] = peer.answers()
        token: bytes = msgpack.unpackb(body)["token"]
        peer.token = token
        return token

    async def client(self) -> tuple[Client, Answering]:
        """Return an open client with a session, and its transport."""
        transport = Answering(self)

        async def dial(
            owner: ConnectionOwner, resources: LoopResources, endpoint: Endpoint, _: object
        ) -> ClientProtocol:
            loop = asyncio.get_running_loop()
            connection = ClientProtocol(
                owner, loop, resources.wheel, self.clock, ClientConnection(), endpoint
            )
            transport.connect(connection)
            await connection.welcomed
            return connection

        user, key = next(self._users)
        client = Client("memory", ConnectOptions(user=user, key=key), clock=self.clock, dial=dial)
        await client.open()
        return client, transport


# --- steps ----------------------------------------------------------------------------------------------


def requests(site: Site, count: Counted, n: int, method: str, params: dict[str, Any], depth: int) -> None:
    """Send requests on one connection, `depth` of them in each write."""
    peer = site.connect()
    for counted, times in ((NOT_COUNTED, WARM_UP), (count, n // depth)):
        records = [peer.record(*(peer.request(method, params) for _ in range(depth))) for _ in range(times)]
        with counted:
            for record in records:
                peer.receive(record)
        found = peer.answers()
        assert [head for head, _ in found] == [RESPONSE] * times * depth, "an answer is missing or an error"


def items_of_streams(site: Site, count: Counted, n: int) -> None:
    """Open streams one after the other, and send all items of each."""
    peer = site.connect()
    for counted, times in ((NOT_COUNTED, WARM_UP), (count, n // ITEMS)):
        for _ in range(times):
            record = peer.record(peer.request("items", {"n": ITEMS, "data": DATA}, kind=OPEN, credit=CREDIT))
            with counted:
                peer.receive(record)
                site.loop.settle()
            assert len(peer.answers()) == ITEMS + 1, "an item is missing"


def connects(site: Site, count: Counted, n: int) -> None:
    """Connect, open a session and disconnect."""
    for counted, times in ((NOT_COUNTED, WARM_UP), (count, n)):
        for _ in range(times):
            peer = site.connect(counted)
            with counted:
                peer.transport.connection_lost(None)
                site.loop.settle()
        with counted:
            site.loop.advance()  # the log writes its lines


def first_requests(site: Site, count: Counted, n: int) -> None:
    """Send the first request with the token of a session that the connection has opened."""
    for counted, times in ((NOT_COUNTED, WARM_UP), (count, n)):
        for _ in range(times):
            send_one(site.connect(), counted)


def requests_in_turn(site: Site, count: Counted, n: int) -> None:
    """Send each request for another session than the one before it, on one connection."""
    peer = site.connect()
    tokens = cycle([peer.token, site.open_session(peer), site.open_session(peer)])
    send_each(peer, count, n, lambda: setattr(peer, "token", next(tokens)))


def requests_after_an_end(site: Site, count: Counted, n: int) -> None:
    """Send each request after a session of another user has ended."""
    registry, wall = site.parts.state.registry, site.clock.wall()

    def end_another() -> None:
        registry.close(registry.open("another", client="", address="", wall=wall).session)

    send_each(site.connect(), count, n, end_another)


def send_each(peer: Peer, count: Counted, n: int, before: Callable[[], object]) -> None:
    """Send requests one at a time, and do something before each."""
    for counted, times in ((NOT_COUNTED, WARM_UP), (count, n)):
        for _ in range(times):
            before()
            send_one(peer, counted)


def send_one(peer: Peer, count: Counted) -> None:
    record = peer.record(peer.request("echo", PARAMS))
    with count:
        peer.receive(record)
    assert [head for head, _ in peer.answers()] == [RESPONSE], "the answer is missing or an error"


def client_calls(site: Site, count: Counted, n: int, depth: int) -> None:
    """Call a method with the client, `depth` calls at once. The server's side is not counted."""
    client, transport = site.loop.run_until_complete(site.client())
    transport.answer_all_with(encode_body(PARAMS))

    async def call(times: int) -> None:
        for _ in range(times):
            if depth == 1:
                await client.call("echo", PARAMS)
            else:
                await asyncio.gather(*[client.call("echo", PARAMS) for _ in range(depth)])

    site.loop.run_until_complete(call(WARM_UP))
    with count:
        site.loop.run_until_complete(call(n // depth))
    transport.close()


class Step(NamedTuple):
    """A part of the script. `n` is how many units it has, a multiple of the depth."""

    label: str
    n: int
    run: Callable[[Site, Counted, int], None]


_TYPED: Final = {"item": {"name": "a", "count": 1, "data": DATA}}

STEPS: Final = {
    "depth_1": Step("request", 64, partial(requests, method="echo", params=PARAMS, depth=1)),
    "depth_16": Step("request, 16 in a write", 64, partial(requests, method="echo", params=PARAMS, depth=16)),
    "async": Step(
        "request of an async method", 64, partial(requests, method="echo_async", params=PARAMS, depth=1)
    ),
    "typed": Step(
        "request with typed parameters", 64, partial(requests, method="typed", params=_TYPED, depth=1)
    ),
    "item": Step("item of a stream", 4 * ITEMS, items_of_streams),
    "connect": Step("connection with a session", 8, connects),
    "first_request": Step("first request of a session", 8, first_requests),
    "in_turn": Step("request of another session than before", 66, requests_in_turn),
    "after_end": Step("request after another session ended", 64, requests_after_an_end),
    "client_1": Step("call of a client", 64, partial(client_calls, depth=1)),
    "client_16": Step("call of a client, 16 at once", 64, partial(client_calls, depth=16)),
}


def run(folder: Path, count: Callable[[str], Counted]) -> None:
    """Run all steps, each on a server of its own; `count` returns what counts a step.

    It configures the log of the process as a server does.
    """
    configure_logging(LogConfig(file=folder / "server.log"), clock=StoppedClock())
    for name, step in STEPS.items():
        site = Site(folder / name)
        gc.collect()
        gc.disable()  # finalizers would run at other places in each run
        try:
            step.run(site, count(name), step.n)
        finally:
            gc.enable()
            site.close()
