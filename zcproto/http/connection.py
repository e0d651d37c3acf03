"""The server's side of one HTTP/1.1 connection, without I/O: bytes and times in; requests, bytes, a deadline out.

    connection = HttpConnection(limits, security, now, peer)
    request = connection.receive_data(data, wall, now)      # None: none is complete
    request = connection.respond(response, wall, now)       # the next one that is there already, if any
    transport.write(connection.data_to_send())              # after each of these; close if `closing`
    connection.handle_timeout(wall, now)                    # at `next_deadline()`

h11 reads and writes the messages; each request has an h11.Connection of its own. What this file decides: how much
of everything is taken and for how long, what is refused with which status, and when the connection ends.

Rules:
- One request at a time is handed out, whole. What follows it waits here, up to a bound (`wants_data`).
- Whatever h11 takes though two readers could understand it in two ways is refused: a bare CR or LF, control
  characters, folded lines, Content-Length twice or beside Transfer-Encoding (RFC 9112 sections 2.2, 5.2 and 6.1).
- After an error in what came in nothing more is read: where the next request begins is anybody's guess. After a
  chunked body nothing is read either, as programs disagree about its trailer.
- Every response goes out through `_send`, which puts the security headers in.

It must not know: transports, TLS, clocks, routes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import formatdate
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from typing import Final

import h11

from zcproto.http.messages import NOBODY, HttpRequest, HttpResponse, Peer, text_response
from zcproto.http.security_headers import SecurityHeaders

METHODS: Final = frozenset({b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"})
"""Any other is 501: there are no tunnels here, and TRACE would show what somebody else has put into a request.
Whether a path takes one of these is for routes to say."""

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
    """What a client may take. Sizes in bytes, times in seconds."""

    max_head: int = 16_384
    """The request line and all header fields. Browsers send under 2 KiB."""
    max_target: int = 2_048
    max_fields: int = 64
    max_body: int = 16_384
    max_chunks: int = 256
    """Of one body. Reading a chunk costs some 50 us, however small it is; clients send them by the KiB."""
    max_requests: int = 1_000
    """Requests of one connection, after which the client connects anew."""
    request_timeout: float = 10.0
    """For the whole head, and again for the whole body, however the bytes drip."""
    answer_timeout: float = 30.0
    """For a handler that waits for something."""
    idle_timeout: float = 30.0
    """Between two requests."""


class _State(Enum):
    HEAD = "head"  # idle, or in the midst of a head
    BODY = "body"
    ANSWERING = "answering"
    CLOSING = "closing"


class _Refused(Exception):
    """What came in is answered with this status, and is the last that was read."""

    def __init__(self, status: int, text: str = "") -> None:
        super().__init__(text or HTTPStatus(status).phrase.lower())
        self.status = status


class HttpConnection:
    """One client's conversation. `wall` is milliseconds since the Unix epoch, `now` monotonic seconds.

    `sent` are the statuses of the responses since it was last emptied, for whoever counts them.
    """

    __slots__ = (
        "_body",
        "_buffer",
        "_chunks",
        "_deadline",
        "_h11",
        "_is_last",
        "_left",
        "_limits",
        "_looked",
        "_out",
        "_peer",
        "_request",
        "_security",
        "_skipped",
        "_state",
        "sent",
    )

    def __init__(
        self, limits: HttpLimits, security: SecurityHeaders, now: float, peer: Peer = NOBODY
    ) -> None:
        self._limits = limits
        self._peer = peer
        self._security = security
        self._buffer = bytearray()
        self._looked = 0  # how much of it is known to hold no end of a head, and nothing ambiguous
        self._skipped = False  # an empty line before the request
        self._h11: h11.Connection | None = None  # of the request that is being read or answered
        self._request: h11.Request | None = None
        self._body = bytearray()
        self._chunks = 0
        self._out: list[bytes] = []
        self._left = limits.max_requests
        self._is_last = False
        self._state = _State.HEAD
        self._deadline = now + limits.request_timeout
        self.sent: list[int] = []

    # --- what the one who moves the bytes asks -------------------------------------------------------

    @property
    def wants_data(self) -> bool:
        """Whether more should be read.

        While a request is being answered, that is to learn that its client is gone: what else comes is kept, but
        no more than the largest head before reading stops.
        """
        if self._state is _State.ANSWERING:
            return len(self._buffer) < self._limits.max_head
        return self._state is not _State.CLOSING

    @property
    def closing(self) -> bool:
        """Whether the connection ends when `data_to_send` has been sent."""
        return self._state is _State.CLOSING

    @property
    def idle(self) -> bool:
        """Whether nothing of a request is there."""
        return self._state is _State.HEAD and not self._buffer

    def data_to_send(self) -> bytes:
        out, self._out = self._out, []
        return b"".join(out)

    def next_deadline(self) -> float:
        return self._deadline

    # --- bytes in ------------------------------------------------------------------------------------

    def receive_data(self, data: bytes, wall: int, now: float) -> HttpRequest | None:
        """Take in bytes; the request that they complete, if none is being answered."""
        if self._state is _State.CLOSING:
            return None
        if self.idle:
            self._deadline = min(self._deadline, now + self._limits.request_timeout)
        self._buffer += data
        return self._advance(wall, now)

    def _advance(self, wall: int, now: float) -> HttpRequest | None:
        try:
            if self._state is _State.HEAD:
                self._read_head(now)
            if self._state is _State.BODY:
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
        assert isinstance(request, h11.Request), "a whole head is a request, or an error"
        self._request = request
        self._check(request, lengths)
        self._left -= 1
        self._state = _State.BODY
        self._deadline = now + self._limits.request_timeout

    def _take_head(self) -> bytes | None:
        """The head in the buffer, if it is whole. Each byte is looked at about once, however they come."""
        buffer, limits = self._buffer, self._limits
        if not self._skipped and buffer.startswith(_LINE_END):  # RFC 9112 section 2.2
            del buffer[:2]
            self._skipped = True
        end = buffer.find(_HEAD_END, max(0, self._looked - 3), limits.max_head)
        size = len(buffer) if end < 0 else end + len(_HEAD_END)
        longest = limits.max_target + _AROUND_TARGET
        is_too_long = size > longest and buffer.find(_LINE_END, 0, longest) < 0
        bound = longest if is_too_long else limits.max_head  # what is behind it might not have come yet
        if _AMBIGUOUS.search(buffer, max(0, self._looked - 1), min(size, bound)):
            raise _Refused(400)
        if is_too_long:
            raise _Refused(414)
        if size > limits.max_head:
            raise _Refused(431)
        if end < 0:
            self._looked = size
            return None
        head = bytes(buffer[:size])
        del buffer[:size]
        self._looked, self._skipped = 0, False
        if head.count(_LINE_END) - 2 > limits.max_fields:
            raise _Refused(431, "too many header fields")
        return head

    def _check(self, request: h11.Request, lengths: Sequence[bytes]) -> None:
        """What h11 leaves to others. Raises _Refused."""
        fields = dict(request.headers)
        if not request.http_version.startswith(b"1."):
            raise _Refused(505)
        if request.method not in METHODS:
            raise _Refused(501)
        if len(request.target) > self._limits.max_target:
            raise _Refused(414)
        if not _HOST.fullmatch(fields.get(b"host", b"")):
            raise _Refused(400, "host is no name or address")
        if b"transfer-encoding" in fields:
            if lengths or request.http_version == b"1.0":
                raise _Refused(400, "transfer-encoding is not allowed here")
            self._is_last = True
        elif b"content-length" in fields and int(fields[b"content-length"]) > self._limits.max_body:
            raise _Refused(413)
        if fields.get(b"expect", b"100-continue").lower() != b"100-continue":
            raise _Refused(417)
        if not request.target.startswith(b"/") and _form_of(request) is None:
            raise _Refused(400, "the target is no path")

    def _read_body(self, now: float) -> HttpRequest | None:
        parser = self._h11
        assert parser is not None, "there is one from the head to the answer"
        try:
            event = parser.next_event()
            if event is h11.NEED_DATA and self._buffer:
                parser.receive_data(bytes(self._buffer))
                self._buffer.clear()
                event = parser.next_event()
            elif parser.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self._out.append(parser.send(go_on))
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
        assert isinstance(event, h11.EndOfMessage), "a body is data, and then its end"
        # Only now are there bytes behind the request, and they belong to the next one.
        self._buffer += parser.trailing_data[0]
        body, self._body = bytes(self._body), bytearray()
        self._state = _State.ANSWERING
        self._deadline = now + self._limits.answer_timeout
        assert self._request is not None
        return _request_of(self._request, body, self._peer)

    # --- responses out -------------------------------------------------------------------------------

    def respond(self, response: HttpResponse, wall: int, now: float) -> HttpRequest | None:
        """Answer the request; the next one, if it is there already. Too late an answer is dropped."""
        if self._state is not _State.ANSWERING:
            return None
        self._send(response, wall)
        if self.closing:
            return None
        self._h11 = self._request = None
        self._state = _State.HEAD
        limits = self._limits
        self._deadline = now + (limits.request_timeout if self._buffer else limits.idle_timeout)
        return self._advance(wall, now)

    def _send(self, response: HttpResponse, wall: int) -> None:
        """The one way out for responses."""
        parser = self._h11
        if parser is None:  # nothing was understood
            parser = h11.Connection(h11.SERVER)
        last = self._is_last or response.close or self._left <= 0
        fields: list[tuple[str, str]] = [("Date", _date(wall // _MS)), *response.headers]
        if response.status != HTTPStatus.NO_CONTENT:
            fields += [("Content-Type", response.content_type), ("Content-Length", str(len(response.body)))]
        if last:
            fields.append(("Connection", "close"))
        message = h11.Response(
            status_code=response.status, headers=fields, reason=HTTPStatus(response.status).phrase
        )
        security = self._security.block(response.policy)
        # From here on nothing raises: what was wrong with the response was found above.
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
        """Do what is due: what is half there is 408, a handler that takes too long 503, silence just ends."""
        if now < self._deadline or self._state is _State.CLOSING:
            return
        if self.idle:
            self._end()
        else:
            self._refuse(_Refused(503 if self._state is _State.ANSWERING else 408), wall)

    def go_away(self) -> None:
        """The next answer is the last."""
        self._is_last = True

    def _end(self) -> None:
        self._state = _State.CLOSING
        self._deadline = NEVER
        self._buffer.clear()
        self._body.clear()
        self._h11 = self._request = None


def _form_of(request: h11.Request) -> re.Match[str] | bool | None:
    """The absolute form of a target (RFC 9112 section 3.2.2); true for the one that names no path."""
    if request.target == b"*" and request.method == b"OPTIONS":
        return True
    return _ABSOLUTE.fullmatch(request.target.decode("ascii"))


def _request_of(request: h11.Request, body: bytes, peer: Peer) -> HttpRequest:
    target = request.target.decode("ascii")
    form = None if target.startswith("/") else _form_of(request)
    if isinstance(form, re.Match):
        path, query = form[1] or "/", form[2] or ""
    else:
        path, _, query = target.partition("?")
    headers: dict[str, str] = {}
    for raw_name, raw_value in request.headers:
        name, value = raw_name.decode("ascii"), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return HttpRequest(request.method.decode("ascii"), path, query, headers, body, peer)


@lru_cache(maxsize=2)
def _date(second: int) -> str:
    """A moment as RFC 9110 section 5.6.7 writes it."""
    return formatdate(second, usegmt=True)
