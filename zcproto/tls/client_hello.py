"""Parse the ClientHello before OpenSSL does: versions, suites, ALPN and server name only.

No public API of Python before 3.15 restricts the suites of TLS 1.3, and none refuses an ALPN mismatch with the
alert that RFC 7301 section 3.2 requires. The server prefers its own order, so AES_128 would be chosen only for a
client that offers neither of our suites: it is refused here, with the correct alert. The server name is known
before the handshake begins, so the right context is used from the start.

Every input gives a verdict, or None ("more bytes needed"). A hello can arrive in pieces and in several records
(RFC 8446 section 5.1); with a post-quantum key share it exceeds one segment. Each byte is read once, however it
is split, and passed to OpenSSL unchanged. If several alerts apply, the order is 70, 40, 120.

Records after the hello are not judged: they may be early data, which OpenSSL skips (RFC 8446 section 4.2.10).
"""

from __future__ import annotations

import struct
from collections.abc import Container
from enum import IntEnum
from functools import lru_cache
from typing import Any, Final, NamedTuple

from zcproto.tls.failure import TlsFailure

MAX_MESSAGE: Final = 131_396
"""Maximum bytes of a ClientHello, as in OpenSSL (CLIENT_HELLO_MAX_LENGTH): all vectors of maximum size."""

MAX_SIZE: Final = MAX_MESSAGE + 8_192
"""Maximum bytes of its records. Browsers with post-quantum shares send about 2,000."""

MAX_NAME: Final = 255
"""Maximum bytes of a server name, as in OpenSSL (TLSEXT_MAXLEN_host_name)."""

ACME_PROTOCOL: Final = "acme-tls/1"
"""The only ALPN name of a CA that checks a name (RFC 8737 section 3)."""

SUITE_IDS: Final = {
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
}
_ALERT_RECORD: Final = 21
_FATAL: Final = 2
_HANDSHAKE_RECORD: Final = 22
_RECORD_TYPES: Final = frozenset({20, 21, 22, 23})
_RECORD_HEADER: Final = 5
_CLIENT_HELLO: Final = 1
_MESSAGE_HEADER: Final = 4
_HEADERS: Final = _RECORD_HEADER + _MESSAGE_HEADER
_EXT_SERVER_NAME: Final = 0
_EXT_ALPN: Final = 16
_EXT_SUPPORTED_VERSIONS: Final = 43
_EXT_KEY_SHARE: Final = 51
_HOST_NAME: Final = 0
_TLS_1_3: Final = b"\x03\x04"
_CACHED_NAMES: Final = 256

_RANDOM_AT: Final = _HEADERS + 2
_SESSION_ID_AT: Final = _RANDOM_AT + 32
_SESSION_ID_SIZE: Final = 32
_SUITES_AT: Final = _SESSION_ID_AT + 1 + _SESSION_ID_SIZE
_CACHED_HEADS: Final = 32
_CACHED_OFFERS: Final = 32
_MAX_OFFER: Final = 1_024

_both_headers: Final = struct.Struct("!BBxHBBH").unpack_from
_uint16: Final = struct.Struct("!H").unpack_from
_extension_header: Final = struct.Struct("!HH").unpack_from
_server_name_header: Final = struct.Struct("!HBH").unpack_from


class AlertDescription(IntEnum):
    """The alert descriptions of RFC 8446 section 6 that a server needs before the handshake begins."""

    UNEXPECTED_MESSAGE = 10
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    ILLEGAL_PARAMETER = 47
    DECODE_ERROR = 50
    PROTOCOL_VERSION = 70
    UNRECOGNIZED_NAME = 112
    NO_APPLICATION_PROTOCOL = 120


def alert_record(alert: AlertDescription) -> bytes:
    """Return a fatal alert as one plaintext record with legacy version 0x0303 (RFC 8446 section 5.1)."""
    return bytes((_ALERT_RECORD, 3, 3, 0, 2, _FATAL, alert))


class Refusal(NamedTuple):
    """The reason to end a connection before its handshake. `alert` is None if the peer does not speak TLS."""

    failure: TlsFailure
    alert: AlertDescription | None


class Accepted(NamedTuple):
    """The hello may be passed to OpenSSL.

    `server_name` is the requested name in lower case without a trailing dot; None if missing or not a host name.
    """

    server_name: str | None


class ChallengeHello(NamedTuple):
    """The hello is that of a CA that checks the name; to be refused by NO_PROTOCOL if it is not to be answered."""

    server_name: str | None


Verdict = Accepted | ChallengeHello | Refusal

ACCEPTED: Final = Accepted(None)
_MALFORMED: Final = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.DECODE_ERROR)
_NO_NAME: Final = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, AlertDescription.UNRECOGNIZED_NAME)
_RECORD_TOO_LARGE: Final = Refusal(TlsFailure.RECORD_TOO_LARGE, AlertDescription.RECORD_OVERFLOW)
_NOT_TLS: Final = Refusal(TlsFailure.NOT_TLS, None)
TOO_LARGE: Final = Refusal(TlsFailure.CLIENT_HELLO_TOO_LARGE, AlertDescription.ILLEGAL_PARAMETER)
UNEXPECTED: Final = Refusal(TlsFailure.UNEXPECTED_MESSAGE, AlertDescription.UNEXPECTED_MESSAGE)
_NO_TLS_1_3: Final = Refusal(TlsFailure.UNSUPPORTED_VERSION, AlertDescription.PROTOCOL_VERSION)
_NO_SUITE: Final = Refusal(TlsFailure.NO_SHARED_SUITE, AlertDescription.HANDSHAKE_FAILURE)
NO_PROTOCOL: Final = Refusal(TlsFailure.NO_APPLICATION_PROTOCOL, AlertDescription.NO_APPLICATION_PROTOCOL)
_HTTP_METHODS: Final = tuple(
    name.encode() + b" "
    for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "PRI")
)
_LONGEST_HTTP_METHOD: Final = max(map(len, _HTTP_METHODS))
_NAME_BYTES: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


class _Offers:
    """Accepted hellos of one size, without random, session id and key share (from `share_at` to `share_end`)."""

    __slots__ = ("accepted", "parts", "share", "size")

    def __init__(self, size: int, share_at: int, share_end: int) -> None:
        self.size = size
        self.share = share_at, share_end
        offer = f"{share_at - _SUITES_AT}s{share_end - share_at}x{size - share_end}s"
        self.parts = struct.Struct(f"!{_SESSION_ID_AT}xB{_SESSION_ID_SIZE}x{offer}").unpack
        """Returns the size of the session id, and what is before and after the key share."""
        self.accepted: dict[tuple[Any, ...], Accepted] = {}


class ClientHelloJudge:
    """Judge the ClientHellos of one server.

    `suites` are the ids that may be negotiated; `protocols` are ALPN names, None for a client without ALPN. Neither
    may change.

    Hellos of one program differ only in random, session id and key share, which are not judged. Accepted hellos are
    therefore cached without them: a hit costs a tenth of parsing all extensions.
    """

    def __init__(self, suites: Container[int], protocols: Container[str | None]) -> None:
        self._suites = suites
        self._protocols = protocols
        self._by_head: dict[bytes, _Offers] = {}  # by both headers and the version: all before the random

    def judge_record(self, data: bytes) -> Verdict | None:
        """Judge data that is exactly one record with one ClientHello, the usual case. None: use a
        ClientHelloReader."""
        offers = self._by_head.get(data[:_RANDOM_AT])
        if offers is not None and len(data) == offers.size:
            accepted = offers.accepted.get(offers.parts(data))
            if accepted is not None:
                return accepted
        size = len(data)
        if not _HEADERS <= size <= MAX_SIZE or _both_headers(data) != (
            _HANDSHAKE_RECORD,
            3,
            size - _RECORD_HEADER,
            _CLIENT_HELLO,
            0,
            size - _HEADERS,
        ):
            return None
        verdict = self.judge_hello(data, _HEADERS)
        if isinstance(verdict, Accepted) and data[_SESSION_ID_AT] == _SESSION_ID_SIZE:
            self._cache(data, verdict)
        return verdict

    def judge_hello(self, data: bytes | bytearray, at: int) -> Verdict:
        """Judge the hello from `at`, after its header, to the end of the data."""
        try:
            return _judge_hello(data, at, self._suites, self._protocols)
        except (IndexError, struct.error):  # a declared length exceeds the data
            return _MALFORMED

    def _cache(self, data: bytes, accepted: Accepted) -> None:
        share_at, share_end = share = _key_share(data)
        if len(data) - _SUITES_AT - (share_end - share_at) > _MAX_OFFER:
            return
        head = data[:_RANDOM_AT]
        offers = self._by_head.get(head)
        if offers is None or offers.share != share:
            if len(self._by_head) >= _CACHED_HEADS:
                self._by_head.clear()  # those in use return soon
            offers = self._by_head[head] = _Offers(len(data), *share)
        if len(offers.accepted) >= _CACHED_OFFERS:
            offers.accepted.clear()
        offers.accepted[offers.parts(data)] = accepted


class ClientHelloReader:
    """Reassemble and judge a ClientHello that arrives in pieces.

    `raw` holds all received bytes: at most MAX_SIZE while more are needed.
    """

    __slots__ = ("_at", "_header", "_judge", "_left", "_size", "raw")

    def __init__(self, judge: ClientHelloJudge) -> None:
        self._judge = judge
        self.raw = bytearray()
        self._at = 0  # position in `raw` of the next byte to read
        self._left = 0  # bytes of the current record not yet read
        self._header = bytearray()
        self._size = 0  # bytes of the message read, header included

    def feed(self, data: bytes | memoryview) -> Verdict | None:
        """Add received bytes. Return the verdict, or None if more bytes are needed. Do not call it after a
        verdict."""
        self.raw += data
        return self._judge_records() if self.raw else None

    def _judge_records(self) -> Verdict | None:
        """Read the received records, one after the other."""
        raw = self.raw
        if raw[0] not in _RECORD_TYPES:
            return _judge_other(raw)
        if len(raw) > 1 and raw[1] != 3:
            return _NOT_TLS
        while True:
            if not self._left:
                if len(raw) - self._at < _RECORD_HEADER:
                    return None
                refusal = self._read_record_header()
                if refusal is not None:
                    return refusal
            arrived = min(self._left, len(raw) - self._at)
            if self._size < _MESSAGE_HEADER:
                self._header += raw[self._at : self._at + min(arrived, _MESSAGE_HEADER - self._size)]
            self._at += arrived
            self._left -= arrived
            self._size += arrived
            verdict = self._judge_message()
            if verdict is not None or self._left:
                return verdict

    def _read_record_header(self) -> Refusal | None:
        raw, at = self.raw, self._at
        if raw[at] != _HANDSHAKE_RECORD:
            return UNEXPECTED
        length = raw[at + 3] << 8 | raw[at + 4]
        if not 0 < length <= 2**14:  # RFC 8446 section 5.1: no empty handshake records
            return _RECORD_TOO_LARGE if length else _MALFORMED
        self._at = at + _RECORD_HEADER
        self._left = length
        return TOO_LARGE if self._at + length > MAX_SIZE else None

    def _judge_message(self) -> Verdict | None:
        header, size = self._header, self._size
        if header and header[0] != _CLIENT_HELLO:
            return UNEXPECTED
        length = int.from_bytes(header[1:])  # of an incomplete header: at most the length
        if length > MAX_MESSAGE:
            return TOO_LARGE
        if size < _MESSAGE_HEADER + length:
            return None
        if size > _MESSAGE_HEADER + length or self._left:  # no message may share its last record
            return UNEXPECTED
        return self._judge.judge_hello(self._message(), _MESSAGE_HEADER)

    def _message(self) -> bytes:
        """Return the message without the headers of its records."""
        raw, at, parts = self.raw, 0, []
        while at < self._at:
            end = at + _RECORD_HEADER + (raw[at + 3] << 8 | raw[at + 4])
            parts.append(raw[at + _RECORD_HEADER : end])
            at = end
        return b"".join(parts)


def _judge_other(data: bytearray) -> Refusal | None:
    """Judge data whose first byte is not a known record type."""
    if data.startswith(_HTTP_METHODS):
        return Refusal(TlsFailure.PLAINTEXT_HTTP, None)
    head = bytes(data[:_LONGEST_HTTP_METHOD])
    if len(head) == 1 or any(method.startswith(head) for method in _HTTP_METHODS):
        return None
    return UNEXPECTED if head[1] == 3 else _NOT_TLS


def _judge_hello(
    data: bytes | bytearray, at: int, suites: Container[int], protocols: Container[str | None]
) -> Verdict:
    """Judge the hello from `at` to the end of the data.

    RFC 8446 section 4.1.2: legacy_version, random, session id, suites, compression, extensions. Raises
    IndexError or struct.error if a length exceeds the data.
    """
    size = len(data)
    at += 2 + 32
    session_id_length = data[at]
    at += 1 + session_id_length
    suites_length = data[at] << 8 | data[at + 1]
    suites_at = at + 2
    suites_end = suites_at + suites_length
    compressions_length = data[suites_end]
    at = suites_end + 1 + compressions_length
    if session_id_length > 32 or not suites_length or suites_length % 2 or not compressions_length:
        return _MALFORMED
    if at > size:
        return _MALFORMED
    versions = b""
    offered: list[str | None] = [None]
    name = b""
    if at < size:
        if at + 2 + _uint16(data, at)[0] != size:
            return _MALFORMED
        at += 2
        while at < size:
            kind, length = _extension_header(data, at)
            at += 4
            end = at + length
            if kind == _EXT_SUPPORTED_VERSIONS:
                versions = bytes(data[at + 1 : end])
                if length < 3 or length % 2 == 0 or data[at] != length - 1:
                    return _MALFORMED
            elif kind == _EXT_ALPN:
                offered = _protocol_names(bytes(data[at:end]))
                if not offered:
                    return _MALFORMED
            elif kind == _EXT_SERVER_NAME:  # RFC 6066 section 3: one name of the one type there is
                if _server_name_header(data, at) != (length - 2, _HOST_NAME, length - 5):
                    return _MALFORMED
                name = bytes(data[at + 5 : end])
                if len(name) > MAX_NAME or 0 in name:
                    return _NO_NAME
            at = end
        if at != size:
            return _MALFORMED
    for i in range(0, len(versions), 2):
        if versions[i : i + 2] == _TLS_1_3:
            break
    else:
        return _NO_TLS_1_3
    for i in range(suites_at, suites_end, 2):
        if (data[i] << 8 | data[i + 1]) in suites:
            break
    else:
        return _NO_SUITE
    for protocol in offered:
        if protocol in protocols:
            return _accepted(name) if name else ACCEPTED
    if offered == [ACME_PROTOCOL]:
        return ChallengeHello(_accepted(name).server_name)
    return NO_PROTOCOL


def _key_share(data: bytes) -> tuple[int, int]:
    """Return the start and end of the first key share of an accepted hello; twice the size if it has none."""
    size = len(data)
    at = _SUITES_AT + 2 + _uint16(data, _SUITES_AT)[0]
    at += 1 + data[at] + 2
    while at < size:
        kind, length = _extension_header(data, at)
        at += 4
        if kind == _EXT_KEY_SHARE:
            return at, at + length
        at += length
    return size, size


def _protocol_names(data: bytes) -> list[str | None]:
    """Return the names of an ALPN list (RFC 7301 section 3.1); empty if it is malformed or has an empty name."""
    size = len(data)
    if _uint16(data)[0] != size - 2:
        return []
    names: list[str | None] = []
    at = 2
    while at < size:
        start = at + 1
        at = start + data[at]
        if at == start or at > size:
            return []
        names.append(data[start:at].decode("latin-1"))
    return names


@lru_cache(_CACHED_NAMES)
def _accepted(name: bytes) -> Accepted:
    """Return the verdict for a client that requests this server name.

    An invalid host name counts as none: it is used to look up a context and may appear in logs.
    """
    if name.translate(None, _NAME_BYTES):
        return ACCEPTED
    host = name.decode("ascii").lower().removesuffix(".")
    labels = host.split(".")
    if not all(labels) or labels[-1].isdigit():  # addresses are not names (RFC 6066 section 3)
        return ACCEPTED
    return Accepted(host)
