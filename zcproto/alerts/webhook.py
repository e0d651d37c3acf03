"""Messages to a webhook: one POST for each, by HTTP/1.1 over TLS, signed.

Rules:
- A message has arrived when the answer's status is from 200 to 299. Redirects are not followed, proxies of the
  environment are not used: nobody but who is configured gets to see a message.
- A try has one limit of time, whatever arrives meanwhile, and takes in at most `MAX_ANSWER` bytes.
- The certificate is checked, by the system's authorities or by those of `alerts.webhook_ca_file`.
- The address may be a secret in itself: of it only the host is ever told.

It must not know: what a message says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import threading
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import h11

from zcproto.alerts.signature import HEADER, sign
from zcproto.alerts.sinks import Undelivered
from zcproto.common.clock import Clock
from zcproto.common.secret import Secret
from zcproto.errors import ConfigError

MAX_ANSWER: Final = 65_536
"""Bytes of an answer that are taken in, those of its head included."""

MAX_HEAD: Final = 16_384
REFUSED_TRIES: Final = 3
"""Tries of a message that the receiver does not want: it may be in the middle of a change."""

USER_AGENT: Final = b"zcproto-alerts/1"
CLOSE_S: Final = 1.0
"""For the end of the connection, once there is an answer."""

_RETRIED: Final = frozenset({408, 425, 429})
_READ: Final = 4_096


class Webhook:
    """A sink that posts messages to an address, which the configuration's rule has accepted.

    `secret` signs them; None: they are not signed. Raises ConfigError for a file of authorities that is none.
    """

    name = "webhook"

    def __init__(
        self, url: str, secret: Secret[str] | None, *, ca_file: Path | None, timeout: float, clock: Clock
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._host_header = parts.netloc
        self._secret = secret
        self._timeout = timeout
        self._clock = clock
        self._context = _context(ca_file) if parts.scheme == "https" else None

    @property
    def where(self) -> str:
        """The host that it sends to."""
        return self._host_header

    async def deliver(self, body: bytes) -> str:
        try:
            async with asyncio.timeout(self._timeout):
                status = await self._post(body)
        except TimeoutError:
            raise Undelivered(f"{self._host} did not answer within {self._timeout:g} s") from None
        except ssl.SSLCertVerificationError as error:
            reason = f"the certificate of {self._host} is not trusted: {error.verify_message}"
            raise Undelivered(reason) from error
        except ssl.SSLError as error:
            raise Undelivered(
                f"TLS with {self._host} failed: {error.reason or 'no reason is known'}"
            ) from error
        except OSError as error:
            raise Undelivered(f"{self._host} cannot be reached: {_reason(error)}") from error
        except h11.RemoteProtocolError as error:
            raise Undelivered(f"{self._host} did not answer by HTTP") from error
        if 200 <= status < 300:
            return f"{self._host} answered {status}"
        why = ": redirects are not followed" if 300 <= status < 400 else ""
        is_refused = status < 500 and status not in _RETRIED
        raise Undelivered(f"{self._host} answered {status}{why}", tries=REFUSED_TRIES if is_refused else None)

    async def _post(self, body: bytes) -> int:
        """Send one message; the status of the answer."""
        reader, writer = await self._connect()
        try:
            connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
            for event in (self._request(body), h11.Data(data=body), h11.EndOfMessage()):
                data = connection.send(event)
                if data:
                    writer.write(data)
            await writer.drain()
            status = await _status(connection, reader)
            writer.close()
            with contextlib.suppress(
                OSError, TimeoutError
            ):  # there is an answer: how it ends is all the same
                async with asyncio.timeout(CLOSE_S):
                    await writer.wait_closed()
            return status
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the first of the host's addresses that answers."""
        addresses = await _look_up(self._host, self._port)
        while True:
            address = addresses.pop(0)
            try:
                return await asyncio.open_connection(
                    address,
                    self._port,
                    ssl=self._context,
                    server_hostname=None if self._context is None else self._host,
                )
            except OSError as error:
                # What TLS says is the receiver's last word; where nobody answers there may be another address.
                if isinstance(error, ssl.SSLError) or not addresses:
                    raise

    def _request(self, body: bytes) -> h11.Request:
        headers = [
            (b"Host", self._host_header.encode("ascii")),
            (b"User-Agent", USER_AGENT),
            (b"Content-Type", b"application/json"),
            (b"Content-Length", str(len(body)).encode("ascii")),
            (b"Connection", b"close"),
        ]
        if self._secret is not None:
            signature = sign(self._secret, body, self._clock.wall())
            headers.append((HEADER.encode("ascii"), signature.encode("ascii")))
        return h11.Request(method=b"POST", target=self._target.encode("ascii"), headers=headers)


async def _look_up(host: str, port: int) -> list[str]:
    """The addresses of a host. Raises OSError.

    In a thread that nobody waits for at the end, unlike those of the loop: a resolver may take half a minute.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[list[str]] = loop.create_future()

    def settle(addresses: list[str], error: OSError | None) -> None:
        if not found.done():
            if error is None:
                found.set_result(addresses)
            else:
                found.set_exception(error)

    def look_up() -> None:
        addresses: list[str] = []
        fault: OSError | None = None
        try:
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            addresses = list(dict.fromkeys(str(info[4][0]) for info in infos))
        except OSError as error:
            fault = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, addresses, fault)

    threading.Thread(target=look_up, name="zcproto-alerts-name", daemon=True).start()
    return await found


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    """The status of the final answer. What follows it is not read."""
    received = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            data = await reader.read(_READ)
            received += len(data)
            if received > MAX_ANSWER:
                raise Undelivered("the answer never comes to its end")
            connection.receive_data(data)


def _reason(error: OSError) -> str:
    """What went wrong, in the system's words."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "no such name"
    return os.strerror(error.errno) if error.errno is not None else type(error).__name__


def _context(ca_file: Path | None) -> ssl.SSLContext:
    # Not `create_default_context`, which heeds SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ConfigError([f"alerts.webhook_ca_file: {ca_file} holds no certificates in PEM"]) from error
    except OSError as error:
        raise ConfigError([f"alerts.webhook_ca_file: {ca_file} cannot be read: {error.strerror}"]) from error
    return context
