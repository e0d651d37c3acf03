"""Tests of invalid TLS: the alert, the counted cause, and the end of the connection."""

from __future__ import annotations

import asyncio
import select
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.adversity.helpers import fatal_alert, short_timeouts
from tests.adversity.tls13 import (
    AES_128,
    AES_256,
    ALERT,
    APPLICATION_DATA,
    CHACHA20,
    HANDSHAKE,
    RawTls,
    client_hello,
    record,
)
from tests.limits import TIMEOUT
from tests.server.conftest import Serve
from tests.server.helpers import HEADER, WELCOME, ServerThread, client_context, read_to_end

PROTOCOL_VERSION, HANDSHAKE_FAILURE, NO_APPLICATION_PROTOCOL = 70, 40, 120
UNEXPECTED_MESSAGE, DECODE_ERROR, ILLEGAL_PARAMETER = 10, 50, 47


class FailureCounts:
    """TLS failures by cause, counted since its creation."""

    def __init__(self, server: ServerThread) -> None:
        self._server = server
        self._before = dict(server.stats["tls_failures"])

    def expect_one_of(self, *causes: str) -> None:
        """Assert that one failure was counted; its cause depends on the version of OpenSSL."""
        now = self._server.stats["tls_failures"]
        assert sum(now.get(cause, 0) - self._before.get(cause, 0) for cause in causes) == 1, now

    def expect(self, **expected: int) -> None:
        def added() -> dict[str, int]:
            now = self._server.server.statistics()["tls_failures"]
            counts = {name: count - self._before.get(name, 0) for name, count in now.items()}
            return {name: count for name, count in counts.items() if count}

        try:
            self._server.until(lambda: added() == expected)
        except AssertionError:
            raise AssertionError(f"counted {self._server.in_loop(added)}") from None


@pytest.fixture
def failures(server: ServerThread) -> FailureCounts:
    return FailureCounts(server)


def send(server: ServerThread, data: bytes) -> socket.socket:
    connection = server.tcp()
    connection.sendall(data)
    return connection


# --- plaintext -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("tls_errors")
@pytest.mark.parametrize(
    "garbage", [b"\x00" * 100, b"\xff" * 5_000, b"SSH-2.0-x\r\n", b"\x80\x2e\x01\x00\x02"]
)
def test_garbage_before_hello_is_closed_without_a_byte(
    server: ServerThread, failures: FailureCounts, garbage: bytes
) -> None:
    with send(server, garbage) as connection:
        assert read_to_end(connection)[0] == b""
    failures.expect(not_tls=1)


@pytest.mark.requirement("tls_errors")
@pytest.mark.parametrize("verb", ["GET", "HEAD", "POST", "PRI", "OPTIONS", "CONNECT"])
def test_plaintext_http_gets_one_400(server: ServerThread, failures: FailureCounts, verb: str) -> None:
    with send(server, f"{verb} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()) as connection:
        answer, how = read_to_end(connection)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert b"TLS" in body
    assert b"Strict-Transport-Security" not in head
    assert how == "FIN"
    failures.expect(plaintext_http=1)


def test_plaintext_http_byte_by_byte_gets_one_400(server: ServerThread, failures: FailureCounts) -> None:
    with server.tcp() as connection:
        for letter in b"OPTIONS ":
            connection.sendall(bytes([letter]))
        assert read_to_end(connection)[0].startswith(b"HTTP/1.1 400 ")
    failures.expect(plaintext_http=1)


# --- offers of the ClientHello -------------------------------------------------------------------------------


@pytest.mark.requirement("tls_version", "cipher_suites", "tls_errors")
@pytest.mark.parametrize(
    ("hello", "alert", "cause"),
    [
        ({"suites": [AES_128]}, HANDSHAKE_FAILURE, "no_shared_suite"),
        ({"suites": [AES_128, 0x1304, 0x1305, 0xC02F, 0x00FF]}, HANDSHAKE_FAILURE, "no_shared_suite"),
        ({"suites": [0x0A0A]}, HANDSHAKE_FAILURE, "no_shared_suite"),
        ({"versions": [0x0303]}, PROTOCOL_VERSION, "unsupported_version"),
        ({"versions": [0x0303, 0x0302, 0x7F1C]}, PROTOCOL_VERSION, "unsupported_version"),
        ({"versions": []}, PROTOCOL_VERSION, "unsupported_version"),
        ({"alpn": ["h2"]}, NO_APPLICATION_PROTOCOL, "no_application_protocol"),
        ({"alpn": ["zcp/2", "ZCP/1", "zcp/"]}, NO_APPLICATION_PROTOCOL, "no_application_protocol"),
        ({"alpn": ["HTTP/1.1", "http/1.0"]}, NO_APPLICATION_PROTOCOL, "no_application_protocol"),
        # several faults: alerts have the order 70, 40, 120
        (
            {"versions": [0x0303], "suites": [AES_128], "alpn": ["h2"]},
            PROTOCOL_VERSION,
            "unsupported_version",
        ),
        ({"suites": [AES_128], "alpn": ["h2"]}, HANDSHAKE_FAILURE, "no_shared_suite"),
    ],
)
def test_missing_offer_is_refused_with_its_alert(
    server: ServerThread, failures: FailureCounts, hello: dict[str, Any], alert: int, cause: str
) -> None:
    message = client_hello(**hello)
    pieces = [message[at : at + 16_000] for at in range(0, len(message), 16_000)]
    with send(server, b"".join(record(HANDSHAKE, piece, 0x0301) for piece in pieces)) as connection:
        assert fatal_alert(connection) == alert
    failures.expect(**{cause: 1})


@pytest.mark.requirement("forward_secrecy")
@pytest.mark.parametrize("psk_modes", [b"", b"\x01", b"\x00"], ids=["none", "psk_dhe_ke", "psk_ke"])
def test_each_handshake_has_a_fresh_key_share(server: ServerThread, psk_modes: bytes) -> None:
    """A client that offers resumption without (EC)DHE gets one too."""
    shares = set()
    for _ in range(20):
        with send(server, record(HANDSHAKE, client_hello(psk_modes=psk_modes), 0x0301)) as connection:
            answer = connection.recv(4_096)
        assert answer[0] == HANDSHAKE
        shares.add(RawTls.share_of(answer[5:]))
    assert len(shares) == 20
    assert all(len(share) == 32 for share in shares)


@pytest.mark.requirement("cipher_suites")
@pytest.mark.parametrize("suites", [[AES_128, AES_256], [AES_128, CHACHA20]])
def test_aes_128_is_never_chosen(server: ServerThread, suites: Sequence[int]) -> None:
    with send(server, record(HANDSHAKE, client_hello(suites=suites), 0x0301)) as connection:
        answer = connection.recv(4_096)
        assert answer[0] == HANDSHAKE
        chosen = int.from_bytes(answer[5 + 4 + 2 + 32 + 1 :][:2], "big")
        assert chosen == suites[1]


@pytest.mark.requirement("tls_version")
def test_tls_1_2_client_gets_an_alert(server: ServerThread, failures: FailureCounts) -> None:
    context = client_context(server.home / "certs" / "ca.crt")
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with server.tcp() as raw, pytest.raises(ssl.SSLError) as raised:
        context.wrap_socket(raw, server_hostname="localhost")
    assert raised.value.reason == "TLSV1_ALERT_PROTOCOL_VERSION"
    failures.expect(unsupported_version=1)


@pytest.mark.parametrize("alpn", [["http/1.1"], ["h2", "http/1.1"], []])
def test_http_alpn_is_refused_if_http_is_off(serve: Serve, alpn: list[str]) -> None:
    server = serve(http__enabled=False)
    with send(server, record(HANDSHAKE, client_hello(alpn=alpn), 0x0301)) as connection:
        assert fatal_alert(connection) == NO_APPLICATION_PROTOCOL
    assert server.stats["tls_failures"] == {"no_application_protocol": 1}


@pytest.mark.requirement("tls_errors")
@pytest.mark.parametrize("alpn", [["h2"], ["h2", "zcp/2"]])
def test_unknown_alpn_client_gets_an_alert(
    server: ServerThread, failures: FailureCounts, alpn: list[str]
) -> None:
    context = client_context(server.home / "certs" / "ca.crt", alpn)
    with server.tcp() as raw, pytest.raises(ssl.SSLError) as raised:
        context.wrap_socket(raw, server_hostname="localhost")
    assert "no application protocol" in str(raised.value).lower().replace("_", " ")
    failures.expect(no_application_protocol=1)


def test_zcp_is_preferred_over_http(server: ServerThread) -> None:
    context = client_context(server.home / "certs" / "ca.crt", ["http/1.1", "h2", "zcp/1"])
    with server.tcp() as raw, context.wrap_socket(raw, server_hostname="localhost") as tls:
        assert tls.selected_alpn_protocol() == "zcp/1"
        assert tls.version() == "TLSv1.3"


def test_client_distrusting_the_server_is_counted(server: ServerThread, failures: FailureCounts) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["zcp/1"])
    with server.tcp() as raw, pytest.raises(ssl.SSLCertVerificationError):
        context.wrap_socket(raw, server_hostname="localhost")
    failures.expect(peer_rejected_certificate=1)


# --- malformed and unexpected --------------------------------------------------------------------------------

HELLO = client_hello()


@pytest.mark.parametrize(
    ("data", "alert"),
    [
        (record(APPLICATION_DATA, b"hello"), UNEXPECTED_MESSAGE),
        (record(ALERT, b"\x02\x28"), UNEXPECTED_MESSAGE),
        (record(HANDSHAKE, b"\x02" + HELLO[1:]), UNEXPECTED_MESSAGE),
        (record(HANDSHAKE, HELLO) + record(HANDSHAKE, HELLO), None),
        (record(HANDSHAKE, b""), DECODE_ERROR),
        (record(HANDSHAKE, b"\x01\x00\x00\x05hello"), DECODE_ERROR),
        (record(HANDSHAKE, HELLO[:-1] + b"\xff"), None),
        (record(HANDSHAKE, b"\x01\xff\xff\xff" + HELLO[4:]), ILLEGAL_PARAMETER),
    ],
)
def test_malformed_client_hello_gets_an_alert(server: ServerThread, data: bytes, alert: int | None) -> None:
    with send(server, data) as connection:
        answer, _ = read_to_end(connection)
    assert answer[0] in (ALERT, HANDSHAKE)
    if alert is not None:
        assert answer == record(ALERT, bytes([2, alert]))


def test_tampered_record_ends_the_connection(server: ServerThread, failures: FailureCounts) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        assert HEADER.unpack_from(tls.receive()[1])[2] == WELCOME
        sealed = bytearray(tls.seal(b"hello"))
        sealed[-1] ^= 1
        raw.sendall(sealed)
        kind, alert = tls.receive()
        assert (kind, alert) == (ALERT, bytes([2, 20]))  # bad_record_mac
        with pytest.raises((EOFError, ConnectionResetError)):
            tls.receive()
    failures.expect(bad_record=1)


def test_oversized_record_ends_the_connection(server: ServerThread, failures: FailureCounts) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        tls.receive()
        raw.sendall(record(APPLICATION_DATA, bytes(17_000)))
        assert tls.receive() == (ALERT, bytes([2, 22]))  # record_overflow
    failures.expect_one_of("record_too_large", "bad_record")


def test_plaintext_after_handshake_ends_the_connection(server: ServerThread) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        tls.receive()
        raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert tls.receive()[0] == ALERT


# --- slow and silent -----------------------------------------------------------------------------------------


@pytest.fixture
def movable(tmp_path: Path, certs: Path) -> Iterator[ServerThread]:
    """Start a server whose time a test moves."""
    with ServerThread(tmp_path / "home", certs, loop_factory=asyncio.new_event_loop) as server:
        yield server


@pytest.mark.parametrize("size", [0, 1, 3, 5, 50, -1])
def test_truncated_hello_is_closed_at_the_timeout(
    server: ServerThread, failures: FailureCounts, size: int
) -> None:
    started = time.monotonic()
    with short_timeouts(server), send(server, record(HANDSHAKE, HELLO, 0x0301)[:size]) as connection:
        assert read_to_end(connection)[0] == b""
        assert time.monotonic() - started > 0.25
    failures.expect(handshake_timeout=1)


def test_dripping_handshake_bytes_do_not_extend_the_timeout(movable: ServerThread) -> None:
    with movable.tcp() as connection:
        hello = record(HANDSHAKE, client_hello(padding=400), 0x0301)
        sent = 0
        while not server_closed(movable, connection):
            connection.sendall(hello[sent : sent + 1])
            sent += 1
            movable.advance(1)
            assert sent < 60, "the timeout is 30 s"
    assert movable.stats["tls_failures"] == {"handshake_timeout": 1}


def test_unfinished_handshake_is_closed_at_the_timeout(movable: ServerThread) -> None:
    with movable.tcp() as raw:
        RawTls(raw, finish=False)
        movable.advance(30)
        read_to_end(raw)
    assert movable.stats["tls_failures"] == {"handshake_timeout": 1}


def test_client_hello_byte_by_byte_is_accepted(server: ServerThread) -> None:
    class Drip(socket.socket):
        """Sends each byte in a separate write."""

        def sendall(self, data: Any, flags: int = 0) -> None:
            for byte in bytes(data):
                super().sendall(bytes([byte]))

    connection = server.tcp()
    with Drip(fileno=connection.detach()) as drip:
        drip.settimeout(TIMEOUT)
        tls = RawTls(drip)
        assert HEADER.unpack_from(tls.receive()[1])[2] == WELCOME


def server_closed(server: ServerThread, connection: socket.socket) -> bool:
    """Return whether the server has closed its side; discard what it sent before."""
    for _ in range(2):  # turns of the loop, to let the server read what was sent
        server.in_loop(lambda: None)
    while select.select([connection], [], [], 0)[0]:
        try:
            if not connection.recv(65_536):
                return True
        except ConnectionError:
            return True
    return False


# --- record floods -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_answers", [False, True])
def test_key_update_flood_ends_the_connection(
    server: ServerThread, failures: FailureCounts, request_answers: bool
) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        tls.receive()
        sent = 0
        while not server_closed(server, raw):
            raw.sendall(b"".join(tls.key_update(request=request_answers) for _ in range(20)))
            sent += 20
            assert sent < 5_000
    assert sent * 27 > 60_000  # a few are allowed
    failures.expect(barren_records=1)


def test_occasional_key_updates_are_answered(server: ServerThread, failures: FailureCounts) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        salt = HEADER.unpack_from(tls.receive()[1])[6]
        for counter in range(1, 40):
            ping = HEADER.pack(64, 1, 6, 0, 0, time.time_ns() // 1_000_000, salt, counter, bytes(32))
            raw.sendall(tls.key_update(request=True) + tls.seal(ping))
            kind, data = tls.receive()
            while kind == HANDSHAKE:  # the server's own KeyUpdate
                assert data == b"\x18\x00\x00\x01\x00"
                tls.incoming = tls.incoming.updated()
                kind, data = tls.receive()
            assert HEADER.unpack_from(data)[2] == 7
        raw.sendall(tls.seal(b"\x01\x00", ALERT))
        read_to_end(raw)
    failures.expect()


def test_empty_record_flood_ends_the_connection(server: ServerThread) -> None:
    with server.tcp() as raw:
        tls = RawTls(raw)
        tls.receive()
        sent = 0
        while not server_closed(server, raw):
            raw.sendall(b"".join(tls.seal(b"") for _ in range(20)))
            sent += 20
            assert sent < 5_000
