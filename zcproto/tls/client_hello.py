"""The ClientHello, read before OpenSSL sees it: versions, suites and ALPN, nothing more.

Why: no public API of Python before 3.15 restricts the suites of TLS 1.3, and none refuses an ALPN mismatch
with the alert that RFC 7301 section 3.2 demands. The server prefers its own order, so AES_128 could only ever
be chosen for a client that offers neither of our suites: such a client is refused here, with the right alert.

Total on any bytes: a judgement, or None for 'more is needed'. It can come in pieces and in several records
(RFC 8446 section 5.1); with a post-quantum key share it exceeds one segment. However it is cut, each byte is
looked at once. Nothing is changed: the bytes go on to OpenSSL as they came. Where several alerts fit, the order
is 70, 40, 120.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final, NamedTuple

from zcproto.tls.alert import Alert
from zcproto.tls.failure import TlsFailure

MAX_SIZE: Final = 16_384
"""Bytes of a ClientHello, records included. Browsers with post-quantum shares send about 2,000."""

SUITE_IDS: Final = {
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
}
_HANDSHAKE_RECORD: Final = 22
_RECORD_TYPES: Final = frozenset({20, 21, 22, 23})
_RECORD_HEADER: Final = 5
_CLIENT_HELLO: Final = 1
_MESSAGE_HEADER: Final = 4
_EXT_ALPN: Final = 16
_EXT_SUPPORTED_VERSIONS: Final = 43
_TLS_1_3: Final = b"\x03\x04"


class Refusal(NamedTuple):
    """Why a connection ends before its handshake. `alert` is None where the peer does not speak TLS."""

    failure: TlsFailure
    alert: Alert | None


class Accepted(NamedTuple):
    """OpenSSL may have it."""


ACCEPTED: Final = Accepted()
_MALFORMED: Final = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, Alert.DECODE_ERROR)
_TOO_LARGE: Final = Refusal(TlsFailure.CLIENT_HELLO_TOO_LARGE, Alert.ILLEGAL_PARAMETER)
_UNEXPECTED: Final = Refusal(TlsFailure.UNEXPECTED_MESSAGE, Alert.UNEXPECTED_MESSAGE)
_HTTP_METHODS: Final = tuple(
    name.encode() + b" "
    for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "PRI")
)
_LONGEST_HTTP_METHOD: Final = max(map(len, _HTTP_METHODS))


class ClientHelloReader:
    """The first bytes of one connection, and what to do with it.

    `suites` are the ids that may be negotiated; `protocols` are ALPN names, None standing for a client that
    offers no ALPN at all. `raw` is all that was fed: at most MAX_SIZE bytes while more is needed.
    """

    __slots__ = ("_at", "_left", "_message", "_protocols", "_suites", "raw")

    def __init__(self, suites: Container[int], protocols: Container[str | None]) -> None:
        self._suites = suites
        self._protocols = protocols
        self.raw = bytearray()
        self._at = 0  # what of `raw` was looked at
        self._left = 0  # bytes of the record there that are not in `_message` yet
        self._message = bytearray()

    def feed(self, data: bytes | memoryview) -> Accepted | Refusal | None:
        """Take in bytes. None if they do not tell yet; once there is a judgement, feed nothing more."""
        raw = self.raw
        raw += data
        if not raw:
            return None
        if raw[0] not in _RECORD_TYPES:
            return _judge_plaintext(raw)
        if len(raw) > 1 and raw[1] != 3:
            return Refusal(TlsFailure.NOT_TLS, None)
        while True:
            if not self._left:
                if len(raw) - self._at < _RECORD_HEADER:
                    return None
                refusal = self._read_record_header()
                if refusal is not None:
                    return refusal
            part = raw[self._at : self._at + self._left]
            self._message += part
            self._at += len(part)
            self._left -= len(part)
            judgement = self._judge_message()
            if judgement is not None or self._left:
                return judgement

    def _read_record_header(self) -> Refusal | None:
        raw, at = self.raw, self._at
        if raw[at] != _HANDSHAKE_RECORD:
            return _UNEXPECTED
        length = raw[at + 3] << 8 | raw[at + 4]
        if not 0 < length <= 2**14:  # RFC 8446 section 5.1: no empty handshake records
            return _MALFORMED
        self._at = at + _RECORD_HEADER
        self._left = length
        return _TOO_LARGE if self._at + length > MAX_SIZE else None

    def _judge_message(self) -> Accepted | Refusal | None:
        message = self._message
        if message and message[0] != _CLIENT_HELLO:
            return _UNEXPECTED
        if len(message) < _MESSAGE_HEADER:
            return None
        wanted = _MESSAGE_HEADER + (message[1] << 16 | message[2] << 8 | message[3])
        if wanted > MAX_SIZE:
            return _TOO_LARGE
        if len(message) < wanted:
            return None
        # Nothing may follow before the server has answered: not in the record, not behind it.
        if len(message) > wanted or self._left or self._at < len(self.raw):
            return _UNEXPECTED
        try:
            return _judge_hello(message, self._suites, self._protocols)
        except IndexError:  # a declared length that its surroundings do not hold
            return _MALFORMED


def _judge_plaintext(data: bytearray) -> Refusal | None:
    if data.startswith(_HTTP_METHODS):
        return Refusal(TlsFailure.PLAINTEXT_HTTP, None)
    head = bytes(data[:_LONGEST_HTTP_METHOD])
    if any(method.startswith(head) for method in _HTTP_METHODS):
        return None
    return Refusal(TlsFailure.NOT_TLS, None)


def _judge_hello(
    message: bytearray, suites: Container[int], protocols: Container[str | None]
) -> Accepted | Refusal:
    """RFC 8446 section 4.1.2: legacy_version, random, session id, suites, compression, extensions."""
    at = _MESSAGE_HEADER + 2 + 32
    session_id_length = message[at]
    at += 1 + session_id_length
    suites_length = message[at] << 8 | message[at + 1]
    suites_at = at + 2
    suites_end = suites_at + suites_length
    compressions_length = message[suites_end]
    at = suites_end + 1 + compressions_length
    if session_id_length > 32 or not suites_length or suites_length % 2 or not compressions_length:
        return _MALFORMED
    if at > len(message):
        return _MALFORMED
    versions = b""
    offered: list[bytes] | None = None
    if at < len(message):
        end = at + 2 + (message[at] << 8 | message[at + 1])
        if end != len(message):
            return _MALFORMED
        at += 2
        while at < end:
            kind = message[at] << 8 | message[at + 1]
            length = message[at + 2] << 8 | message[at + 3]
            at += 4
            if at + length > end:
                return _MALFORMED
            if kind == _EXT_SUPPORTED_VERSIONS:
                versions = bytes(message[at + 1 : at + length])
                if length < 3 or length % 2 == 0 or message[at] != length - 1:
                    return _MALFORMED
            elif kind == _EXT_ALPN:
                offered = _protocol_names(bytes(message[at : at + length]))
                if offered is None:
                    return _MALFORMED
            at += length
    if all(versions[i : i + 2] != _TLS_1_3 for i in range(0, len(versions), 2)):
        return Refusal(TlsFailure.UNSUPPORTED_VERSION, Alert.PROTOCOL_VERSION)
    if all((message[i] << 8 | message[i + 1]) not in suites for i in range(suites_at, suites_end, 2)):
        return Refusal(TlsFailure.NO_SHARED_SUITE, Alert.HANDSHAKE_FAILURE)
    names = [None] if offered is None else [name.decode("latin-1") for name in offered]
    if not any(name in protocols for name in names):
        return Refusal(TlsFailure.NO_APPLICATION_PROTOCOL, Alert.NO_APPLICATION_PROTOCOL)
    return ACCEPTED


def _protocol_names(data: bytes) -> list[bytes] | None:
    """The names of RFC 7301 section 3.1's list; None if it is malformed. An empty list or name is."""
    if len(data) < 2 or (data[0] << 8 | data[1]) != len(data) - 2:
        return None
    names: list[bytes] = []
    at = 2
    while at < len(data):
        length = data[at]
        at += 1
        if not length or at + length > len(data):
            return None
        names.append(data[at : at + length])
        at += length
    return names or None
