"""Requests to the HTTPS side of a server."""

from __future__ import annotations

import contextlib
import http.client
import ssl

from tests.http.helpers import Answer, answers
from tests.server.helpers import TIMEOUT, ServerThread, client_context
from zcproto.certs import client_ca
from zcproto.http.messages import Route
from zcproto.sessions.token import token_text

HSTS = "max-age=31536000; includeSubDomains"
OPEN = ["/", "/healthz", "/readyz", "/.well-known/zcp"]


def tls(
    server: ServerThread,
    alpn: tuple[str, ...] = ("http/1.1",),
    shows: client_ca.ClientCertificate | None = None,
) -> ssl.SSLSocket:
    context = client_context(server.home / "certs" / "ca.crt", alpn)
    if shows is not None:
        context.load_cert_chain(shows.certificate, shows.key)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(server.tcp())
        connection = context.wrap_socket(raw, server_hostname="localhost", suppress_ragged_eofs=False)
        stack.pop_all()
        return connection


def read_to_end(connection: ssl.SSLSocket) -> bytes:
    """Return all bytes until close_notify; any other end raises."""
    received = bytearray()
    while data := connection.recv(65_536):
        received += data
    return bytes(received)


def exchange(server: ServerThread, data: bytes, alpn: tuple[str, ...] = ("http/1.1",)) -> list[Answer]:
    """Send bytes after which the server closes, and return the responses."""
    with tls(server, alpn) as connection:
        connection.sendall(data)
        return answers(read_to_end(connection))


def ask(
    server: ServerThread,
    path: str,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    body: bytes = b"",
) -> Answer:
    """Send one request with http.client."""
    context = client_context(server.home / "certs" / "ca.crt", ())
    connection = http.client.HTTPSConnection("localhost", server.port, timeout=TIMEOUT, context=context)
    with contextlib.closing(connection):
        connection.request(method, path, body or None, headers or {})
        response = connection.getresponse()
        return Answer(
            response.status, [(name.lower(), value) for name, value in response.getheaders()], response.read()
        )


def bearer(token: bytes) -> dict[str, str]:
    return {"Authorization": f"Bearer {token_text(token)}"}


def add(server: ServerThread, *routes: Route) -> None:
    side = server.server.parts.http
    assert side is not None
    for route in routes:
        server.in_loop(lambda route=route: side.router.add(route))
