"""Run the server side of one HTTP/1.1 connection (sans-IO): bytes and times in; requests, bytes, a deadline out.

    connection = HttpConnection(limits, security, now, peer)
    request = connection.receive_data(data, wall, now)      # None: no request is complete
    request = connection.respond(response, wall, now)       # the next pipelined request, if complete
    transport.write(connection.data_to_send())              # after each of these; close if `closing`
    connection.handle_timeout(wall, now)                    # at `next_deadline()`

h11 reads and writes the messages; each request has its own h11.Connection. This file decides the limits of size,
count and time, the status of each refusal, and when the connection ends.

Rules:
- One complete request at a time is returned. Bytes after it are buffered up to a bound (`wants_data`).
- Ambiguous input that h11 accepts is refused: a bare CR or LF, control characters, folded lines, a repeated
  Content-Length or one beside Transfer-Encoding (RFC 9112 sections 2.2, 5.2 and 6.1).
- After an invalid request nothing more is read: the start of the next one is unknown. Nor after a chunked body,
  because implementations disagree about trailers.
- Every response is sent by `_send`, which adds the security headers.

It must not know: transports, TLS, clocks, routes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import Final

import h11

from zcproto.http.messages import HttpRequest, HttpResponse, Peer, SecurityHeaders, text_response

METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
"""Any other method is 501: CONNECT has no use here, and TRACE would reveal header fields added by proxies.
The router decides which of these a path accepts."""

_LINE_END: Final = b"\r\n"
_HEAD_END: Final = b"\r\n\r\n"
_AROUND_TARGET: Final = 32
"""Bytes of a request line beside its target: the longest method, the version, two spaces."""

_AMBIGUOUS: Final = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r[^\n]|\n[ \t]")
_CONTENT_LENGTH: Final = re.compile(rb"\r\ncontent-length:([^\r]*)", re.IGNORECASE)
_HOST: Final = re.compile(rb"([A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(:[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(r"(?i:https?)://[^/?#]+([^?#]*)(?:\?([^#]*))?")
_MS: Final = 1000
NEVER: Final = float("inf")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """Limits of one client. Sizes in bytes, times in seconds."""

    max_head: int = 16_384
    """The request line and all header fields. Browsers send under 2 KiB."""
    max_target: int = 2_048
    max_fields: int = 64
    max_body: int = 16_384
    max_chunks: int = 256
    """Chunks of one body. Each costs about 50 us, however small; clients send chunks of several KiB."""
    max_requests: int = 1_000
    """Requests of one connection; then it is closed and the client reconnects."""
    request_timeout: float = 10.0
    """Time for the complete head, and again for the complete body."""
    answer_timeout: float = 30.0
    """Time for a handler."""
    idle_timeout: float = 60.0
    """Time between two requests: longer than the 15 or 30 seconds of a monitor, to save it a handshake."""


class _ParserState(Enum):
    HEAD = "head"  # idle, or reading a head
    BODY = "body"
    ANSWERING = "answering"
    CLOSING = "closing"


class _Refused(Exception):
    """Refuse the request with this status and read nothing more."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text or HTTPStatus(status).phrase.lower())
        self.status = status


@dataclass(slots=True, eq=False, repr=False)
class HttpConnection:
    """One HTTP connection. `wall` is milliseconds since the Unix epoch, `now` monotonic seconds.

    `sent` holds the statuses of responses since it was last emptied; metrics read it.
    """

    _limits: HttpLimits
    _security: SecurityHeaders
    now: InitVar[float]
    _peer: Peer = field(default_factory=Peer)
    _buffer: bytearray = field(default_factory=bytearray, init=False)
    _scanned: int = field(default=0, init=False)
    """Bytes of the buffer that hold neither the end of a head nor ambiguous input."""
    _skipped_empty_line: bool = field(default=False, init=False)  # before the request line
    _h11: h11.Connection | None = field(default=None, init=False)  # parser of the current request
    _request: h11.Request | None = field(default=None, init=False)
    _body: bytearray = field(default_factory=bytearray, init=False)
    _chunks: int = field(default=0, init=False)
    _out: list[bytes] = field(default_factory=list, init=False)
    _requests_left: int = field(init=False)
    _is_last: bool = field(default=False, init=False)
    _state: _ParserState = field(default=_ParserState.HEAD, init=False)
    _deadline: float = field(init=False)
    sent: list[int] = field(default_factory=list, init=False)

    def __post_init__(self, now: float) -> None:
        self._requests_left = self._limits.max_requests
        self._deadline = now + self._limits.request_timeout

    # --- interface of the transport ------------------------------------------------------------------

    @property
    def wants_data(self) -> bool:
        """Return True if the transport should keep reading.

        Reading continues while a request is being answered, to notice a disconnect; at most one maximum head is
        buffered before it pauses.
        """
        if self._state is _ParserState.ANSWERING:
            return len(self._buffer) < self._limits.max_head
        return self._state is not _ParserState.CLOSING

    @property
    def closing(self) -> bool:
        """Return True if the connection closes once `data_to_send` is flushed."""
        return self._state is _ParserState.CLOSING

    @property
    def idle(self) -> bool:
        """Return True if no byte of a request has been received."""
        return self._state is _ParserState.HEAD and not self._buffer

    def data_to_send(self) -> bytes:
        out, self._out = self._out, []
        return b"".join(out)

    def next_deadline(self) -> float:
        return self._deadline

    # --- bytes in ------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, wall: int, now: float) -> HttpRequest | None:
        """Add received bytes. Return the request that they complete, unless one is being answered."""
        if self._state is _ParserState.CLOSING:
            return None
        if self.idle:
            self._deadline = min(self._deadline, now + self._limits.request_timeout)
        self._buffer += data
        return self._advance(wall, now)

    def _advance(self, wall: int, now: float) -> HttpRequest | None:
        try:
            if self._state is _ParserState.HEAD:
                self._read_head(now)
            if self._state is _ParserState.BODY:
                return self._read_body(now)
        except _Refused as refused:
            self._refuse(refused, wall)
        return None

    def _read_head(self, now: float) -> None:
        head = self._take_head()
        if head is None:
            return
        lengths = _CONTENT_LENGTH.findall(head)
        if len(lengths) > 1 or (lengths and b"," in lengths[0]):
            raise _Refused(400, "content-length must be given once")
        self._h11 = parser = h11.Connection(h11.SERVER, max_incomplete_event_size=self._limits.max_head)
        parser.receive_data(head)
        try:
            request = parser.next_event()
        except h11.RemoteProtocolError as error:
            status = 400 if lengths else error.error_status_hint
            raise _Refused(status) from error
        assert isinstance(request, h11.Request), "a complete head is a request or an error"
        self._request = request
        self._check(request, lengths)
        self._requests_left -= 1
        self._state = _ParserState.BODY
        self._deadline = now + self._limits.request_timeout

    def _take_head(self) -> bytes | None:
        """Remove and return the head if it is complete. Each byte is scanned about once, however they arrive."""
        buffer, limits = self._buffer, self._limits
        if not self._skipped_empty_line and buffer.startswith(_LINE_END):  # RFC 9112 section 2.2
            del buffer[:2]
            self._skipped_empty_line = True
        end = buffer.find(_HEAD_END, max(0, self._scanned - 3), limits.max_head)
        size = len(buffer) if end < 0 else end + len(_HEAD_END)
        longest = limits.max_target + _AROUND_TARGET
        is_too_long = size > longest and buffer.find(_LINE_END, 0, longest) < 0
        # The answer must not depend on how many bytes after the bound have arrived.
        bound = longest if is_too_long else limits.max_head
        if _AMBIGUOUS.search(buffer, max(0, self._scanned - 1), min(size, bound)):
            raise _Refused(400)
        if is_too_long:
            raise _Refused(414)
        if size > limits.max_head:
            raise _Refused(431)
        if end < 0:
            self._scanned = size
            return None
        head = bytes(buffer[:size])
        del buffer[:size]
        self._scanned, self._skipped_empty_line = 0, False
        if head.count(_LINE_END) - 2 > limits.max_fields:
            raise _Refused(431, "too many header fields")
        return head

    def _check(self, request: h11.Request, lengths: Sequence[bytes]) -> None:
        """Check what h11 does not. Raises _Refused."""
        fields = dict(request.headers)
        if not request.http_version.startswith(b"1."):
            raise _Refused(505)
        if request.method not in METHODS:
            raise _Refused(501)
        if len(request.target) > self._limits.max_target:
            raise _Refused(414)
        if not _HOST.fullmatch(fields.get(b"host", b"")):
            raise _Refused(400, "host must be a name or an address")
        if b"transfer-encoding" in fields:
            if lengths or request.http_version == b"1.0":
                raise _Refused(400, "transfer-encoding is not allowed here")
            self._is_last = True
        elif b"content-length" in fields and int(fields[b"content-length"]) > self._limits.max_body:
            raise _Refused(413)
        if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
            raise _Refused(417)
        if _path_and_query(request) is None:
            raise _Refused(400, "the target must be a path")

    def _read_body(self, now: float) -> HttpRequest | None:
        parser = self._h11
        assert parser is not None, "set from the head to the answer"
        try:
            event = parser.next_event()
            if event is h11.NEED_DATA and self._buffer:
                parser.receive_data(bytes(self._buffer))
                self._buffer.clear()
                event = parser.next_event()
            elif parser.they_are_waiting_for_100_continue:
                proceed = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self._out.append(parser.send(proceed))
            while event.__class__ is h11.Data:
                assert isinstance(event, h11.Data)
                self._body += event.data
                self._chunks += event.chunk_end
                if len(self._body) > self._limits.max_body or self._chunks > self._limits.max_chunks:
                    raise _Refused(413)
                event = parser.next_event()
        except h11.RemoteProtocolError as error:
            raise _Refused(error.error_status_hint) from error
        if event is h11.NEED_DATA:
            return None
        assert isinstance(event, h11.EndOfMessage), "a body is data, then its end"
        # Trailing bytes belong to the next request.
        self._buffer += parser.trailing_data[0]
        body, self._body = bytes(self._body), bytearray()
        self._state = _ParserState.ANSWERING
        self._deadline = now + self._limits.answer_timeout
        assert self._request is not None
        return _request_of(self._request, body, self._peer)

    # --- responses out -------------------------------------------------------------------------------

    def respond(self, response: HttpResponse, wall: int, now: float) -> HttpRequest | None:
        """Send a response. Return the next pipelined request, if complete. A late response is dropped."""
        if self._state is not _ParserState.ANSWERING:
            return None
        self._send(response, wall)
        if self.closing:
            return None
        self._h11 = self._request = None
        self._state = _ParserState.HEAD
        limits = self._limits
        self._deadline = now + (limits.request_timeout if self._buffer else limits.idle_timeout)
        return self._advance(wall, now)

    def _send(self, response: HttpResponse, wall: int) -> None:
        """Queue a response; every response passes here."""
        parser = self._h11
        if parser is None:  # the head was not parsed
            parser = h11.Connection(h11.SERVER)
        last = self._is_last or response.close or self._requests_left <= 0
        fields: list[tuple[str, str]] = [("Date", _date(wall // _MS)), *response.headers]
        if response.status != HTTPStatus.NO_CONTENT:
            fields += [("Content-Type", response.content_type), ("Content-Length", str(len(response.body)))]
        if last:
            fields.append(("Connection", "close"))
        message = h11.Response(
            status_code=response.status, headers=fields, reason=HTTPStatus(response.status).phrase
        )
        security = self._security.block(response.policy)
        # Nothing below raises: an invalid response was refused above.
        status_line, line_end, rest = parser.send(message).partition(_LINE_END)
        self._out += (status_line, line_end, security, rest)
        if self._request is None or self._request.method != b"HEAD":
            self._out.append(parser.send(h11.Data(data=response.body)))
        parser.send(h11.EndOfMessage())
        self.sent.append(response.status)
        if last or parser.our_state is not h11.DONE:
            self._end()

    def _refuse(self, refused: _Refused, wall: int) -> None:
        self._is_last = True
        self._send(text_response(refused.status, str(refused)), wall)

    # --- time, and the end ---------------------------------------------------------------------------

    def handle_timeout(self, wall: int, now: float) -> None:
        """Answer an incomplete request with 408 and a slow handler with 503; close an idle connection."""
        if now < self._deadline or self._state is _ParserState.CLOSING:
            return
        if self.idle:
            self._end()
        else:
            self._refuse(_Refused(503 if self._state is _ParserState.ANSWERING else 408), wall)

    def go_away(self) -> None:
        """Close the connection after the next response."""
        self._is_last = True

    def _end(self) -> None:
        self._state = _ParserState.CLOSING
        self._deadline = NEVER
        self._buffer.clear()
        self._body.clear()
        self._h11 = self._request = None


def _path_and_query(request: h11.Request) -> tuple[str, str] | None:
    """Split a target in origin, absolute or asterisk form (RFC 9112 section 3.2). Return None for any other."""
    target = request.target.decode("ascii")
    if target.startswith("/") or (target == "*" and request.method == b"OPTIONS"):
        path, _, query = target.partition("?")
        return path, query
    absolute = _ABSOLUTE.fullmatch(target)
    return absolute and (absolute[1] or "/", absolute[2] or "")


def _request_of(request: h11.Request, body: bytes, peer: Peer) -> HttpRequest:
    target = _path_and_query(request)
    assert target is not None, "checked with the head"
    headers: dict[str, str] = {}
    for raw_name, raw_value in request.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return HttpRequest(request.method.decode("ascii"), *target, headers, body, peer)


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    """Format a time as an HTTP-date (RFC 9110 section 5.6.7)."""
    return formatdate(second, usegmt=True)
