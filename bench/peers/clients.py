"""Blocking clients, by hand: one request in flight on a connection, each answer compared with what was sent.

The libraries' own clients are not used: their cost would slow the load down differently for each server, and a
server that waits more wakes up more often, which costs it. Here all servers get requests in the same rhythm:
the requests of a turn are made before the first of them is sent.
"""

from __future__ import annotations

import base64
import os
import ssl
import struct
from abc import ABC, abstractmethod
from typing import Any, Final

import msgpack

from bench.compare.client import ALPN, NAME, Connection
from zcproto.errors import ZcprotoError

READ_BYTES: Final = 65_536


class Client(ABC):
    """One connection. Each request carries `payload`, and each answer must equal it."""

    alpn: tuple[str, ...] = ()

    def __init__(self, tls: ssl.SSLSocket, payload: bytes) -> None:
        self.tls = tls
        self.payload = payload
        self._rest = b""
        self._open()

    def _open(self) -> None:  # noqa: B027  most need nothing
        """Send what a protocol needs before the first request."""

    @abstractmethod
    def request(self) -> bytes:
        """Return the bytes of the next request."""

    def send(self, request: bytes) -> None:
        self.tls.sendall(request)

    @abstractmethod
    def check(self) -> None:
        """Read its answer. Raises ZcprotoError if it differs from the request."""

    def close(self) -> None:
        self.tls.close()

    @property
    def suite(self) -> str:
        """The cipher suite that the server chose."""
        cipher = self.tls.cipher()
        assert cipher is not None
        return cipher[0]

    def _compare(self, answer: bytes) -> None:
        if answer != self.payload:
            raise ZcprotoError(f"{type(self).__name__}: a wrong answer: {answer[:80]!r}")

    def _more(self) -> None:
        data = self.tls.recv(READ_BYTES)
        if not data:
            raise ZcprotoError(f"{type(self).__name__}: the server has closed the connection")
        self._rest += data

    def _take(self, count: int) -> bytes:
        while len(self._rest) < count:
            self._more()
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def _take_through(self, mark: bytes) -> bytes:
        while mark not in self._rest:
            self._more()
        return self._take(self._rest.index(mark) + len(mark))


class StreamsClient(Client):
    """A length of four bytes, and the payload."""

    def request(self) -> bytes:
        return len(self.payload).to_bytes(4, "big") + self.payload

    def check(self) -> None:
        self._compare(self._take(int.from_bytes(self._take(4), "big")))


class UvicornClient(Client):
    """HTTP/1.1 (RFC 9112), kept alive."""

    def _open(self) -> None:
        head = f"POST / HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {len(self.payload)}\r\n\r\n"
        self._request = head.encode() + self.payload

    def request(self) -> bytes:
        return self._request

    def check(self) -> None:
        status, *lines = self._take_through(b"\r\n\r\n").split(b"\r\n")
        if not status.startswith(b"HTTP/1.1 200 "):
            raise ZcprotoError(f"uvicorn answered {status!r}")
        fields = dict(line.lower().split(b": ", 1) for line in lines if line)
        self._compare(self._take(int(fields[b"content-length"])))


class WebsocketsClient(Client):
    """WebSocket (RFC 6455): binary messages, without extensions."""

    def _open(self) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        self.tls.sendall(
            f"GET / HTTP/1.1\r\nHost: {NAME}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        head = self._take_through(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            raise ZcprotoError(f"websockets answered {head[:80]!r}")

    def request(self) -> bytes:
        size = len(self.payload)
        mask = os.urandom(4)
        whole = (mask * (size // 4 + 1))[:size]
        masked = (int.from_bytes(self.payload, "big") ^ int.from_bytes(whole, "big")).to_bytes(size, "big")
        length = bytes((0x80 | size,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
        return b"\x82" + length + mask + masked

    def check(self) -> None:
        first, size = self._take(2)
        if first != 0x82:
            raise ZcprotoError(f"websockets sent a frame that begins with {first:#x}")
        if size == 126:
            size = int.from_bytes(self._take(2), "big")
        self._compare(self._take(size))

    def close(self) -> None:
        self.tls.sendall(b"\x88\x80" + os.urandom(4))  # otherwise the server logs an error
        super().close()


class GrpcClient(Client):
    """gRPC over HTTP/2 (RFC 9113): what one call at a time needs, unary or with a stream of answers."""

    alpn = ("h2",)

    _DATA, _HEADERS, _RST, _SETTINGS, _PING, _GOAWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
    _ACK = _END_STREAM = 0x1
    _END_HEADERS = 0x4
    _FRAME = struct.Struct("!BHBBI")  # length in one and two bytes, type, flags, stream

    def _open(self) -> None:
        self._stream = -1
        grown = (1 << 30).to_bytes(4, "big")  # so that no connection runs out of its window
        self.tls.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + self._frame(self._SETTINGS, 0, 0, b"\0\4" + grown)  # the initial window of a stream
            + self._frame(self._WINDOW, 0, 0, grown)
        )
        self._message = b"\0" + len(self.payload).to_bytes(4, "big") + self.payload

    def _frame(self, kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return self._FRAME.pack(len(body) >> 16, len(body) & 0xFFFF, kind, flags, stream) + body

    def _fields(self) -> bytes:
        """Return the header block (RFC 7541): the first adds its fields to the table, the others refer to them."""
        if self._stream > 1:
            return b"\x83\x87\xc1\xc0\xbf\xbe"
        block = b"\x83\x87"
        for name, value in (
            (b"\x44", b"/peer.Echo/Echo"),  # :path
            (b"\x41", NAME.encode()),  # :authority
            (b"\x5f", b"application/grpc"),  # content-type
            (b"\x40\x02te", b"trailers"),
        ):
            block += name + bytes((len(value),)) + value
        return block

    def request(self) -> bytes:
        self._stream += 2
        return self._frame(self._HEADERS, self._END_HEADERS, self._stream, self._fields()) + self._frame(
            self._DATA, self._END_STREAM, self._stream, self._message
        )

    def check(self) -> None:
        self._compare(self._answer()[5:])

    def items(self, count: int) -> None:
        """Take the payload so many times from one stream. Only after a request, which has filled the table."""
        self._stream += 2
        path = b"/peer.Echo/Items"
        block = b"\x83\x87\x04" + bytes((len(path),)) + path + b"\xc0\xbf\xbe"
        message = count.to_bytes(4, "big") + self.payload
        self.send(
            self._frame(self._HEADERS, self._END_HEADERS, self._stream, block)
            + self._frame(
                self._DATA, self._END_STREAM, self._stream, b"\0" + len(message).to_bytes(4, "big") + message
            )
        )
        if self._answer() != self._message * count:
            raise ZcprotoError("GrpcClient: a wrong item")

    def _answer(self) -> bytes:
        """Return all messages of the answer, each with its prefix."""
        parts = []
        while True:
            high, low, kind, flags, stream = self._FRAME.unpack(self._take(self._FRAME.size))
            body = self._take(high << 16 | low)
            if kind == self._DATA:
                parts.append(body)
            elif kind in (self._SETTINGS, self._PING) and not flags & self._ACK:
                reply = body if kind == self._PING else b""
                self.tls.sendall(self._frame(kind, self._ACK, 0, reply))
            elif kind in (self._RST, self._GOAWAY):
                raise ZcprotoError(f"gRPC ended a call: {body[:80]!r}")
            if stream == self._stream and kind in (self._DATA, self._HEADERS) and flags & self._END_STREAM:
                return b"".join(parts)


class ZcprotoClient:
    """zcproto: a session first, then `echo`, with the payload in a map, as params are."""

    alpn = (ALPN,)

    def __init__(
        self, port: int, context: ssl.SSLContext, params: dict[str, Any], user: str, key: str
    ) -> None:
        self._params = params
        self._answer = msgpack.packb(params)
        self._connection = Connection(port, context)
        self._connection.open_session(user, key)

    def request(self) -> bytes:
        return self._connection.frame("echo", self._params)

    def send(self, request: bytes) -> None:
        self._connection.send([request])

    def check(self) -> None:
        self._connection.check_echoes(self._answer, 1)

    def items(self, count: int) -> None:
        """Take the payload so many times from one stream."""
        self._connection.open_items("repeat", {**self._params, "n": 0, "count": count}, count)
        self._connection.check_items([msgpack.packb({"n": n, **self._params}) for n in range(count)])

    def close(self) -> None:
        self._connection.close()

    @property
    def suite(self) -> str:
        cipher = self._connection.tls.cipher()
        assert cipher is not None
        return cipher[0]
