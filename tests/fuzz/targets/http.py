"""Any bytes are requests and one refusal at most; every response has the security headers."""

from __future__ import annotations

from typing import NamedTuple

from tests.fuzz.target import Target, ways_to_cut
from tests.helpers import NOW, WALL
from tests.http.helpers import Answer, answers
from zcproto.http.connection import NEVER, HttpConnection, HttpLimits
from zcproto.http.messages import HttpRequest, HttpResponse, text_response
from zcproto.http.security_headers import SecurityHeaders, StrictTransportSecurity

LIMITS = HttpLimits(max_head=1_024, max_target=100, max_fields=10, max_body=64, max_chunks=10, max_requests=5)
SECURITY = (
    SecurityHeaders(StrictTransportSecurity()),
    SecurityHeaders(None),
    SecurityHeaders(StrictTransportSecurity(60, include_subdomains=False)),
)
GO_ON = b"HTTP/1.1 100 Continue\r\n\r\n"
ONCE = (
    *("content-security-policy", "x-content-type-options", "x-frame-options", "cache-control"),
    *("referrer-policy", "date"),
)


class Said(NamedTuple):
    """A whole conversation."""

    requests: list[HttpRequest]
    out: bytes
    connection: HttpConnection


def answer_to(request: HttpRequest) -> HttpResponse:
    """A response that tells what was understood."""
    headers = "".join(f"{name}={value!r}" for name, value in sorted(request.headers.items()))
    return text_response(
        200, f"{request.method} {request.path} {request.query} {headers} {request.body!r}".encode().hex()
    )


def converse(security: SecurityHeaders, pieces: list[bytes], limits: HttpLimits = LIMITS) -> Said:
    """What is said if each request is answered as soon as it is there."""
    connection = HttpConnection(limits, security, NOW)
    requests: list[HttpRequest] = []
    out = b""
    for piece in pieces:
        request = connection.receive_data(piece, WALL, NOW)
        while request is not None:
            requests.append(request)
            request = connection.respond(answer_to(request), WALL, NOW)
        out += connection.data_to_send()
    return Said(requests, out, connection)


def take(data: bytes) -> None:
    converse(SECURITY[0], [data[1:]], HttpLimits())


def check(data: bytes) -> None:
    security, stream = SECURITY[data[0] % len(SECURITY) if data else 0], data[1:]
    whole = converse(security, [stream])
    check_answers(whole, security)
    for pieces in ways_to_cut(stream):
        said = converse(security, pieces)
        check_answers(said, security)
        # The same requests are understood. Of two faults of one request, the first to arrive is told.
        assert list(map(answer_to, said.requests)) == list(map(answer_to, whole.requests))
        assert len(said.connection.sent) == len(whole.connection.sent)
        assert said.connection.closing is whole.connection.closing
        assert said.connection.idle is whole.connection.idle
        check_end(said, security)
    check_end(whole, security)


def check_answers(said: Said, security: SecurityHeaders) -> None:
    """Each request has its answer, a refusal is the last, and all have what each must have."""
    methods = [request.method for request in said.requests]
    found = read(said.out, methods)
    refused = len(found) - len(methods)
    assert refused in (0, 1)
    assert said.connection.sent == [answer.status for answer in found]
    for answer in found:
        check_headers(answer, security)
    for answer in found[: len(methods)]:
        assert answer.status == 200
    if refused:
        assert 400 <= found[-1].status <= 505
        assert found[-1].closes
    assert said.connection.closing is bool(found and found[-1].closes)
    assert len(methods) <= LIMITS.max_requests
    for request in said.requests:
        assert len(request.body) <= LIMITS.max_body
        assert len(request.headers) <= LIMITS.max_fields


def read(out: bytes, methods: list[str]) -> list[Answer]:
    # Who asked to go on, and was told to, may never have done so.
    out = out.removesuffix(GO_ON)
    # The body of a refusal is a line, and one of HEAD has none.
    return answers(out, [*methods, "HEAD" if out.endswith(b"\r\n\r\n") else "GET"])


def check_headers(answer: Answer, security: SecurityHeaders) -> None:
    wanted = [] if security.hsts is None else [security.hsts.value]
    assert answer.all("strict-transport-security") == wanted
    for name in ONCE:
        assert len(answer.all(name)) == 1
    assert not answer.all("server")


def check_end(said: Said, security: SecurityHeaders) -> None:
    """What waits is bounded, and when its time is over it is answered or dropped."""
    connection = said.connection
    if connection.closing:
        assert connection.next_deadline() == NEVER
        assert not connection._buffer
        assert connection.receive_data(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", WALL, NOW) is None
        assert not connection.data_to_send()
        return
    assert len(connection._buffer) <= LIMITS.max_head
    assert len(connection._body) <= LIMITS.max_body
    deadline = connection.next_deadline()
    assert NOW < deadline < NEVER
    is_idle = connection.idle
    connection.handle_timeout(WALL, deadline)
    out = connection.data_to_send()
    assert connection.closing
    assert bool(out) is not is_idle
    if out:
        (answer,) = read(out, [])
        assert answer.status == 408
        check_headers(answer, security)


TARGET = Target("http", take, check)
