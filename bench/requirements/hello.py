"""A ClientHello written by hand, and what a server says to it in the clear (RFC 8446 section 4.1).

Python's `ssl` offers what OpenSSL likes. What a server does with other offers can only be seen by making them. The
handshake is not gone on with: ServerHello tells version, suite and the server's key share, an alert tells the rest.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

TLS_1_3: Final = 0x0304
TLS_1_2: Final = 0x0303
TLS_1_1: Final = 0x0302
TLS_1_0: Final = 0x0301
SUITES: Final = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
    0x1304: "TLS_AES_128_CCM_SHA256",
    0x1305: "TLS_AES_128_CCM_8_SHA256",
}
OLD_SUITES: Final = (0xC02F, 0xC030, 0xC013, 0x009C, 0x002F)
"""Of TLS 1.2 and before."""

HANDSHAKE_FAILURE: Final = 40
PROTOCOL_VERSION: Final = 70
NO_APPLICATION_PROTOCOL: Final = 120

TIMEOUT: Final = 10.0
MAX_ANSWER: Final = 65_536
X25519: Final = 0x001D
_ALERT, _HANDSHAKE, _SERVER_HELLO = 21, 22, 2
_RETRY: Final = bytes.fromhex("cf21ad74e59a6111be1d8c021e65b891c2a211167abb8c5e079e09e2c8a8339c")
"""The random of a HelloRetryRequest (RFC 8446 section 4.1.3)."""


class Answer(NamedTuple):
    """What came back. None is 'there was none'."""

    alert: int | None = None
    version: int | None = None
    suite: int | None = None
    key_share: bytes | None = None
    retry: bool = False
    plain: bytes = b""
    """What is no TLS record, as it came."""

    def __str__(self) -> str:
        if self.alert is not None:
            return f"alert {self.alert}"
        if self.suite is not None:
            return f"{SUITES.get(self.suite, hex(self.suite))}, version {self.version or 0:#06x}"
        return f"{self.plain[:60]!r}" if self.plain else "closed without a byte"


def client_hello(
    versions: Sequence[int] = (TLS_1_3,),
    suites: Sequence[int] = (0x1302, 0x1303),
    alpn: Sequence[bytes] = (b"zcp/1",),
    *,
    psk_modes: bytes = b"\x01",
) -> bytes:
    """One record. Without TLS 1.3 among `versions`, it is a ClientHello of before (RFC 8446 section 4.1.2)."""
    key = X25519PrivateKey.generate().public_key().public_bytes_raw()
    extensions = [
        (0, _vector(b"\0" + _vector(b"localhost", 2), 2)),
        (10, _vector(_numbers(X25519, 0x0017), 2)),
        (13, _vector(_numbers(0x0403, 0x0804, 0x0805, 0x0401, 0x0501, 0x0203, 0x0201), 2)),
        (16, _vector(b"".join(_vector(name, 1) for name in alpn), 2)),
    ]
    if TLS_1_3 in versions:
        extensions += [
            (43, _vector(_numbers(*versions), 1)),
            (45, _vector(psk_modes, 1)),
            (51, _vector(_numbers(X25519) + _vector(key, 2), 2)),
        ]
    legacy = min(max(versions), TLS_1_2)
    body = _numbers(legacy) + os.urandom(32) + _vector(os.urandom(32), 1)
    body += _vector(_numbers(*suites), 2) + _vector(b"\0", 1)
    body += _vector(
        b"".join(struct.pack("!H", kind) + _vector(content, 2) for kind, content in extensions), 2
    )
    return b"\x16\x03\x01" + _vector(b"\x01" + _vector(body, 3), 2)


def ask(port: int, data: bytes) -> Answer:
    """Send this as the first bytes of a connection, and read what is in the clear."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as raw:
        raw.sendall(data)
        received = b""
        while len(received) < MAX_ANSWER:
            answer = _read(received)
            if answer is not None:
                return answer
            try:
                more = raw.recv(MAX_ANSWER)
            except ConnectionResetError:  # it closed with something of ours unread
                more = b""
            if not more:
                return Answer(plain=received)
            received += more
    return Answer(plain=received)


def _read(data: bytes) -> Answer | None:
    """The first record, if all of it is there; None if more is needed."""
    if len(data) < 5 or data[0] not in (_ALERT, _HANDSHAKE):
        return None
    length = int.from_bytes(data[3:5], "big")
    record = data[5 : 5 + length]
    if len(record) < length:
        return None
    if data[0] == _ALERT:
        return Answer(alert=record[1])
    return _server_hello(record) if record[0] == _SERVER_HELLO else Answer(plain=data)


def _server_hello(message: bytes) -> Answer:
    body = message[4 : 4 + int.from_bytes(message[1:4], "big")]
    version, random = int.from_bytes(body[:2], "big"), body[2:34]
    at = 35 + body[34]
    suite = int.from_bytes(body[at : at + 2], "big")
    rest = body[at + 5 :]  # after the compression and the extensions' length
    key_share = None
    while len(rest) >= 4:
        kind, length = struct.unpack_from("!HH", rest)
        content, rest = rest[4 : 4 + length], rest[4 + length :]
        if kind == 43:
            version = int.from_bytes(content, "big")
        elif kind == 51 and len(content) > 4:
            key_share = content[4:]
    return Answer(version=version, suite=suite, key_share=key_share, retry=random == _RETRY)


def _vector(data: bytes, size: int) -> bytes:
    return len(data).to_bytes(size, "big") + data


def _numbers(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)
