"""Fuzz HTTP: any bytes are requests and at most one refusal; all responses have the security headers."""

from __future__ import annotations

from typing import NamedTuple

from tests.fuzz.target import Target, divisions
from tests.helpers import NOW, WALL
from tests.http.helpers import Answer, answers
from zcproto.http.connection import NEVER, HttpConnection, HttpLimits
from zcproto.http.messages import (
    STRICT_TRANSPORT_SECURITY,
    HttpRequest,
    HttpResponse,
    SecurityHeaders,
    text_response,
)

LIMITS = HttpLimits(max_head=1_024, max_target=100, max_fields=10, max_body=64, max_chunks=10, max_requests=5)
SECURITY = (
    SecurityHeaders(tls=True),
    SecurityHeaders(tls=False),
)
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REQUIRED_ONCE = (
    *("content-security-policy", "x-content-type-options", "x-frame-options", "cache-control"),
    *("referrer-policy", "date"),
)


class Exchange(NamedTuple):
    """Requests and responses of one connection."""

    requests: list[HttpRequest]
    sent: bytes
    connection: HttpConnection


def description(request: HttpRequest) -> HttpResponse:
    """Return a response that describes the parsed request."""
    headers = "".join(f"{name}={value!r}" for name, value in sorted(request.headers.items()))
    return text_response(
        200, f"{request.method} {request.path} {request.query} {headers} {request.body!r}".encode().hex()
    )


def run_exchange(security: SecurityHeaders, pieces: list[bytes], limits: HttpLimits = LIMITS) -> Exchange:
    """Receive the pieces and answer each request immediately."""
    connection = HttpConnection(limits, security, NOW)
    requests: list[HttpRequest] = []
    sent = b""
    for piece in pieces:
        request = connection.receive_data(piece, WALL, NOW)
        while request is not None:
            requests.append(request)
            request = connection.respond(description(request), WALL, NOW)
        sent += connection.data_to_send()
    return Exchange(requests, sent, connection)


def run(data: bytes) -> None:
    run_exchange(SECURITY[0], [data[1:]], HttpLimits())


def check(data: bytes) -> None:
    security, stream = SECURITY[data[0] % len(SECURITY) if data else 0], data[1:]
    whole = run_exchange(security, [stream])
    check_answers(whole, security)
    for pieces in divisions(stream):
        exchange = run_exchange(security, pieces)
        check_answers(exchange, security)
        # The parsed requests are the same. Of two faults in one request, the first received is reported.
        assert list(map(description, exchange.requests)) == list(map(description, whole.requests))
        assert len(exchange.connection.sent) == len(whole.connection.sent)
        assert exchange.connection.closing is whole.connection.closing
        assert exchange.connection.idle is whole.connection.idle
        check_end(exchange, security)
    check_end(whole, security)


def check_answers(exchange: Exchange, security: SecurityHeaders) -> None:
    """Assert that each request is answered, a refusal is last, and all have the required headers."""
    methods = [request.method for request in exchange.requests]
    found = read(exchange.sent, methods)
    refused = len(found) - len(methods)
    assert refused in (0, 1)
    assert exchange.connection.sent == [answer.status for answer in found]
    for answer in found:
        check_headers(answer, security)
    for answer in found[: len(methods)]:
        assert answer.status == 200
    if refused:
        assert 400 <= found[-1].status <= 505
        assert found[-1].closes
    assert exchange.connection.closing is bool(found and found[-1].closes)
    assert len(methods) <= LIMITS.max_requests
    for request in exchange.requests:
        assert len(request.body) <= LIMITS.max_body
        assert len(request.headers) <= LIMITS.max_fields


def read(sent: bytes, methods: list[str]) -> list[Answer]:
    # The client may never send the body after "100 Continue".
    sent = sent.removesuffix(CONTINUE)
    # A refusal has a body, except for HEAD.
    return answers(sent, [*methods, "HEAD" if sent.endswith(b"\r\n\r\n") else "GET"])


def check_headers(answer: Answer, security: SecurityHeaders) -> None:
    expected = [STRICT_TRANSPORT_SECURITY] if b"Strict-Transport" in security.block() else []
    assert answer.all("strict-transport-security") == expected
    for name in REQUIRED_ONCE:
        assert len(answer.all(name)) == 1
    assert not answer.all("server")


def check_end(exchange: Exchange, security: SecurityHeaders) -> None:
    """Assert that buffers are bounded, and that a waiting connection ends at its deadline."""
    connection = exchange.connection
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
    sent = connection.data_to_send()
    assert connection.closing
    assert bool(sent) is not is_idle
    if sent:
        (answer,) = read(sent, [])
        assert answer.status == 408
        check_headers(answer, security)


TARGET = Target("http", run, check)
