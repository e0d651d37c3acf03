"""A TLS 1.3 client in plain Python (RFC 8446) that can send records that TLS libraries do not allow.

One suite (TLS_AES_256_GCM_SHA384), one group (X25519), no verification: it is only for tests. Reading order:
`client_hello`, the key schedule (section 7.1), `RawTls`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Sequence

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

AES_128, AES_256, CHACHA20 = 0x1301, 0x1302, 0x1303
CHANGE_CIPHER_SPEC, ALERT, HANDSHAKE, APPLICATION_DATA = 20, 21, 22, 23
FINISHED, KEY_UPDATE = 20, 24
HASH_SIZE = 48


def extension(kind: int, data: bytes) -> bytes:
    return struct.pack("!HH", kind, len(data)) + data


def client_hello(
    *,
    suites: Sequence[int] = (AES_256,),
    versions: Sequence[int] = (0x0304,),
    alpn: Sequence[str] = ("zcp/1",),
    share: bytes = bytes(range(32)),
    psk_modes: bytes = b"",
    padding: int = 0,
) -> bytes:
    """Return a ClientHello message (section 4.1.2) without its record header."""
    listed = b"".join(struct.pack("!H", version) for version in versions)
    names = b"".join(bytes([len(name)]) + name.encode() for name in alpn)
    extensions = extension(10, b"\x00\x02\x00\x1d")
    extensions += extension(13, b"\x00\x04\x04\x03\x08\x04")
    extensions += extension(51, b"\x00\x24\x00\x1d\x00\x20" + share)
    if versions:
        extensions += extension(43, bytes([len(listed)]) + listed)
    if alpn:
        extensions += extension(16, struct.pack("!H", len(names)) + names)
    if psk_modes:
        extensions += extension(45, bytes([len(psk_modes)]) + psk_modes)
    if padding:
        extensions += extension(21, bytes(padding))
    suite_ids = b"".join(struct.pack("!H", suite) for suite in suites)
    body = b"\x03\x03" + os.urandom(32) + b"\x00"
    body += struct.pack("!H", len(suite_ids)) + suite_ids + b"\x01\x00"
    body += struct.pack("!H", len(extensions)) + extensions
    return b"\x01" + len(body).to_bytes(3, "big") + body


def record(kind: int, data: bytes, version: int = 0x0303) -> bytes:
    return struct.pack("!BHH", kind, version, len(data)) + data


# --- the key schedule, section 7.1 ---------------------------------------------------------------------------


def extract(salt: bytes, secret: bytes) -> bytes:
    return hmac.digest(salt, secret, "sha384")


def expand_label(secret: bytes, label: str, context: bytes, size: int) -> bytes:
    name = b"tls13 " + label.encode()
    info = struct.pack("!H", size) + bytes([len(name)]) + name + bytes([len(context)]) + context
    return hmac.digest(secret, info + b"\x01", "sha384")[:size]


def derive(secret: bytes, label: str, transcript: bytes) -> bytes:
    return expand_label(secret, label, hashlib.sha384(transcript).digest(), HASH_SIZE)


class Direction:
    """The record keys of one direction."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self.sequence = 0
        self._aead = AESGCM(expand_label(secret, "key", b"", 32))
        self._iv = expand_label(secret, "iv", b"", 12)

    def updated(self) -> Direction:
        return Direction(expand_label(self.secret, "traffic upd", b"", HASH_SIZE))

    def _nonce(self) -> bytes:
        mask = self.sequence.to_bytes(12, "big")
        self.sequence += 1
        return bytes(a ^ b for a, b in zip(self._iv, mask, strict=True))

    def seal(self, kind: int, data: bytes) -> bytes:
        head = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(data) + 1 + 16)
        return head + self._aead.encrypt(self._nonce(), data + bytes([kind]), head)

    def open(self, head: bytes, data: bytes) -> tuple[int, bytes]:
        plain = self._aead.decrypt(self._nonce(), data, head).rstrip(b"\x00")
        return plain[-1], plain[:-1]


class RawTls:
    """A connection with hand-made records. The constructor does the whole handshake."""

    def __init__(self, raw: socket.socket, *, alpn: Sequence[str] = ("zcp/1",), finish: bool = True) -> None:
        self.raw = raw
        self._rest = b""
        key = X25519PrivateKey.generate()
        hello = client_hello(alpn=alpn, share=key.public_key().public_bytes_raw())
        raw.sendall(record(HANDSHAKE, hello, 0x0301))
        kind, _, answer = self._record()
        assert kind == HANDSHAKE, f"record of type {kind}"
        shared = key.exchange(X25519PublicKey.from_public_bytes(self.share_of(answer)))
        transcript = hello + answer
        early = extract(bytes(HASH_SIZE), bytes(HASH_SIZE))
        secret = extract(derive(early, "derived", b""), shared)
        client_keys = Direction(derive(secret, "c hs traffic", transcript))
        self.incoming = Direction(derive(secret, "s hs traffic", transcript))
        flight = b""
        while not self._is_complete(flight):
            flight += self.receive()[1]
        transcript += flight
        master = extract(derive(secret, "derived", b""), bytes(HASH_SIZE))
        verify = hmac.digest(
            expand_label(client_keys.secret, "finished", b"", HASH_SIZE),
            hashlib.sha384(transcript).digest(),
            "sha384",
        )
        self.finished = client_keys.seal(
            HANDSHAKE, bytes([FINISHED]) + len(verify).to_bytes(3, "big") + verify
        )
        self.incoming = Direction(derive(master, "s ap traffic", transcript))
        self.outgoing = Direction(derive(master, "c ap traffic", transcript))
        if finish:
            raw.sendall(self.finished)

    def _record(self) -> tuple[int, bytes, bytes]:
        while len(self._rest) < 5 or len(self._rest) < 5 + int.from_bytes(self._rest[3:5], "big"):
            data = self.raw.recv(65_536)
            if not data:
                raise EOFError
            self._rest += data
        end = 5 + int.from_bytes(self._rest[3:5], "big")
        head, data, self._rest = self._rest[:5], self._rest[5:end], self._rest[end:]
        return head[0], head, data

    @staticmethod
    def share_of(server_hello: bytes) -> bytes:
        """Return the key share of a ServerHello message (section 4.2.8)."""
        at = 4 + 2 + 32
        at += 1 + server_hello[at] + 2 + 1 + 2
        while True:
            kind, size = struct.unpack_from("!HH", server_hello, at)
            if kind == 51:
                return server_hello[at + 8 : at + 4 + size]
            at += 4 + size

    @staticmethod
    def _is_complete(flight: bytes) -> bool:
        """Return whether the server's messages up to Finished have arrived."""
        at = 0
        while at + 4 <= len(flight):
            end = at + 4 + int.from_bytes(flight[at + 1 : at + 4], "big")
            if flight[at] == FINISHED and end <= len(flight):
                return True
            at = end
        return False

    def receive(self) -> tuple[int, bytes]:
        """Return the type and content of the next protected record."""
        kind, head, data = self._record()
        while kind == CHANGE_CIPHER_SPEC:  # ignored (appendix D.4)
            kind, head, data = self._record()
        assert kind == APPLICATION_DATA, f"record of type {kind}"
        return self.incoming.open(head, data)

    def seal(self, data: bytes, kind: int = APPLICATION_DATA) -> bytes:
        return self.outgoing.seal(kind, data)

    def key_update(self, *, request: bool) -> bytes:
        """Return a KeyUpdate (section 4.6.3) and switch to the next keys."""
        message = self.seal(bytes([KEY_UPDATE, 0, 0, 1, request]), HANDSHAKE)
        self.outgoing = self.outgoing.updated()
        return message
