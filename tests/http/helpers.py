"""Run an HTTP connection in memory and parse its responses with h11."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import h11

from tests.helpers import NOW, WALL
from zcproto.http.connection import HttpConnection, HttpLimits
from zcproto.http.messages import (
    HttpRequest,
    HttpResponse,
    SecurityHeaders,
    text_response,
)

LIMITS = HttpLimits(
    max_head=1_024,
    max_target=100,
    max_fields=10,
    max_body=64,
    max_chunks=10,
    max_requests=5,
    request_timeout=10.0,
    answer_timeout=20.0,
    idle_timeout=30.0,
)
SECURITY = SecurityHeaders(tls=True)
GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Answer(NamedTuple):
    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]

    def one(self, name: str) -> str:
        (value,) = self.all(name)
        return value

    @property
    def closes(self) -> bool:
        return "close" in self.all("connection")


def answers(data: bytes, methods: Iterable[str] | None = None) -> list[Answer]:
    """Parse the responses to requests of these methods; no byte may be left over."""
    found: list[Answer] = []
    pending = itertools.repeat("GET") if methods is None else iter(methods)
    while data:
        client = h11.Connection(h11.CLIENT)
        client.send(h11.Request(method=next(pending), target="/", headers=[("Host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(data)
        event, status, headers, body = client.next_event(), 0, [], b""
        while not isinstance(event, h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
                headers = [(name.decode(), value.decode()) for name, value in event.headers]
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            else:
                assert isinstance(event, h11.InformationalResponse), event
            event = client.next_event()
        found.append(Answer(status, headers, body))
        data = client.trailing_data[0]
    return found


def describe(request: HttpRequest) -> HttpResponse:
    """Return a response that describes the parsed request."""
    return text_response(200, f"{request.method} {request.path} ?{request.query} {request.body!r}")


class Conversation:
    """A connection that answers each request at once with its description."""

    def __init__(self, limits: HttpLimits = LIMITS, security: SecurityHeaders = SECURITY) -> None:
        self.connection = HttpConnection(limits, security, NOW)
        self.requests: list[HttpRequest] = []
        self.out = b""
        self.now = NOW

    def feed(self, *pieces: bytes) -> Conversation:
        for piece in pieces:
            request = self.connection.receive_data(piece, WALL, self.now)
            while request is not None:
                self.requests.append(request)
                request = self.connection.respond(describe(request), WALL, self.now)
            self.out += self.connection.data_to_send()
        return self

    @property
    def answers(self) -> list[Answer]:
        return answers(self.out, [request.method for request in self.requests] + ["GET"])

    @property
    def answer(self) -> Answer:
        (answer,) = self.answers
        return answer
