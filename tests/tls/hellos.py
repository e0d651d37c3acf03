"""Build ClientHellos field by field (RFC 8446 section 4.1.2), so that each can be invalid."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

AES_128, AES_256, CHACHA20, CCM = 0x1301, 0x1302, 0x1303, 0x1304
TLS_1_2_SUITE = 0xC02F
SERVER_NAME, ALPN, SUPPORTED_VERSIONS, KEY_SHARE = 0, 16, 43, 51


def vector(data: bytes, size: int) -> bytes:
    """Return a TLS vector: its length in `size` bytes, then the data."""
    return len(data).to_bytes(size, "big") + data


def alpn(*names: bytes) -> bytes:
    return vector(b"".join(vector(name, 1) for name in names), 2)


def server_name(name: bytes, kind: int = 0) -> bytes:
    """Return a server name extension with one name (RFC 6066 section 3)."""
    return vector(bytes([kind]) + vector(name, 2), 2)


def versions(*numbers: int) -> bytes:
    return vector(b"".join(number.to_bytes(2, "big") for number in numbers), 1)


def suite_list(*numbers: int) -> bytes:
    return b"".join(number.to_bytes(2, "big") for number in numbers)


@dataclass(frozen=True)
class Hello:
    """A ClientHello. `extensions` are pairs of type and content; None omits even their length."""

    legacy_version: bytes = b"\3\3"
    random: bytes = bytes(range(32))
    session_id: bytes = bytes(32)
    suites: bytes = suite_list(AES_256, CHACHA20, AES_128)
    compressions: bytes = b"\0"
    extensions: Sequence[tuple[int, bytes]] | None = field(
        default=((SUPPORTED_VERSIONS, versions(0x0304, 0x0303)), (ALPN, alpn(b"zcp/1")))
    )

    def with_extension(self, kind: int, content: bytes | None) -> Hello:
        """Return a copy with other content of an extension, or without it."""
        others = [item for item in self.extensions or () if item[0] != kind]
        return replace(self, extensions=others if content is None else [*others, (kind, content)])

    def body(self) -> bytes:
        data = self.legacy_version + self.random + vector(self.session_id, 1)
        data += vector(self.suites, 2) + vector(self.compressions, 1)
        if self.extensions is not None:
            listed = b"".join(
                struct.pack("!H", kind) + vector(content, 2) for kind, content in self.extensions
            )
            data += vector(listed, 2)
        return data

    def message(self) -> bytes:
        return b"\1" + vector(self.body(), 3)

    def bytes(self) -> bytes:
        """Return the hello in one record."""
        return in_records(self.message())


def in_records(message: bytes, size: int = 2**14, version: bytes = b"\3\1") -> bytes:
    """Split a handshake message into records of at most this size."""
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16" + version + vector(part, 2) for part in parts)


def message_of(records: bytes) -> bytes:
    """Return the handshake message in records."""
    message = b""
    while records:
        end = 5 + int.from_bytes(records[3:5], "big")
        message += records[5:end]
        records = records[end:]
    return message


def with_suites(hello: bytes, *numbers: int) -> bytes:
    """Return a captured ClientHello with other suites and corrected lengths."""
    body = message_of(hello)[4:]
    at = 34
    at += 1 + body[at]
    old = int.from_bytes(body[at : at + 2], "big")
    body = body[:at] + vector(suite_list(*numbers), 2) + body[at + 2 + old :]
    return in_records(b"\1" + vector(body, 3))


def with_extension(hello: bytes, kind: int, content: bytes) -> bytes:
    """Return a captured ClientHello with other content of one extension, moved to the front."""
    body = message_of(hello)[4:]
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    head, rest = body[:at], body[at + 2 :]
    listed = struct.pack("!H", kind) + vector(content, 2)
    while rest:
        end = 4 + int.from_bytes(rest[2:4], "big")
        if int.from_bytes(rest[:2], "big") != kind:
            listed += rest[:end]
        rest = rest[end:]
    return in_records(b"\1" + vector(head + vector(listed, 2), 3))


def with_last_extension(hello: bytes, kind: int, content: bytes) -> bytes:
    """Return a captured ClientHello with one more extension at the end, where `pre_shared_key` has to be."""
    body = message_of(hello)[4:]
    at = 34
    at += 1 + body[at]
    at += 2 + int.from_bytes(body[at : at + 2], "big")
    at += 1 + body[at]
    listed = body[at + 2 :] + struct.pack("!H", kind) + vector(content, 2)
    return in_records(b"\1" + vector(body[:at] + vector(listed, 2), 3))
