"""Making one connection: name, TCP, TLS, WELCOME, and what is remembered of the host."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
import ssl
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Final

from zcproto.client.address import Address
from zcproto.client.known_hosts import KnownHosts
from zcproto.client.protocol import ClientProtocol, Owner
from zcproto.client.retry import may_pass
from zcproto.common.clock import Clock
from zcproto.common.deadlines import DeadlineWheel
from zcproto.common.text import escape_text
from zcproto.common.watcher import NO_FILE, FileIdentity, file_identity
from zcproto.connection.client import ClientConnection
from zcproto.errors import CannotConnect, CertificateError, ConfigError, ConnectionClosed, TlsError
from zcproto.tls.client import TlsConnector
from zcproto.tls.context import Passphrase, client_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import CERTIFICATE_PREFIX, MAX_PINS, parse_pins
from zcproto.tls.transport import ReceiveBuffer

log: Final = logging.getLogger("zcproto.client")


MAX_CONTEXTS: Final = 64
"""Contexts kept for clients to come; connections hold their own."""

FilesAndOptions = tuple[object, ...]
Stamp = tuple[object, ...]
Contexts = dict[FilesAndOptions, tuple[Stamp, ssl.SSLContext]]
"""Contexts by what they are made of, each with the state in which its files were."""


class Trust:
    """Which servers are believed: those of a CA file or of the system's store, those with a pin, or both; and the
    certificate that is shown to those that ask for one. With `key_log` the secrets of its
    connections are appended to that file.

    With `verify` off any server is believed. Raises ConfigError for what contradicts itself, TlsError for a
    malformed pin.
    """

    __slots__ = (
        "ca_file",
        "certificate",
        "key_file",
        "key_log",
        "key_passphrase",
        "pins",
        "system_store",
        "verify",
    )

    def __init__(
        self,
        *,
        ca_file: Path | None,
        pins: Iterable[str] | str,
        system_store: bool,
        verify: bool,
        certificate: Path | None = None,
        key_file: Path | None = None,
        key_passphrase: Passphrase | None = None,
        key_log: Path | None = None,
    ) -> None:
        self.ca_file = ca_file
        self.pins = parse_pins(pins)
        self.system_store = system_store or not (ca_file or self.pins)
        self.verify = verify
        self.certificate = certificate
        self.key_file = key_file
        self.key_passphrase = key_passphrase
        self.key_log = key_log
        if not verify and (ca_file or self.pins or system_store):
            raise ConfigError(["verify=False: leave out ca_file, pins and system_store, or leave it on"])
        if ca_file and system_store:
            raise ConfigError(["ca_file and system_store: trust one of them"])
        if certificate is None and (key_file is not None or key_passphrase is not None):
            raise ConfigError(["key_file and key_passphrase belong to a certificate: give it, too"])
        if len(self.pins) == 1:
            _warn_of_single_pin(*self.pins)

    def context(self, known: Contexts) -> ssl.SSLContext:
        """The context, or one of those known if it is the same. Reads the disk.

        Files are looked at each time: of a certificate that was renewed the next connection makes use. One that
        cannot be used, as it is for a moment between its two files, leaves the one from before in its place.
        Raises CertificateError, and ConfigError for a key log that cannot be written.
        """
        by_ca = self.verify and (self.ca_file is not None or self.system_store)
        files = (self.ca_file, self.certificate, self.key_file)
        made_of = (by_ca, *files, self.key_passphrase, self.key_log)
        stamp = tuple(map(_stamp, files))  # before they are read: what changes later is seen next time
        found = known.get(made_of)
        if found is None or found[0] != stamp:
            try:
                context = client_context(
                    ca_file=self.ca_file,
                    verify=by_ca,
                    certificate=self.certificate,
                    key=self.key_file,
                    passphrase=self.key_passphrase,
                    key_log=self.key_log,
                )
            except CertificateError as error:
                if found is None or found[0][0] != stamp[0]:  # what is trusted is never taken from the past
                    raise
                log.warning(
                    "%s; until that is mended, the certificate from before is shown", escape_text(str(error))
                )
                return found[1]
            if self.key_log is not None:
                _warn_of_key_log(self.key_log)
            found = known[made_of] = stamp, context
            if len(known) > MAX_CONTEXTS:
                known.pop(next(iter(known)), None)
        return found[1]


def _stamp(file: Path | None) -> FileIdentity:
    return NO_FILE if file is None else file_identity(file)


@lru_cache(MAX_PINS)
def _warn_of_single_pin(pin: str) -> None:
    """Once for each pin: a client that is made again and again need not say it each time."""
    log.warning(
        "%s is the only pin: when the server's %s is renewed or lost, this client is locked out until its pins are"
        " changed; add the pin of the server's next key as a backup",
        pin,
        "certificate" if pin.startswith(CERTIFICATE_PREFIX) else "key",
    )


@lru_cache(MAX_CONTEXTS)
def _warn_of_key_log(path: Path) -> None:
    """Once for each file, as often as it is opened."""
    log.warning(
        "the secrets of connections are appended to %s: whoever has it can read all that was captured of them",
        escape_text(str(path)),
    )


class LoopShare:
    """What all clients of one loop share: a buffer each would cost 64 KiB, a context with the system's CAs more."""

    __slots__ = ("buffer", "contexts", "users", "wheel")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.buffer = ReceiveBuffer()
        self.wheel = DeadlineWheel(loop)
        self.contexts: Contexts = {}
        self.users = 0


_shares: dict[asyncio.AbstractEventLoop, LoopShare] = {}


def take_share(loop: asyncio.AbstractEventLoop) -> LoopShare:
    """The share of a loop; give it back with `leave_share`."""
    share = _shares.get(loop)
    if share is None:
        share = _shares[loop] = LoopShare(loop)
    share.users += 1
    return share


def leave_share(loop: asyncio.AbstractEventLoop) -> None:
    share = _shares[loop]
    share.users -= 1
    if not share.users:
        del _shares[loop]
        share.wheel.close()


class Dialer:
    """Connects to one server, as often as asked."""

    def __init__(
        self,
        address: Address,
        trust: Trust,
        known_hosts: KnownHosts | None,
        *,
        server_hostname: str,
        clock: Clock,
        system_clock: Clock,
        connect_timeout: float,
        max_frame: int,
        tolerance_ms: int,
    ) -> None:
        self.address = address
        self._trust = trust
        self._known_hosts = known_hosts
        self._server_hostname = server_hostname
        self._clock = clock
        self._system_clock = system_clock
        self._connect_timeout = connect_timeout
        self._max_frame = max_frame
        self._tolerance_ms = tolerance_ms

    async def __call__(self, owner: Owner, share: LoopShare) -> ClientProtocol:
        """A connection whose server was welcomed.

        Raises CannotConnect, ConnectionClosed, TlsError, CertificateError, ConfigError.
        """
        wall = self._system_clock.wall
        if not self._trust.verify and self._known_hosts is not None:
            await asyncio.to_thread(self._known_hosts.require, self._server_hostname, wall())
        context = await asyncio.to_thread(self._trust.context, share.contexts)
        connector = TlsConnector(
            context,
            self._server_hostname,
            share.wheel,
            pins=self._trust.pins,
            wall=wall,
            buffer=share.buffer,
            handshake_timeout=self._connect_timeout,
        )
        link = await self._connect(connector, owner, share)
        if self._trust.verify and self._known_hosts is not None:
            try:
                await self._remember(link, self._known_hosts)
            except asyncio.CancelledError:
                link.abort()
                raise
        return link

    async def _connect(self, connector: TlsConnector, owner: Owner, share: LoopShare) -> ClientProtocol:
        loop = asyncio.get_running_loop()
        connection = ClientConnection(max_frame=self._max_frame, tolerance_ms=self._tolerance_ms)
        link = ClientProtocol(owner, loop, share.wheel, self._clock, connection)
        agreed: asyncio.Future[TlsError | None] = loop.create_future()

        def on_handshake(error: TlsError | None) -> None:
            if not agreed.done():  # whoever waited may have gone
                agreed.set_result(error)

        transport = connector.transport(link, on_handshake)
        try:
            async with asyncio.timeout(self._connect_timeout):
                await loop.create_connection(lambda: transport, *self.address)
                error = await agreed
                if error is not None:
                    raise error
                await link.welcomed
        except ConnectionClosed as closed:
            # In TLS 1.3 a server refuses a client's certificate after the client's handshake: by an alert, or by a
            # plain close where it has no alert for it.
            refusal = transport.error
            if refusal is not None and not may_pass(refusal.failure):
                raise refusal from None
            if closed.clean and self._trust.certificate is not None:
                raise ConnectionClosed(
                    f"{closed.reason} before its WELCOME: it may not take the certificate of this client",
                    clean=True,
                ) from None
            raise
        except TimeoutError:
            transport.abort()
            refusal = transport.error
            if refusal is not None and refusal.failure != TlsFailure.HANDSHAKE_TIMEOUT.value:
                raise refusal from None  # told late, as the server has not closed its end
            raise CannotConnect(f"{self.address}: no answer within {self._connect_timeout:g} s") from None
        except OSError as failure:
            raise CannotConnect(f"{self.address}: {_cause(failure)}") from failure
        except asyncio.CancelledError:
            transport.abort()
            raise
        return link

    async def _remember(self, link: ClientProtocol, known_hosts: KnownHosts) -> None:
        """Take in the server's policy. That it cannot be written down is no reason not to connect."""
        try:
            await asyncio.to_thread(
                known_hosts.learn, self._server_hostname, link.welcome["sts"], self._system_clock.wall()
            )
        except (OSError, ConfigError) as error:
            log.warning(
                "the sts policy of %s is not remembered: %s", self._server_hostname, escape_text(str(error))
            )


_ERRNO: Final = re.compile(r"\[Errno (\d+)\]")


def _cause(error: OSError) -> str:
    """The system's own phrase. asyncio puts one of its own in its place, and those of all addresses into one."""
    number = error.errno
    if number is None:
        found = _ERRNO.search(str(error))
        number = int(found[1]) if found is not None else None
    if isinstance(error, socket.gaierror) or number is None:
        return error.strerror or type(error).__name__
    return os.strerror(number)
