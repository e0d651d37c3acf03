"""Tests of bad input over real TLS: each gets its answer, and a bystander is not disturbed."""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.server.conftest import Serve
from tests.server.helpers import (
    CANCEL,
    ERROR,
    EVENT,
    GOAWAY,
    NO_TOKEN,
    PING,
    PONG,
    REQUEST,
    RESPONSE,
    WELCOME,
    Client,
    ServerThread,
    bystander,
    client_context,
    eventually,
    read_to_end,
    reset,
    wall,
)
from tests.tls.hellos import with_suites
from zcproto.app.app import App, default_app

INVALID_ARGUMENT, UNAUTHENTICATED, RESOURCE_EXHAUSTED = 3, 16, 8
PROTOCOL_ERROR, FRAME_TOO_LARGE, REPLAYED, STALE_TIMESTAMP = 64, 65, 66, 67
TOKEN_EXPIRED, TOKEN_REVOKED = 68, 69
ALERT_RECORD = 21


@pytest.fixture(autouse=True)
def undisturbed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Keep another connection working during tests of the shared server."""
    if "shared" not in request.fixturenames:
        yield
        return
    with bystander(request.getfixturevalue("shared")):
        yield


def failures(server: ServerThread, cause: str) -> int:
    return int(server.stats["tls_failures"].get(cause, 0))


# --- before and in the handshake -----------------------------------------------------------------------


def test_garbage_is_closed_without_answer_and_counted(shared: ServerThread) -> None:
    before = failures(shared, "not_tls")
    with shared.tcp() as raw:
        raw.sendall(b"\xff" * 64)
        assert read_to_end(raw)[0] == b""
    assert failures(shared, "not_tls") == before + 1


def test_plaintext_http_gets_a_400(shared: ServerThread) -> None:
    with shared.tcp() as raw:
        raw.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        answer, _ = read_to_end(raw)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"TLS" in answer
    assert failures(shared, "plaintext_http") >= 1


def first_hello(alpn: tuple[str, ...] = ("zcp/1",)) -> bytes:
    """Return the first flight of a client of this machine's OpenSSL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def alert_for(server: ServerThread, hello: bytes) -> int:
    """Return the fatal alert that answers a ClientHello."""
    with server.tcp() as raw:
        raw.sendall(hello)
        answer, _ = read_to_end(raw)
    assert len(answer) == 7
    assert answer[0] == ALERT_RECORD
    assert answer[5] == 2
    return answer[6]


def test_tls_1_2_gets_protocol_version(shared: ServerThread) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with shared.tcp() as raw, pytest.raises(ssl.SSLError, match=r"PROTOCOL_VERSION|protocol version"):
        context.wrap_socket(raw)
    assert failures(shared, "unsupported_version") >= 1


def test_aes_128_only_gets_handshake_failure(shared: ServerThread) -> None:
    assert alert_for(shared, with_suites(first_hello(), 0x1301)) == 40
    assert failures(shared, "no_shared_suite") >= 1


@pytest.mark.parametrize("alpn", [("h2",), ("zcp/2", "h2")])
def test_unknown_alpn_gets_no_application_protocol(shared: ServerThread, alpn: tuple[str, ...]) -> None:
    assert alert_for(shared, first_hello(alpn)) == 120


@pytest.mark.parametrize("alpn", [("http/1.1",), ("h2", "http/1.1"), ()])
def test_http_alpn_is_refused_if_http_is_off(serve: Serve, alpn: tuple[str, ...]) -> None:
    server = serve(http__enabled=False)
    assert alert_for(server, first_hello(alpn)) == 120
    assert failures(server, "no_application_protocol") == 1


def test_truncated_client_hello_times_out(serve: Serve) -> None:
    server = serve(loop_factory=asyncio.new_event_loop)
    with bystander(server), server.tcp() as raw:
        raw.sendall(first_hello()[:100])
        server.until(lambda: server.server.parts.listener.connections == 2)
        server.advance(30)
        read_to_end(raw)
        assert failures(server, "handshake_timeout") == 1


# --- headers ---------------------------------------------------------------------------------------------


def fatal(client: Client, data: bytes) -> int:
    """Send bytes; return the code of the ERROR on stream 0 before the clean close."""
    client.send(data)
    frames, how = client.rest_until_closed()
    assert how == "close_notify"
    assert [(frame.kind, frame.stream, frame.token) for frame in frames[-1:]] == [(ERROR, 0, NO_TOKEN)]
    return frames[-1].code


HEADERS: list[tuple[str, dict[str, Any], int]] = [
    ("length 2^32-1", {"length": 2**32 - 1}, FRAME_TOO_LARGE),
    ("length 0", {"length": 0}, PROTOCOL_ERROR),
    ("length 63", {"length": 63}, PROTOCOL_ERROR),
    ("length one above the limit", {"length": 1_048_577}, FRAME_TOO_LARGE),
    ("version 0", {"version": 0}, PROTOCOL_ERROR),
    ("version 2", {"version": 2}, PROTOCOL_ERROR),
    ("flags", {"flags": 1}, PROTOCOL_ERROR),
    ("stream 0", {"stream": 0}, PROTOCOL_ERROR),
    *[(f"kind {kind:#x}", {"kind": kind, "stream": 1}, PROTOCOL_ERROR) for kind in (0, 10, 0x0F, 0x1F, 0xFF)],
    *[
        (f"kind {kind:#x} of servers", {"kind": kind, "stream": 1}, PROTOCOL_ERROR)
        for kind in (WELCOME, RESPONSE)
    ],
    *[
        (f"kind {kind:#x} of servers", {"kind": kind, "stream": 0}, PROTOCOL_ERROR)
        for kind in (ERROR, GOAWAY, EVENT)
    ],
    ("PING on a stream", {"kind": PING, "stream": 5}, PROTOCOL_ERROR),
    ("CANCEL of stream 0", {"kind": CANCEL, "stream": 0}, PROTOCOL_ERROR),
]


@pytest.mark.parametrize(
    ("fields", "code"), [case[1:] for case in HEADERS], ids=[case[0] for case in HEADERS]
)
def test_invalid_frame_header_ends_the_connection(
    shared: ServerThread, fields: dict[str, Any], code: int
) -> None:
    with shared.client("ada") as client:
        assert fatal(client, client.frame(fields.pop("kind", REQUEST), b"", **fields)) == code
        fields["kind"] = REQUEST


def test_large_frame_before_session_is_refused_by_header(shared: ServerThread) -> None:
    with shared.client() as client:
        assert fatal(client, client.frame(length=16_385)) == FRAME_TOO_LARGE


def test_unexpected_body_ends_the_connection(shared: ServerThread) -> None:
    with shared.client() as client:
        assert fatal(client, client.frame(PING, b"\xc0")) == PROTOCOL_ERROR


def test_frame_sent_byte_by_byte_is_decoded(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        for byte in client.request("echo", {"a": 1}):
            client.tls.sendall(bytes((byte,)))
        assert client.answer().value == {"a": 1}


def test_reused_stream_in_flight_ends_the_connection(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        client.send(client.request("sleep", {"ms": 3_600_000}, stream=7))
        assert fatal(client, client.request("echo", {}, stream=7)) == PROTOCOL_ERROR
    shared.until(lambda: shared.server.state.tasks.running == 0)


# --- bodies ----------------------------------------------------------------------------------------------

BODIES = {
    "nothing": b"",
    "not msgpack": b"\xc1",
    "two values": msgpack.packb(["echo", {}]) + b"\xc0",
    "cut off": msgpack.packb(["echo", {"a": "b" * 40}])[:-3],
    "a map": msgpack.packb({"method": "echo"}),
    "no params": msgpack.packb(["echo"]),
    "params a list": msgpack.packb(["echo", [1]]),
    "keys that are no str": msgpack.packb(["echo", {1: 2}]),
    "invalid UTF-8": b"\x92\xa4echo\x81\xa1a\xa1\xff",
    "ext": msgpack.packb(["echo", {"a": msgpack.ExtType(5, b"x")}]),
    "timestamp": msgpack.packb(["echo", {"a": msgpack.Timestamp(1)}]),
    "33 deep": b"\x92\xa4echo\x81\xa1a" + b"\x91" * 31 + b"\xc0",
    "100,000 deep": b"\x92\xa4echo\x81\xa1a" + b"\x91" * 100_000 + b"\xc0",
    "an array of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdd\xff\xff\xff\xff",
    "arrays of 2^20 in one another": b"\x92\xa4echo\x81\xa1a" + b"\xdd\x00\x10\x00\x00" * 31,
    "a map of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdf\xff\xff\xff\xff",
    "a str of 2^32-1": b"\x92\xa4echo\x81\xa1a\xdb\xff\xff\xff\xff",
    "a bin of 2^32-1": b"\x92\xa4echo\x81\xa1a\xc6\xff\xff\xff\xff",
    "a bomb of arrays, 1 MiB": b"\x92\xa4echo\x81\xa1a" + b"\xdd\x00\x01\x00\x00" * 200_000,
    "method in capitals": msgpack.packb(["ECHO", {}]),
    "method of 129 characters": msgpack.packb(["e" * 129, {}]),
    "deadline no int": msgpack.packb(["echo", {}, {"deadline_ms": "soon"}]),
    "idempotency key of 65": msgpack.packb(["echo", {}, {"idempotency_key": "k" * 65}]),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_invalid_body_is_refused_on_its_stream(shared: ServerThread, body: bytes) -> None:
    before = shared.stats["rss_bytes"]
    with shared.client("ada") as client:
        client.send(client.frame(REQUEST, body))
        answer = client.answer(client.stream)
        assert answer.code == INVALID_ARGUMENT
        client.echo()
    # The frame takes a few copies of a megabyte; an expanded bomb would take a hundred.
    assert shared.stats["rss_bytes"] - before < 16 * 2**20


# --- freshness -------------------------------------------------------------------------------------------


def test_replayed_frame_on_the_same_connection_is_refused(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        captured = client.request("echo", {})
        client.send(captured)
        client.answer()
        assert fatal(client, captured) == REPLAYED


def test_replayed_frame_on_another_connection_is_refused(shared: ServerThread) -> None:
    with shared.client("ada") as client, shared.client() as other:
        captured = client.request("echo", {})
        client.send(captured)
        client.answer()
        assert fatal(other, captured) == REPLAYED
        client.echo()


def test_replayed_frame_after_restart_is_refused(serve: Serve) -> None:
    first = serve()
    with first.client("ada") as client:
        captured = client.request("echo", {})
    first.drain()
    second = serve()
    with bystander(second), second.client() as client:
        assert fatal(client, captured) == REPLAYED


@pytest.mark.parametrize(
    "timestamp", [lambda: wall() - 31_000, lambda: wall() + 40_000, lambda: 0, lambda: 2**64 - 1]
)
def test_stale_timestamp_refuses_only_its_request(shared: ServerThread, timestamp: Callable[[], int]) -> None:
    with shared.client("ada") as client:
        answer = client.refused("echo", {}, timestamp=timestamp())
        assert answer.code == STALE_TIMESTAMP
        assert abs(answer.details["server_time"] - wall()) < 5_000
        client.echo()


def test_tenth_consecutive_stale_frame_ends_the_connection(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        for _ in range(9):
            assert client.refused("echo", {}, timestamp=1).code == STALE_TIMESTAMP
        assert fatal(client, client.request("echo", {}, timestamp=1)) == STALE_TIMESTAMP


# --- tokens ----------------------------------------------------------------------------------------------


def test_unknown_or_missing_token_is_unauthenticated(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        assert client.refused("echo", {}, token=b"?" * 32).code == UNAUTHENTICATED
        assert client.refused("echo", {}, token=NO_TOKEN).code == UNAUTHENTICATED
        client.echo()


def test_expired_token_has_its_own_code(serve: Serve) -> None:
    server = serve(sessions__lifetime=3_600.0)
    with server.client("ada") as client:
        client.echo()
        server.clock.ahead_ms = 3_601_000
        assert client.refused("echo", {}, timestamp=wall() + 3_601_000).code == TOKEN_EXPIRED


def test_revoked_token_is_refused_on_every_connection(shared: ServerThread) -> None:
    with shared.client("ada") as client, shared.client() as other:
        other.token = client.token
        other.echo()
        client.call("session.revoke", {"id": client.opened["id"]})
        assert client.refused("echo", {}).code == TOKEN_REVOKED
        assert other.event().value[0] == "session.revoked"
        assert other.refused("echo", {}).code == TOKEN_REVOKED


def test_session_of_another_user_cannot_be_revoked(shared: ServerThread) -> None:
    with shared.client("ada") as ada, shared.client("eve") as eve:
        assert eve.refused("session.revoke", {"id": ada.opened["id"]}).code == 5
        assert ada.opened["id"] not in [each["id"] for each in eve.call("session.list")]
        ada.echo()


# --- floods and slow peers -------------------------------------------------------------------------------


def test_requests_over_max_streams_are_refused(serve: Serve) -> None:
    app = default_app()
    released = asyncio.Event()

    @app.method("wait")
    async def wait() -> None:
        await released.wait()

    server = serve(app, limits__max_streams=8)
    with bystander(server), server.client("ada") as client:
        client.send(*[client.request("wait", {}) for _ in range(50)])
        refused = client.answers(42)
        assert {frame.code for frame in refused.values()} == {RESOURCE_EXHAUSTED}
        assert all(frame.details["retry_after_ms"] > 0 for frame in refused.values())
        server.in_loop(released.set)
        answered = client.answers(8)
        assert {frame.kind for frame in answered.values()} == {RESPONSE}
        assert not answered.keys() & refused.keys()


def test_ping_flood_is_answered_and_does_not_affect_others(shared: ServerThread) -> None:
    with shared.client("ada") as client:
        for _ in range(20):
            client.send(*[client.frame(PING) for _ in range(100)])
            assert all(client.receive().kind == PONG for _ in range(100))


def large_answers() -> App:
    app = App()

    @app.method("large")
    def large() -> bytes:
        return b"x" * 1_000_000

    @app.method("echo")
    def echo(**params: Any) -> dict[str, Any]:
        return params

    return app


def test_client_that_never_reads_is_closed(serve: Serve) -> None:
    server = serve(large_answers(), limits__write_timeout=0.5, limits__write_buffer_bytes=65_536)
    with bystander(server) as other:
        before = server.stats
        client = server.client("ada", receive_buffer=4_096)
        client.send(*[client.request("large", {}) for _ in range(200)])
        server.until(lambda: server.server.state.counters.connections_ended.get("write_timeout"))
        after = server.stats
        # Of 200 answers of a megabyte only those that fit the buffers were made.
        assert after["requests"] - before["requests"] < 20
        assert after["rss_bytes"] - before["rss_bytes"] < 32 * 2**20
        other.echo()
        reset(client.tls)


@pytest.mark.usefixtures("long_login_delay")
def test_key_guessing_is_throttled(serve: Serve) -> None:
    server = serve(limits__login_failures=3)
    with bystander(server), server.client() as client:
        guess = {"scheme": "api_key", "user": "ada", "key": "wrong", "client": "eve/1"}
        codes = [client.refused("session.open", guess).code for _ in range(20)]
        assert codes == [UNAUTHENTICATED] * 3 + [RESOURCE_EXHAUSTED] * 17


# --- disconnects at every point --------------------------------------------------------------------------


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


def until_only_bystander_left(server: ServerThread) -> None:
    """Wait until only the bystander's connection is left."""
    server.until_left(connections=1, tcp=1, sites=1, by_session=1, wheel=1)


@pytest.mark.parametrize("how", [Client.close, Client.fin, Client.reset], ids=["close_notify", "FIN", "RST"])
@pytest.mark.parametrize("point", POINTS.values(), ids=POINTS)
def test_disconnect_leaves_nothing(
    shared: ServerThread, point: Callable[[Client], None], how: Callable[[Client], None]
) -> None:
    client = shared.client()
    point(client)
    how(client)
    until_only_bystander_left(shared)


@pytest.mark.parametrize("sent", [0, 3, 100], ids=["nothing", "a record's beginning", "half a hello"])
@pytest.mark.parametrize("how", [socket.socket.close, reset], ids=["FIN", "RST"])
def test_disconnect_during_handshake_leaves_nothing(
    shared: ServerThread, sent: int, how: Callable[[socket.socket], None]
) -> None:
    raw = shared.tcp()
    raw.sendall(first_hello()[:sent])
    how(raw)
    until_only_bystander_left(shared)


def test_truncated_connection_is_counted_apart_from_clean_close(shared: ServerThread) -> None:
    until_only_bystander_left(shared)  # includes those of earlier tests
    before = failures(shared, "truncated")
    shared.client().close()
    shared.client().fin()
    eventually(lambda: failures(shared, "truncated") == before + 1)


def test_client_context_refuses_other_authorities(shared: ServerThread, ca_file: Path) -> None:
    context = client_context(ca_file)
    with shared.tcp() as raw, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(raw, server_hostname="localhost")
    eventually(lambda: failures(shared, "peer_rejected_certificate") >= 1)


def test_header_struct_matches_the_frame_module() -> None:
    assert struct.calcsize("!IBBHIQ8sQ32s") == 68
