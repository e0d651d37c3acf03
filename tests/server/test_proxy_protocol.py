"""Tests of connections behind a load balancer: limits, throttles, sessions and the log."""

from __future__ import annotations

import json
import shutil
import socket
import ssl
import struct
import subprocess
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest

from bench.server_process import free_port
from tests.server.helpers import (
    KEY,
    TIMEOUT,
    Client,
    ServerThread,
    StoppedClock,
    client_context,
    eventually,
    read_to_end,
)
from zcproto.config.model import LogConfig
from zcproto.observe.log import configure_logging

Serve = Callable[..., ServerThread]

SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
LOCAL = SIGNATURE + b"\x20\x00\x00\x00"


def header(client: str, fields: bytes = b"") -> bytes:
    source = ip_address(client).packed
    body = source * 2 + struct.pack("!HH", 40_000, 443) + fields
    return SIGNATURE + bytes([0x21, 0x11 if len(source) == 4 else 0x21]) + struct.pack("!H", len(body)) + body


class BehindBalancer(Client):
    """A client whose connection begins with a PROXY header."""

    def __init__(self, server: ServerThread, head: bytes) -> None:
        self.head = head
        real = socket.socket.connect

        def connect(raw: socket.socket, address: tuple[str, int]) -> None:
            real(raw, address)
            raw.sendall(head)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket.socket, "connect", connect)
            super().__init__(server.port, server.home / "certs" / "ca.crt")


@pytest.fixture
def server(serve: Serve) -> ServerThread:
    """Start a server for which 127.0.0.1 is a balancer and ::1 is not."""
    return serve(
        server__host=["127.0.0.1", "::1"],
        server__proxy_protocol_from=["127.0.0.0/8"],
        limits__connections_per_address=2,
    )


@pytest.mark.parametrize(
    ("client", "known_as"),
    [
        ("198.51.100.9", "198.51.100.9"),
        ("2001:db8::9", "2001:db8::9"),
        ("::ffff:198.51.100.9", "198.51.100.9"),
    ],
)
def test_session_has_the_forwarded_address(server: ServerThread, client: str, known_as: str) -> None:
    with BehindBalancer(server, header(client, b"\x20\x00\x03abc")) as connection:
        connection.open_session("ada")
        assert connection.call("session.info")["address"] == known_as
    server.until_left()


def test_unlisted_peer_needs_no_proxy_header(server: ServerThread) -> None:
    with server.client("ada", host="::1") as client:
        assert client.call("session.info")["address"] == "::1"
    with server.tcp("::1") as connection:
        connection.sendall(header("198.51.100.9"))
        assert read_to_end(connection)[0] == b""
    assert server.stats["tls_failures"] == {"not_tls": 1}


def test_balancer_without_proxy_header_is_closed(server: ServerThread) -> None:
    with server.tcp() as raw, pytest.raises((ssl.SSLError, ConnectionResetError)):
        client_context(server.home / "certs" / "ca.crt").wrap_socket(raw, server_hostname="localhost")
    with server.tcp() as raw:
        raw.sendall(b"PROXY TCP4 198.51.100.9 192.0.2.1 40000 443\r\n")
        assert read_to_end(raw)[0] == b""
    server.until_left()
    assert server.stats["tls_failures"] == {"proxy_header_missing": 1, "proxy_header_version": 1}


def test_missing_proxy_header_times_out(serve: Serve) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"], tls__handshake_timeout="200ms")
    with server.tcp() as raw:
        raw.sendall(header("198.51.100.9")[:20])
        assert read_to_end(raw)[0] == b""
    server.until_left()
    assert server.stats["tls_failures"] == {"handshake_timeout": 1}


def test_flood_of_failed_handshakes_refuses_the_client_and_not_its_balancer(serve: Serve) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"], limits__failed_handshakes_per_network=1)
    parts = server.server.parts
    parts.state.clock = StoppedClock(parts.state.clock)
    for failed in range(2):
        with server.tcp() as flooding:
            flooding.sendall(header("198.51.100.9") + b"no TLS")
            read_to_end(flooding)
        server.until(lambda failed=failed: sum(parts.acceptor.failures.values()) == failed + 1)
    with server.tcp() as refused:
        refused.sendall(header("198.51.100.9"))
        assert read_to_end(refused)[0] == b""
    assert server.stats["refused_flooding"] == 1
    with BehindBalancer(server, header("203.0.113.5")) as client:
        client.open_session("ada")
    server.until_left()


def test_address_limit_counts_the_forwarded_client(server: ServerThread) -> None:
    first, second = (BehindBalancer(server, header("198.51.100.9")) for _ in range(2))
    with server.tcp() as third:
        third.sendall(header("198.51.100.9"))
        assert read_to_end(third)[0] == b""
    assert server.stats["refused_per_address"] == 1
    assert server.stats["tls_failures"] == {}
    # Other clients of the same balancer and its health checks are not affected.
    with BehindBalancer(server, header("198.51.100.10")) as other:
        other.open_session("eve")
        other.echo()
    checks = [BehindBalancer(server, LOCAL) for _ in range(4)]
    for check in checks:
        check.close()
    # A closed connection makes room for another.
    first.close()
    server.until(lambda: server.server.parts.listener.connections == 1)
    with BehindBalancer(server, header("198.51.100.9")) as next_one:
        next_one.open_session("ada")
        next_one.echo()
    second.close()
    server.until_left()


def test_balancer_is_not_limited_before_its_headers(server: ServerThread) -> None:
    waiting = [server.tcp() for _ in range(5)]
    server.until(lambda: server.server.parts.listener.connections == 5)
    for each in waiting:
        each.close()
    server.until_left()
    assert server.stats["refused_per_address"] == 0


@pytest.mark.usefixtures("long_login_delay")
def test_throttle_counts_the_forwarded_client(serve: Serve) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"], limits__login_failures=1)

    def attempt(client: str, user: str, key: str) -> int:
        with BehindBalancer(server, header(client)) as connection:
            params = {"scheme": "api_key", "user": user, "key": key}
            frame = connection.refused("session.open", params)
            return frame.code

    codes = [attempt("198.51.100.9", f"user{n}", "wrong") for n in range(30)]
    assert codes[0] == 16
    assert codes[-1] == 8, "it guesses on"
    with BehindBalancer(server, header("198.51.100.10")) as other:
        other.open_session("ada", KEY)
        other.echo()


def test_log_has_the_forwarded_address(serve: Serve, tmp_path: Path) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"])
    configure_logging(LogConfig(format="json", file=tmp_path / "log"))
    with server.tcp() as raw:
        raw.sendall(header("198.51.100.9") + b"GET / HTTP/1.1\r\n\r\n")
        assert read_to_end(raw)[0].startswith(b"HTTP/1.1 400 ")
    server.until_left()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [(each["event"], each["cause"], each["peer"]) for each in lines] == [
        ("tls.failed", "plaintext_http", "198.51.100.9")
    ]


def test_reload_changes_the_balancers(serve: Serve) -> None:
    server = serve()
    server.client().close()
    server.reload(server__proxy_protocol_from=["127.0.0.1"])
    with BehindBalancer(server, header("198.51.100.9")) as client:
        client.open_session("ada")
        assert client.call("session.info")["address"] == "198.51.100.9"


def test_drain_does_not_wait_for_proxy_headers(serve: Serve) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"])
    with server.tcp() as raw:
        server.until(lambda: server.server.parts.listener.connections == 1)
        server.drain()
        raw.settimeout(TIMEOUT)
        assert read_to_end(raw)[0] == b""


def test_bad_proxy_header_does_not_affect_others(server: ServerThread) -> None:
    with BehindBalancer(server, header("198.51.100.77")) as client:
        client.open_session("bystander")
        for junk in (b"\r\n\r\n", b"\x00" * 5_000, header("198.51.100.9")[:-1]):
            with server.tcp() as raw:
                raw.sendall(junk)
                raw.shutdown(socket.SHUT_WR)
                assert read_to_end(raw)[0] == b""
            client.echo()
    server.until_left()


# --- HAProxy itself ------------------------------------------------------------------------------------------

HAPROXY = """
defaults
    mode tcp
    timeout connect 15m
    timeout client 15m
    timeout server 15m
listen version_2
    bind 127.0.0.1:{good}
    bind [::1]:{good}
    default-server check inter 15m check-send-proxy
    server it 127.0.0.1:{port} send-proxy-v2 proxy-v2-options crc32c,unique-id,authority
listen version_1
    bind 127.0.0.1:{bad}
    server it 127.0.0.1:{port} send-proxy
"""


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.skipif(shutil.which("haproxy") is None, reason="takes HAProxy")
def test_haproxy_headers_are_read(serve: Serve, tmp_path: Path) -> None:
    server = serve(server__proxy_protocol_from=["127.0.0.1"])
    good, bad = free_port(), free_port()
    (tmp_path / "haproxy.cfg").write_text(HAPROXY.format(good=good, bad=bad, port=server.port))
    ca = server.home / "certs" / "ca.crt"
    with subprocess.Popen(["haproxy", "-db", "-f", str(tmp_path / "haproxy.cfg")]) as balancer:
        try:
            eventually(lambda: is_open(bad))
            for host in ("127.0.0.1", "::1"):
                with Client(good, ca, host=host) as client:
                    client.open_session("ada")
                    assert client.call("session.info")["address"] == host
            with pytest.raises((ssl.SSLError, ConnectionResetError)):
                Client(bad, ca)
        finally:
            balancer.terminate()
    assert server.stats["tls_failures"]["proxy_header_version"] >= 1
    assert "proxy_header_malformed" not in server.stats["tls_failures"]
