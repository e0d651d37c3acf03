"""The ClientHello, read before OpenSSL sees it: versions, suites, ALPN and the server's name, nothing more.

Why: no public API of Python before 3.15 restricts the suites of TLS 1.3, and none refuses an ALPN mismatch
with the alert that RFC 7301 section 3.2 demands. The server prefers its own order, so AES_128 could only ever
be chosen for a client that offers neither of our suites: such a client is refused here, with the right alert.
And as the name is known before the handshake begins, its context is taken then, not changed in the midst of it.

Total on any bytes: a judgement, or None for 'more is needed'. It can come in pieces and in several records
(RFC 8446 section 5.1); with a post-quantum key share it exceeds one segment. However it is cut, each byte is
looked at once. Nothing is changed: the bytes go on to OpenSSL as they came. Where several alerts fit, the order
is 70, 40, 120.
"""

from __future__ import annotations

import struct
from collections.abc import Container
from functools import lru_cache
from typing import Final, NamedTuple

from zcproto.tls.alert import Alert
from zcproto.tls.failure import TlsFailure

MAX_SIZE: Final = 16_384
"""Bytes of a ClientHello, records included. Browsers with post-quantum shares send about 2,000."""

MAX_NAME: Final = 255
"""Bytes of a server's name, as OpenSSL has it (TLSEXT_MAXLEN_host_name)."""

SUITE_IDS: Final = {
    "TLS_AES_256_GCM_SHA384": 0x1302,
    "TLS_CHACHA20_POLY1305_SHA256": 0x1303,
}
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
_NAMES_REMEMBERED: Final = 256

_SESSION_ID_AT: Final = _HEADERS + 2 + 32
_SESSION_ID_SIZE: Final = 32
_SUITES_AT: Final = _SESSION_ID_AT + 1 + _SESSION_ID_SIZE
_SIZES_REMEMBERED: Final = 32
_OFFERS_REMEMBERED: Final = 32
_MAX_OFFER: Final = 1_024

_both_headers: Final = struct.Struct("!BBxHBBH").unpack_from
_uint16: Final = struct.Struct("!H").unpack_from
_extension_header: Final = struct.Struct("!HH").unpack_from
_server_name_header: Final = struct.Struct("!HBH").unpack_from


class Refusal(NamedTuple):
    """Why a connection ends before its handshake. `alert` is None where the peer does not speak TLS."""

    failure: TlsFailure
    alert: Alert | None


class Accepted(NamedTuple):
    """OpenSSL may have it.

    `server_name` is the name of the server that the client wants, in lower case and without a dot at its end;
    None if it says none, or none that is a host's name.
    """

    server_name: str | None


ACCEPTED: Final = Accepted(None)
_MALFORMED: Final = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, Alert.DECODE_ERROR)
_NO_NAME: Final = Refusal(TlsFailure.MALFORMED_CLIENT_HELLO, Alert.UNRECOGNIZED_NAME)
_TOO_LARGE: Final = Refusal(TlsFailure.CLIENT_HELLO_TOO_LARGE, Alert.ILLEGAL_PARAMETER)
_UNEXPECTED: Final = Refusal(TlsFailure.UNEXPECTED_MESSAGE, Alert.UNEXPECTED_MESSAGE)
_NO_TLS_1_3: Final = Refusal(TlsFailure.UNSUPPORTED_VERSION, Alert.PROTOCOL_VERSION)
_NO_SUITE: Final = Refusal(TlsFailure.NO_SHARED_SUITE, Alert.HANDSHAKE_FAILURE)
_NO_PROTOCOL: Final = Refusal(TlsFailure.NO_APPLICATION_PROTOCOL, Alert.NO_APPLICATION_PROTOCOL)
_HTTP_METHODS: Final = tuple(
    name.encode() + b" "
    for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "CONNECT", "TRACE", "PRI")
)
_LONGEST_HTTP_METHOD: Final = max(map(len, _HTTP_METHODS))
_NAME_BYTES: Final = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."


class _Offers:
    """Hellos of one size that were accepted, each without its random, session id and key share, which lies from
    `share_at` to `share_end`."""

    __slots__ = ("accepted", "share_at", "share_end")

    def __init__(self, share_at: int, share_end: int) -> None:
        self.share_at = share_at
        self.share_end = share_end
        self.accepted: dict[bytes, Accepted] = {}


class ClientHelloJudge:
    """What all ClientHellos of one server are judged by.

    `suites` are the ids that may be negotiated; `protocols` are ALPN names, None standing for a client that
    offers no ALPN at all. Neither may change.

    The hellos of one program differ in nothing but their random, session id and key share, and these are not
    judged. So what was accepted is remembered without them: to find it again costs a tenth of reading all
    extensions once more.
    """

    __slots__ = ("_by_size", "_protocols", "_suites")

    def __init__(self, suites: Container[int], protocols: Container[str | None]) -> None:
        self._suites = suites
        self._protocols = protocols
        self._by_size: dict[int, _Offers] = {}

    def judge_record(self, data: bytes) -> Accepted | Refusal | None:
        """Judge what was received if it is one record with one ClientHello, as nearly always. None: it is not, read
        it with a ClientHelloReader."""
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
        offers = self._by_size.get(size)
        if offers is not None and data[_SESSION_ID_AT] == _SESSION_ID_SIZE:
            accepted = offers.accepted.get(data[_SUITES_AT : offers.share_at] + data[offers.share_end :])
            if accepted is not None:
                return accepted
        verdict = self.judge_hello(data, _HEADERS)
        if isinstance(verdict, Accepted) and data[_SESSION_ID_AT] == _SESSION_ID_SIZE:
            self._remember(data, verdict)
        return verdict

    def judge_hello(self, data: bytes | bytearray, at: int) -> Accepted | Refusal:
        """Judge the hello that begins at `at`, behind its header, and ends with the data."""
        try:
            return _judge_hello(data, at, self._suites, self._protocols)
        except (IndexError, struct.error):  # a declared length that its surroundings do not hold
            return _MALFORMED

    def _remember(self, data: bytes, accepted: Accepted) -> None:
        share_at, share_end = _key_share(data)
        offer = data[_SUITES_AT:share_at] + data[share_end:]
        if len(offer) > _MAX_OFFER:
            return
        offers = self._by_size.get(len(data))
        if offers is None or (offers.share_at, offers.share_end) != (share_at, share_end):
            if len(self._by_size) >= _SIZES_REMEMBERED:
                self._by_size.clear()  # those in use are back soon
            offers = self._by_size[len(data)] = _Offers(share_at, share_end)
        if len(offers.accepted) >= _OFFERS_REMEMBERED:
            offers.accepted.clear()
        offers.accepted[offer] = accepted


class ClientHelloReader:
    """The first bytes of one connection, where they come in pieces.

    `raw` is all that was fed: at most MAX_SIZE bytes while more is needed.
    """

    __slots__ = ("_at", "_judge", "_left", "_message", "raw")

    def __init__(self, judge: ClientHelloJudge) -> None:
        self._judge = judge
        self.raw = bytearray()
        self._at = 0  # what of `raw` was looked at
        self._left = 0  # bytes of the record there that are not in `_message` yet
        self._message = bytearray()

    def feed(self, data: bytes | memoryview) -> Accepted | Refusal | None:
        """Take in bytes. None if they do not tell yet; once there is a judgement, feed nothing more."""
        self.raw += data
        return self._judge_part() if self.raw else None

    def _judge_part(self) -> Accepted | Refusal | None:
        """Record by record, as far as there are bytes."""
        raw = self.raw
        if raw[0] not in _RECORD_TYPES:
            return _judge_plaintext(raw)
        if len(raw) > 1 and raw[1] != 3:
            return Refusal(TlsFailure.NOT_TLS, None)
        message = self._message
        while True:
            if not self._left:
                if len(raw) - self._at < _RECORD_HEADER:
                    return None
                refusal = self._read_record_header()
                if refusal is not None:
                    return refusal
            part = raw[self._at : self._at + self._left]
            message += part
            self._at += len(part)
            self._left -= len(part)
            judgement = self._judge_message(message)
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

    def _judge_message(self, message: bytearray) -> Accepted | Refusal | None:
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
        return self._judge.judge_hello(message, _MESSAGE_HEADER)


def _judge_plaintext(data: bytearray) -> Refusal | None:
    if data.startswith(_HTTP_METHODS):
        return Refusal(TlsFailure.PLAINTEXT_HTTP, None)
    head = bytes(data[:_LONGEST_HTTP_METHOD])
    if any(method.startswith(head) for method in _HTTP_METHODS):
        return None
    return Refusal(TlsFailure.NOT_TLS, None)


def _judge_hello(
    data: bytes | bytearray, at: int, suites: Container[int], protocols: Container[str | None]
) -> Accepted | Refusal:
    """Judge the hello that begins at `at` and ends with the data.

    RFC 8446 section 4.1.2: legacy_version, random, session id, suites, compression, extensions. Raises
    IndexError or struct.error for what reaches beyond the end.
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
    return _NO_PROTOCOL


def _key_share(data: bytes) -> tuple[int, int]:
    """Where the first key share of an accepted hello begins and ends; at its end if there is none."""
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
    """The names of RFC 7301 section 3.1's list; none if it is malformed. An empty list or name is."""
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


@lru_cache(_NAMES_REMEMBERED)
def _accepted(name: bytes) -> Accepted:
    """The judgement for a client that wants the server of this name.

    What cannot be a host's name counts as none: a context is looked up by it, and logs may show it.
    """
    if name.translate(None, _NAME_BYTES):
        return ACCEPTED
    host = name.decode("ascii").lower().removesuffix(".")
    labels = host.split(".")
    if not all(labels) or labels[-1].isdigit():  # an address is no name (RFC 6066 section 3)
        return ACCEPTED
    return Accepted(host)
