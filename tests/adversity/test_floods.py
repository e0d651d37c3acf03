"""Tests of floods, slow peers and sudden disconnects while another connection works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.adversity.conftest import SETTINGS, application
from tests.adversity.helpers import Bystander, short_timeouts, undisturbed_bystander
from tests.adversity.test_bad_input import BODIES
from tests.adversity.tls13 import HANDSHAKE, RawTls, client_hello, record
from tests.server.helpers import (
    CANCEL,
    ERROR,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    Client,
    ServerThread,
    eventually,
    reset,
)
from zcproto.connection.server import ServerConnection
from zcproto.errors import Code
from zcproto.server.protocol import ServerProtocol
from zcproto.tls.server import TlsServerTransport

MIB = 2**20
Connect = Callable[..., Client]


def ended(server: ServerThread, reason: str) -> int:
    return int(server.stats["connections_ended"].get(reason, 0))


# --- peers that do not read ----------------------------------------------------------------------------------


def large_answers(client: Client) -> bytes:
    return b"".join(client.request("big", {"size": 100_000}) for _ in range(40))


def pings(client: Client) -> bytes:
    return b"".join(client.frame(PING) for _ in range(1_000))


def unknown_methods(client: Client) -> bytes:
    return b"".join(client.request("no.such.method") for _ in range(1_000))


def unknown_tokens(client: Client) -> bytes:
    return b"".join(client.request("echo", token=b"?" * 32) for _ in range(1_000))


def too_many_requests(client: Client) -> bytes:
    return b"".join(client.request("sleep", {"ms": 3_600_000}) for _ in range(1_000))


def cancelled_requests(client: Client) -> bytes:
    frames = []
    for _ in range(500):
        frames.append(client.request("sleep", {"ms": 3_600_000}))
        frames.append(client.frame(CANCEL, stream=client.stream))
    return b"".join(frames)


FLOODS = [large_answers, pings, unknown_methods, unknown_tokens, too_many_requests, cancelled_requests]


def flood(client: Client, make: Callable[[Client], bytes], limit: int) -> int:
    """Send without reading until the server ends the connection; return the number of bytes."""
    sent = 0

    def send() -> None:
        nonlocal sent
        with contextlib.suppress(OSError):
            while sent < limit:
                data = make(client)
                client.tls.sendall(data)
                sent += len(data)

    # OpenSSL keeps errors per thread: with Python 3.13 the next connection of this thread would report a reset.
    thread = threading.Thread(target=send)
    thread.start()
    thread.join()
    return sent


@pytest.fixture
def at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let floods run unhindered: slowed down, they take minutes to fill the buffers."""
    monkeypatch.setattr("zcproto.server.protocol.MAX_WASTED", 2**63)


@pytest.mark.usefixtures("at_full_speed")
@pytest.mark.parametrize("make", FLOODS)
def test_flood_without_reading_is_reset(either: ServerThread, make: Callable[[Client], bytes]) -> None:
    before, rss = ended(either, "write_timeout"), either.stats["rss_bytes"]
    client = either.client("flooder", receive_buffer=4_096)
    with short_timeouts(either):
        assert flood(client, make, 64 * MIB) < 32 * MIB
        eventually(lambda: ended(either, "write_timeout") == before + 1)
    assert either.stats["rss_bytes"] - rss < 32 * MIB
    reset(client.tls)


@pytest.mark.parametrize(
    "make", [pings, unknown_methods, unknown_tokens, too_many_requests, cancelled_requests]
)
def test_flood_with_reading_gets_every_answer(
    server: ServerThread, connect: Connect, make: Callable[[Client], bytes]
) -> None:
    client = connect("flooder")
    data = make(client)
    count = 500 if make is cancelled_requests else 1_000
    client.send(data)
    waiting = 16 if make is too_many_requests else 0
    kinds = [client.receive().kind for _ in range(count - waiting)]
    assert set(kinds) == ({PONG} if make is pings else {ERROR})
    for stream in range(1, client.stream + 1 if waiting else 0):
        client.cancel(stream)
    for _ in range(waiting):
        assert client.receive().code == Code.CANCELLED
    server.until(lambda: server.server.state.tasks.running == 0)  # they count as in flight until then
    client.echo()


def test_small_receive_window_gets_every_answer(connect: Connect) -> None:
    client = connect("slow", receive_buffer=4_096)
    client.send(*(client.request("big", {"size": 60_000}) for _ in range(16)))
    for _ in range(16):
        frame = client.answer()
        assert (frame.kind, len(frame.value)) == (RESPONSE, 60_000)
    client.echo()


# --- incomplete frames and msgpack bombs ---------------------------------------------------------------------


def test_declared_length_allocates_no_memory(server: ServerThread) -> None:
    clients = [server.client("ada") for _ in range(50)]
    before = server.stats["rss_bytes"]
    for client in clients:
        client.send(client.frame(length=MIB)[:68], b"\x92\xa4echo")
    server.until(lambda: has_connections(server, len(clients) + 1))
    assert server.stats["rss_bytes"] - before < 2 * MIB
    for client in clients:
        client.fin()


def has_connections(server: ServerThread, count: int) -> bool:
    return len(server.server.state.connections) == count


def test_maximal_length_is_refused_at_once(connect: Connect) -> None:
    client = connect("ada")
    client.send(client.frame(length=2**32 - 1)[:4])
    frames, how = client.rest_until_closed()  # far sooner than the idle timeout
    assert ([frame.code for frame in frames], how) == ([Code.FRAME_TOO_LARGE], "close_notify")


def test_dripping_frame_ends_its_connection(serve: Callable[..., ServerThread]) -> None:
    server = serve(limits__frame_timeout="5m", limits__idle_timeout="1h", loop_factory=asyncio.new_event_loop)
    with server.client("ada") as client:
        for byte in client.request("echo", {"a": "b" * 1_000}):
            client.tls.sendall(bytes([byte]))
            server.advance(1)
            if select.select([client.tls], [], [], 0)[0]:
                break
        else:
            raise AssertionError("the whole frame was accepted")
        assert [frame.value["reason"] for frame in client.rest_until_closed()[0]] == ["slow_frame"]


def test_repeated_msgpack_bombs_leave_no_memory(server: ServerThread, connect: Connect) -> None:
    client = connect("bomber")

    def send_all_bodies() -> None:
        for body in BODIES.values():
            client.send(client.frame(REQUEST, body))
            assert client.answer(client.stream).code == Code.INVALID_ARGUMENT

    send_all_bodies()
    before = server.stats["rss_bytes"]
    for _ in range(5):
        send_all_bodies()
    assert server.stats["rss_bytes"] - before < 4 * MIB
    client.echo()


def test_msgpack_bomb_before_session_is_refused_unread(connect: Connect) -> None:
    client = connect()
    body = b"\x92\xacsession.open\x81\xa1a" + b"\xdd\x00\x01\x00\x00" * 3_000
    client.send(client.frame(REQUEST, body))
    assert client.answer(client.stream).code == Code.INVALID_ARGUMENT
    client.open_session("ada")


# --- guessing ------------------------------------------------------------------------------------------------


def test_concurrent_key_guessing_is_throttled_per_user(serve: Callable[..., ServerThread]) -> None:
    server = serve(limits__login_failures=3)
    with undisturbed_bystander(server):
        clients = [server.client() for _ in range(10)]
        login = {"scheme": "api_key", "user": "ada", "key": "guess"}
        began = time.monotonic()
        codes = [client.refused("session.open", login).code for client in clients for _ in range(5)]
        rejected = codes.count(Code.UNAUTHENTICATED)
        assert rejected + codes.count(Code.RESOURCE_EXHAUSTED) == 50
        # Three are free, then one each after 1, 2 and 4 seconds.
        assert 3 <= rejected <= 3 + math.log2(time.monotonic() - began + 1)
        for client in clients:
            client.close()


def test_token_guessing_fails_and_leaves_nothing(server: ServerThread, connect: Connect) -> None:
    client = connect("ada")
    bodies = set()
    for number in range(256):
        guess = bytearray(client.token)
        guess[number // 8] ^= 1 << number % 8
        refused = client.refused("echo", token=bytes(guess))
        assert refused.code == Code.UNAUTHENTICATED
        bodies.add(refused.body)
    bodies.add(client.refused("echo", token=NO_TOKEN[:-1] + b"\x01").body)
    assert len(bodies) == 1
    assert client.token not in bodies.pop()
    client.echo()


# --- sudden disconnects --------------------------------------------------------------------------------------


def before_finished(server: ServerThread) -> None:
    """Disconnect after the server's flight, without a Finished."""
    with server.tcp() as raw:
        RawTls(raw, finish=False)


def after_alert_in_handshake(server: ServerThread) -> None:
    with server.tcp() as raw:
        RawTls(raw, finish=False)
        raw.sendall(b"\x15\x03\x03\x00\x02\x02\x00")


def after_finished(server: ServerThread) -> None:
    raw = server.tcp()
    RawTls(raw)
    reset(raw)


def while_writing_is_paused(server: ServerThread) -> None:
    client = server.client("ada", receive_buffer=4_096)
    client.send(large_answers(client))
    server.until(lambda: any(each.is_slow_reader for each in server.server.state.connections))
    client.reset()


def while_session_is_shared(server: ServerThread) -> None:
    first, second = server.client("ada"), server.client()
    second.token = first.token
    second.echo()
    first.reset()
    second.echo()
    second.fin()


def after_session_close(server: ServerThread) -> None:
    client = server.client("ada")
    client.call("session.close")
    client.fin()


def after_fatal_error(server: ServerThread) -> None:
    client = server.client("ada")
    client.send(client.frame(99))
    client.reset()


def during_flood(server: ServerThread) -> None:
    client = server.client("ada")
    client.send(pings(client), too_many_requests(client))
    client.reset()


def with_session(client: Client) -> None:
    client.open_session("ada")


def while_method_runs(client: Client) -> None:
    client.open_session("ada")
    client.send(client.request("sleep", {"ms": 3_600_000}))


def before_reading_answer(client: Client) -> None:
    client.open_session("ada")
    client.send(client.request("echo", {}))


def after_answer(client: Client) -> None:
    client.open_session("ada")
    client.echo()


POINTS: dict[str, Callable[[Client], None]] = {
    "after WELCOME": lambda client: None,
    "in the middle of a header": lambda client: client.send(client.request("echo", {})[:30]),
    "in the middle of a body": lambda client: client.send(client.request("echo", {"a": "b" * 50})[:-10]),
    "with a session": with_session,
    "while a method waits": while_method_runs,
    "before the answer is read": before_reading_answer,
    "after the answer": after_answer,
}


SERVER_POINTS = [
    before_finished,
    after_alert_in_handshake,
    after_finished,
    while_writing_is_paused,
    while_session_is_shared,
    after_session_close,
    after_fatal_error,
    during_flood,
]


@pytest.mark.parametrize("point", SERVER_POINTS)
def test_sudden_disconnects_leave_nothing(
    either: ServerThread, point: Callable[[ServerThread], None]
) -> None:
    point(either)
    until_only_bystander_left(either)


@pytest.fixture(scope="module")
def asyncio_server(tmp_path_factory: pytest.TempPathFactory, certs: Path) -> Iterator[ServerThread]:
    """Start the module's server on asyncio's loop."""
    home = tmp_path_factory.mktemp("asyncio") / "home"
    with ServerThread(home, certs, application(), loop_factory=asyncio.new_event_loop, **SETTINGS) as server:
        yield server


@pytest.fixture(params=["uvloop", "asyncio"])
def either(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    """Return the server on each of the loops; a bystander is connected."""
    server = request.getfixturevalue("server" if request.param == "uvloop" else "asyncio_server")
    with undisturbed_bystander(server):
        yield server


def until_only_bystander_left(server: ServerThread) -> None:
    server.until_left(connections=1, tcp=1, sites=1, by_session=1, wheel=1)


CLOSE_METHODS = [Client.close, Client.fin, Client.reset]


@pytest.mark.parametrize("how", CLOSE_METHODS, ids=["close_notify", "FIN", "RST"])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_disconnect_leaves_nothing(
    either: ServerThread, point: Callable[[Client], None], how: Callable[[Client], None]
) -> None:
    client = either.client()
    point(client)
    how(client)
    until_only_bystander_left(either)


@pytest.mark.parametrize("sent", [0, 3, 100], ids=["nothing", "a record's beginning", "half a hello"])
@pytest.mark.parametrize("how", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_disconnect_during_handshake_leaves_nothing(
    server: ServerThread, sent: int, how: Callable[[socket.socket], None]
) -> None:
    raw = server.tcp()
    raw.sendall(record(HANDSHAKE, client_hello(), 0x0301)[:sent])
    how(raw)
    until_only_bystander_left(server)


def test_truncated_connection_is_counted_apart_from_clean_close(server: ServerThread) -> None:
    def truncated() -> int:
        return int(server.stats["tls_failures"].get("truncated", 0))

    until_only_bystander_left(server)  # includes those of earlier tests
    before = truncated()
    server.client().close()
    server.client().fin()
    eventually(lambda: truncated() == before + 1)


def live_objects() -> dict[str, int]:
    """Return the server connections in memory, including unreachable cycles."""
    kinds = (ServerProtocol, ServerConnection, TlsServerTransport, ssl.SSLObject)
    objects = gc.get_objects()
    return {kind.__name__: sum(type(each) is kind for each in objects) for kind in kinds}


@pytest.mark.parametrize("loop", ["uvloop", "asyncio"])
def test_closed_connection_is_freed_without_gc(
    request: pytest.FixtureRequest, server: ServerThread, bystander: Bystander, loop: str
) -> None:
    target = server if loop == "uvloop" else request.getfixturevalue("asyncio_server")
    gc.collect()
    gc.disable()
    try:
        before = live_objects()
        for _ in range(3):
            for point in POINTS.values():
                for how in CLOSE_METHODS:
                    client = target.client()
                    point(client)
                    how(client)
            for server_point in SERVER_POINTS:
                server_point(target)
        if loop == "uvloop":
            until_only_bystander_left(target)
        else:
            target.until_left()
        try:
            eventually(lambda: live_objects() == before)
        except AssertionError:
            raise AssertionError(f"before: {before}, after: {live_objects()}") from None
    finally:
        gc.enable()
