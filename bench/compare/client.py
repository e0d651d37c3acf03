"""A blocking client for comparisons: whole frames, written by hand, so that both servers get the same bytes.

It is independent of the client library on purpose: its cost is the same for both sides and not counted.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgpack

from zcproto.errors import ConnectionClosed, ZcprotoError

HOST: Final = "127.0.0.1"
NAME: Final = "localhost"
ALPN: Final = "zcp/1"
HEADER: Final = struct.Struct("!IBBHIQ8sQ32s")
WELCOME: Final = 1
REQUEST: Final = 2
RESPONSE: Final = 3
OPEN: Final = 0x10
ITEM: Final = 0x11
NO_TOKEN: Final = bytes(32)


class Connection:
    """One connection, one session."""

    def __init__(self, port: int, context: ssl.SSLContext, source: str = "") -> None:
        """`source` is the address of this side; without one the system chooses it."""
        self.tls = connect_tls(port, context, source=source)
        self.counter = 0
        self.stream = 0
        self.token = NO_TOKEN
        self._rest = b""
        self.salt = b""
        kind, _, header, _ = self.receive()
        if kind != WELCOME:
            raise ZcprotoError("the server did not begin with WELCOME")
        self.salt = header[6]

    def open_session(self, user: str, key: str) -> None:
        params = {"scheme": "api_key", "user": user, "key": key, "client": "compare/1"}
        self.send([self.frame("session.open", params)])
        kind, _, _, body = self.receive()
        if kind != RESPONSE:
            raise ZcprotoError(f"no session for {user}: {msgpack.unpackb(body)}")
        self.token = msgpack.unpackb(body)["token"]

    def frame(self, method: str, params: dict[str, Any], *meta: dict[str, Any], kind: int = REQUEST) -> bytes:
        body = msgpack.packb([method, params, *meta])
        self.counter += 1
        self.stream += 1
        now = time.time_ns() // 1_000_000
        header = HEADER.pack(
            64 + len(body), 1, kind, 0, self.stream, now, self.salt, self.counter, self.token
        )
        return bytes(header + body)

    def send(self, frames: list[bytes]) -> None:
        self.tls.sendall(b"".join(frames))

    def receive(self) -> tuple[int, int, tuple[Any, ...], bytes]:
        """Return kind, stream, header and body of the next frame."""
        while len(self._rest) < HEADER.size or len(self._rest) < 4 + HEADER.unpack_from(self._rest)[0]:
            data = self.tls.recv(65_536)
            if not data:
                raise ConnectionClosed("the server closed the connection")
            self._rest += data
        header = HEADER.unpack_from(self._rest)
        end = 4 + header[0]
        body, self._rest = self._rest[HEADER.size : end], self._rest[end:]
        return header[2], header[4], header, body

    def echo(self, method: str, params: dict[str, Any], depth: int) -> None:
        """Send `depth` requests in one write; `check_echoes` reads the answers."""
        self.send([self.frame(method, params) for _ in range(depth)])

    def check_echoes(self, params: bytes, depth: int) -> None:
        for _ in range(depth):
            kind, _, _, body = self.receive()
            if kind != RESPONSE or body != params:
                raise ZcprotoError(f"wrong answer: kind {kind}, {body[:80]!r}")

    def open_items(self, method: str, params: dict[str, Any], count: int) -> None:
        """Open a stream with credit for so many items; `check_items` reads them."""
        self.send([self.frame(method, params, {"credit": [count, 1 << 40]}, kind=OPEN)])

    def check_items(self, items: Sequence[bytes]) -> None:
        """Read these items and the answer. All at once: a slow reader would slow down the server."""
        data, size = bytearray(self._rest), sum(HEADER.size + len(item) for item in items)
        while len(data) < size:
            data += self.tls.recv(65_536) or self._fail()
        at = 0
        for item in items:
            kind, end = data[at + 5], at + HEADER.size + len(item)
            if kind != ITEM or data[at + HEADER.size : end] != item:
                raise ZcprotoError(f"wrong item: kind {kind}, {bytes(data[at:end])[:80]!r}")
            at = end
        self._rest = bytes(data[size:])
        kind, _, _, body = self.receive()
        if kind != RESPONSE:
            raise ZcprotoError(f"the stream did not end: kind {kind}, {body[:80]!r}")

    def _fail(self) -> bytes:
        raise ConnectionClosed("the server closed the connection")

    def close(self) -> None:
        self.tls.close()


def connect_tls(
    port: int, context: ssl.SSLContext, timeout: float | None = None, source: str = ""
) -> ssl.SSLSocket:
    """`timeout` is of each step, in seconds; with one, steps cost this side more."""
    raw = socket.create_connection((HOST, port), timeout, (source, 0) if source else None)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(raw, server_hostname=NAME)


def context_for(ca_file: Path, *alpn: str) -> ssl.SSLContext:
    """Return a context for TLS 1.3 alone that trusts this CA."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(ca_file)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context
