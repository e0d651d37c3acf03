"""Send one HTTP/1.1 request and read a bounded response: to webhooks, identity providers and CAs.

Rules:
- One absolute timeout, from the name lookup to the end of the response.
- Redirects are not followed and proxies of the environment are not used: only the given host gets the request.
- The certificate is verified with the CAs of the system or of a given file. Without TLS is for URLs that the caller
  allows.
- Only the host of a URL is in messages: the rest may contain a secret.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import h11

from zcproto.errors import ConfigError

MAX_HEAD: Final = 16_384
MAX_ANSWER: Final = 65_536
"""Bytes of a response besides its body, with informational responses before it."""

CLOSE_S: Final = 1.0
"""Seconds for closing the connection after the response."""

_READ: Final = 16_384


class Unreachable(Exception):
    """There is no response. `str()` is the reason in a sentence, without the path of the URL."""


class Response(NamedTuple):
    """A response. `body` is empty if it was not to be read; `headers` are by their names in lower case."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Endpoint:
    """A URL to which requests are sent. `context` verifies the certificate of a host with https."""

    def __init__(self, url: str, context: ssl.SSLContext | None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert context is not None or parts.scheme != "https", "else nothing would be verified"
        self.host = parts.hostname
        self.where = parts.netloc
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._context = context if parts.scheme == "https" else None

    async def send(
        self,
        method: str,
        headers: Sequence[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        timeout: float,  # noqa: ASYNC109 - it covers the steps below
        max_body: int = 0,
    ) -> Response:
        """Send a request. The body of the response is read if `max_body` is not 0. Raises Unreachable."""
        async with self._within(timeout):
            return await self._send(method, headers, body, max_body)

    async def reach(self, *, timeout: float) -> None:  # noqa: ASYNC109 - as above
        """Connect, with the handshake, and send nothing. Raises Unreachable."""
        async with self._within(timeout):
            _, writer = await self._connect()
            writer.transport.abort()

    @contextlib.asynccontextmanager
    async def _within(self, timeout: float) -> AsyncIterator[None]:  # noqa: ASYNC109 - as above
        """Raise Unreachable for what fails in the body."""
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError:
            raise Unreachable(f"{self.host} did not answer within {timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            reason = f"the certificate of {self.host} is not trusted: {error.verify_message}"
            raise Unreachable(reason) from error
        except ssl.SSLError as error:
            raise Unreachable(f"TLS with {self.host} failed: {error.reason or 'unknown reason'}") from error
        except OSError as error:
            raise Unreachable(f"{self.host} cannot be reached: {_reason(error)}") from error
        except h11.RemoteProtocolError as error:
            raise Unreachable(f"{self.host} did not answer by HTTP") from error

    async def _send(
        self, method: str, headers: Sequence[tuple[str, str]], body: bytes, max_body: int
    ) -> Response:
        reader, writer = await self._connect()
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
            length = [("Content-Length", str(len(body)))] if body else []
            request = h11.Request(
                method=method,
                target=self._target.encode("ascii"),
                headers=[("Host", self.where), *headers, *length, ("Connection", "close")],
            )
            for event in (request, *([h11.Data(data=body)] if body else []), h11.EndOfMessage()):
                data = connection.send(event)
                if data:
                    writer.write(data)
            await writer.drain()
            response = await _read(connection, reader, max_body)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):  # the response is there, however closing ends
                async with asyncio.timeout(CLOSE_S):
                    await writer.wait_closed()
            return response
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first address of the host that answers."""
        addresses = await _look_up(self.host, self._port)
        while True:
            address = addresses.pop(0)
            try:
                return await asyncio.open_connection(
                    address,
                    self._port,
                    ssl=self._context,
                    server_hostname=None if self._context is None else self.host,
                )
            except OSError as error:
                # A TLS error is final; for other errors try the next address.
                if isinstance(error, ssl.SSLError) or not addresses:
                    raise


async def _look_up(host: str, port: int) -> list[str]:
    """Resolve a host. Raises OSError.

    Uses a daemon thread, because shutdown would wait for the loop's own threads, and a resolver may take half a
    minute.
    """
    found: Future[list[str]] = Future()
    found.set_running_or_notify_cancel()  # so that a result after a cancellation is only dropped

    def look_up() -> None:
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            found.set_exception(error)
        else:
            found.set_result(list(dict.fromkeys(str(info[4][0]) for info in infos)))

    threading.Thread(target=look_up, name="zcproto-https-name", daemon=True).start()
    return await asyncio.wrap_future(found)


async def _read(connection: h11.Connection, reader: asyncio.StreamReader, max_body: int) -> Response:
    """Read the final response, with its body if `max_body` is not 0."""
    received, status, body, headers = 0, 0, bytearray(), {}
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            status = event.status_code
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            if not max_body:
                return Response(status, b"", headers)
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > max_body:
                raise Unreachable(f"the response is longer than {max_body} bytes")
        elif isinstance(event, h11.EndOfMessage):
            return Response(status, bytes(body), headers)
        elif event is h11.NEED_DATA:
            data = await reader.read(_READ)
            received += len(data)
            if received > MAX_ANSWER + 2 * max_body:  # chunks are framed
                raise Unreachable(f"the response is longer than {max_body or MAX_ANSWER} bytes")
            connection.receive_data(data)


def _reason(error: OSError) -> str:
    """Return the system's message of an error."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "unknown host"
    return os.strerror(error.errno) if error.errno is not None else type(error).__name__


def verifying_context(ca_file: Path | None, key: str) -> ssl.SSLContext:
    """Return a context that verifies servers. Raises ConfigError, which names `key`, for an unusable CA file."""
    # Not `create_default_context`, which honours SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ConfigError(
            [f"{key}: {ca_file} contains no PEM certificates; give a file of CA certificates"]
        ) from error
    except OSError as error:
        raise ConfigError([f"{key}: {ca_file} cannot be read: {error.strerror}; check the path"]) from error
    return context
