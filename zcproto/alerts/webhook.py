"""Post messages to a webhook: one signed POST each, by HTTP/1.1 over TLS.

    Zcproto-Signature: t=1767225600,v1=HEX
    HEX = HMAC-SHA256(secret, b"1767225600" + b"." + body)

Rules:
- The secret is the text of its file in UTF-8. The time is signed with the body, so that a captured message cannot
  be replayed later. Of several `v1` one must match, so that a secret can be rotated. Unknown parts of the header
  are ignored. Comparisons take constant time.
- A message is delivered if the status is 200 to 299. Redirects are not followed and proxies of the environment
  are not used, so that only the configured host receives messages.
- An attempt has one absolute timeout and reads at most `MAX_ANSWER` bytes.
- The certificate is verified with the CAs of the system or of `alerts.webhook_ca_file`.
- The URL may contain a secret: only its host appears in messages and logs.

It must not know: the content of a message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import os
import re
import socket
import ssl
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import h11

from zcproto.alerts.sinks import Undelivered
from zcproto.common.clock import MS_PER_SECOND, Clock
from zcproto.common.secret import Secret
from zcproto.errors import ConfigError

HEADER: Final = "Zcproto-Signature"
TOLERANCE_S: Final = 300
"""Maximum age of a signature, and maximum time in the future, in seconds."""

MAX_HEADER: Final = 1024
_TIME: Final = re.compile(r"[0-9]{1,12}")
MAX_ANSWER: Final = 65_536
"""Maximum bytes of a response, its head included."""

MAX_HEAD: Final = 16_384
REFUSED_TRIES: Final = 3
"""Attempts for a message that the receiver refuses: it may be misconfigured only briefly."""

USER_AGENT: Final = b"zcproto-alerts/1"
CLOSE_S: Final = 1.0
"""Seconds for closing the connection after the response."""

_RETRIED: Final = frozenset({408, 425, 429})
_READ: Final = 4_096


class Webhook:
    """A sink that posts messages to a validated URL.

    `secret` signs them; None for no signature. Raises ConfigError for an invalid CA file.
    """

    name = "webhook"

    def __init__(
        self, url: str, secret: Secret | None, *, ca_file: Path | None, timeout: float, clock: Clock
    ) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._host = parts.hostname
        self._port = parts.port or (443 if parts.scheme == "https" else 80)
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self.where = parts.netloc
        self._secret = secret
        self._timeout = timeout
        self._clock = clock
        self._context = _context(ca_file) if parts.scheme == "https" else None

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
            raise Undelivered(f"TLS with {self._host} failed: {error.reason or 'unknown reason'}") from error
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
        """Send one message. Return the status of the response."""
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
            with contextlib.suppress(OSError, TimeoutError):  # the response is there, however closing ends
                async with asyncio.timeout(CLOSE_S):
                    await writer.wait_closed()
            return status
        finally:
            writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect to the first address of the host that answers."""
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
                # A TLS error is final; for other errors try the next address.
                if isinstance(error, ssl.SSLError) or not addresses:
                    raise

    def _request(self, body: bytes) -> h11.Request:
        headers = [
            (b"Host", self.where.encode("ascii")),
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

    threading.Thread(target=look_up, name="zcproto-alerts-name", daemon=True).start()
    return await asyncio.wrap_future(found)


async def _status(connection: h11.Connection, reader: asyncio.StreamReader) -> int:
    """Return the status of the final response. Its body is not read."""
    received = 0
    while True:
        event = connection.next_event()
        if isinstance(event, h11.Response):
            return event.status_code
        if event is h11.NEED_DATA:
            data = await reader.read(_READ)
            received += len(data)
            if received > MAX_ANSWER:
                raise Undelivered(f"the response is longer than {MAX_ANSWER} bytes")
            connection.receive_data(data)


def _reason(error: OSError) -> str:
    """Return the system's message of an error."""
    if isinstance(error, socket.gaierror):
        return error.strerror or "unknown host"
    return os.strerror(error.errno) if error.errno is not None else type(error).__name__


def _context(ca_file: Path | None) -> ssl.SSLContext:
    # Not `create_default_context`, which honours SSLKEYLOGFILE.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file is None:
        context.load_default_certs()
        return context
    try:
        context.load_verify_locations(ca_file)
    except ssl.SSLError as error:
        raise ConfigError([f"alerts.webhook_ca_file: {ca_file} contains no PEM certificates"]) from error
    except OSError as error:
        raise ConfigError([f"alerts.webhook_ca_file: {ca_file} cannot be read: {error.strerror}"]) from error
    return context


# --- signatures ----------------------------------------------------------------------------------------------


def sign(secret: Secret, body: bytes, wall: int) -> str:
    """Return the value of the header for a body sent now."""
    seconds = wall // MS_PER_SECOND
    return f"t={seconds},v1={_digest(secret, body, str(seconds))}"


def check_signature(
    secret: Secret, body: bytes, header: str, wall: int, tolerance_s: int = TOLERANCE_S
) -> str:
    """Return the reason why a message is invalid, or an empty string. Accepts any header."""
    if len(header) > MAX_HEADER or not header.isascii():
        return "the header is not a signature"
    pairs = [pair.strip().partition("=") for pair in header.split(",")]
    times = [value for name, _, value in pairs if name == "t"]
    digests = [value for name, _, value in pairs if name == "v1"]
    if len(times) != 1 or not _TIME.fullmatch(times[0]) or not digests:
        return "the header is not a signature"
    right = _digest(secret, body, times[0])
    # Compare all, so that the time does not reveal which one matched.
    if not sum(hmac.compare_digest(right, each) for each in digests):
        return "the signature does not match: wrong secret or changed body"
    age_s = wall // MS_PER_SECOND - int(times[0])
    if abs(age_s) > tolerance_s:
        return f"the signature is {age_s} s old: {tolerance_s} s are allowed"
    return ""


def _digest(secret: Secret, body: bytes, seconds: str) -> str:
    signed = seconds.encode("ascii") + b"." + body
    return hmac.new(secret.reveal().encode(), signed, hashlib.sha256).hexdigest()
