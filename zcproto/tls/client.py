"""The client's side of a TLS connection: the handshake, and whether the server is the one expected.

What it decides: that the handshake agreed on what the contract asks for, whoever offered what; that the
certificate is the right one. Until then nothing is sent but the handshake itself: on a wrong pin not even our
Finished goes out, so a server that is not the expected one never sees a byte of the application, nor a
certificate of the client.

A client that has a certificate shows it to servers that ask for one. In TLS 1.3 its handshake is over before the
server has looked at it: a refusal arrives as an alert where the first data would be.

Trust is one of three, in the context and the pins together:

- by CA: OpenSSL checks chain, dates and name; pins, if any, come on top;
- by pins alone (a context that does not verify, and pins): the pin stands for the chain, and dates and name
  are checked here;
- none at all (a context that does not verify, and no pins): whoever asked for that has to say so loudly.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import TlsError
from zcproto.tls.context import suites_are_allowed
from zcproto.tls.failure import TlsFailure, failure_of, reason_of
from zcproto.tls.pins import certificate_pin, key_pin
from zcproto.tls.suites import SUITES
from zcproto.tls.transport import Phase, ReceiveBuffer, TlsTransport

ALPN: Final = "zcp/1"
_SUITES: Final = frozenset(SUITES)
_MS: Final = 1000

_SENTENCES: Final = {
    TlsFailure.HANDSHAKE_TIMEOUT: "the server did not finish the TLS handshake in time",
    TlsFailure.DISCONNECTED: "the server closed the connection before TLS was agreed: it may be full or down",
    TlsFailure.NOT_TLS: "what answers at this address does not speak TLS",
    TlsFailure.UNSUPPORTED_VERSION: "the server does not speak TLS 1.3",
    TlsFailure.NO_SHARED_SUITE: "the server accepts none of the cipher suites of this protocol",
    TlsFailure.NO_APPLICATION_PROTOCOL: f"the server speaks TLS, but not {ALPN}",
    TlsFailure.WRONG_PARAMETERS: "the server agreed on a TLS version or cipher suite that is not allowed",
    TlsFailure.PEER_REJECTED_CERTIFICATE: "the server refused the certificate of this client; its log says why",
    TlsFailure.CERTIFICATE_REQUIRED: (
        "the server wants a certificate of this client, and it has none; get one from the server's operator"
        " and give it as `certificate`, with its `key_file`"
    ),
}

# What a server says about the certificate of a client (RFC 8446 section 6.2), and what helps.
_ALERT_SENTENCES: Final = {
    "SSLV3_ALERT_CERTIFICATE_REVOKED": (
        "the server says that the certificate of this client is revoked; get a new one from its operator"
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "the server says that the certificate of this client has expired; renew it. If it is valid, the server's"
        " clock is wrong, or its revocation list has expired"
    ),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "the server does not know the CA that issued the certificate of this client; get one from a CA that it"
        " trusts for clients, and put the CAs in between behind it in its file"
    ),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": (
        "the server says that the certificate of this client is for something else; get one whose extended key"
        " usage is clientAuth"
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "the server finds the certificate of this client bad: it is not valid yet, or damaged, or signed in a way"
        " that is not safe; get a new one, and compare the clocks"
    ),
}
SHOWN_PINS: Final = 8


class TlsConnector:
    """What the connections of one loop to one server have in common.

    `context` is a `client_context`; `host` is the name or the address that the certificate must be for, and
    the server name sent (RFC 6066). `pins` are pins as `parse_pins` returns them. `wall` tells the time,
    against which dates are checked when pins alone are trusted. The timeout is in seconds, from the TCP
    connection to the end of the handshake.
    """

    __slots__ = ("buffer", "context", "handshake_timeout", "host", "pins", "wall", "wheel")

    def __init__(
        self,
        context: ssl.SSLContext,
        host: str,
        wheel: DeadlineWheel,
        *,
        pins: frozenset[str] = frozenset(),
        wall: Callable[[], int],
        buffer: ReceiveBuffer | None = None,
        handshake_timeout: float = 5.0,
    ) -> None:
        self.context = context
        self.host = host.partition("%")[0]  # an address's zone is this machine's business (RFC 6874)
        self.wheel = wheel
        self.pins = pins
        self.wall = wall
        self.buffer = ReceiveBuffer() if buffer is None else buffer
        self.handshake_timeout = handshake_timeout

    def transport(
        self, protocol: asyncio.Protocol, on_handshake: Callable[[TlsError | None], None]
    ) -> TlsClientTransport:
        """A new connection's transport, to be given to `loop.create_connection` as its protocol.

        `on_handshake` is called once, with None when `protocol` is connected, else with what went wrong: then when
        the connection is gone, as whoever is told of it may end the loop at once.
        """
        return TlsClientTransport(self, protocol, on_handshake)


class TlsClientTransport(TlsTransport):
    """One connection of a TlsConnector."""

    __slots__ = ("_connector", "_on_handshake", "_waiting")

    @property
    def error(self) -> TlsError | None:
        """What ended this connection, if it was not a clean close."""
        return self._error

    def __init__(
        self,
        connector: TlsConnector,
        protocol: asyncio.Protocol,
        on_handshake: Callable[[TlsError | None], None],
    ) -> None:
        super().__init__(connector.buffer, connector.wheel, connector.host)
        self._connector = connector
        self._waiting: asyncio.Protocol | None = protocol  # it is told of nothing before TLS is agreed
        self._on_handshake: Callable[[TlsError | None], None] | None = on_handshake
        self._phase = Phase.HANDSHAKE

    # --- the TCP transport's calls --------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        connector = self._connector
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = connector.context.wrap_bio(
            self._incoming, self._outgoing, server_side=False, server_hostname=connector.host
        )
        self._wheel.set(self, self._now() + connector.handshake_timeout)
        self._handshake()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._waiting = None
        if self._error is not None:
            self._tell(self._error)
        else:  # closed by ourselves before it was agreed: whoever waits must not wait for ever
            self._tell(TlsError(TlsFailure.DISCONNECTED.value, "closed before the handshake was complete"))

    def _received_in_handshake(self, data: memoryview) -> None:
        self._incoming.write(data)
        self._handshake()

    # --- the handshake --------------------------------------------------------------------------

    def _handshake(self) -> None:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            self._flush()
            return
        except ssl.SSLCertVerificationError as error:
            self._refuse(failure_of(error), error.verify_message)
            return
        except ssl.SSLError as error:
            self._fail_for(error)
            return
        self._handshake_completed()

    def _handshake_completed(self) -> None:
        assert self._outgoing is not None
        refusal = self._judge()
        if refusal is not None:
            self._outgoing.read()  # our Finished: the server must not take this connection for agreed
            self._refuse(*refusal)
            return
        self._wheel.discard(self)
        self._flush()
        self._phase = Phase.OPEN
        protocol, self._waiting = self._waiting, None
        assert protocol is not None
        self._protocol = protocol
        protocol.connection_made(self)
        self._tell(None)
        if self._phase is Phase.OPEN and not self._reading_paused:
            self._read_records(0)

    def _judge(self) -> tuple[TlsFailure, str] | None:
        """What is wrong with a handshake that OpenSSL completed, if anything is."""
        if not suites_are_allowed(self._tls, _SUITES):
            return TlsFailure.WRONG_PARAMETERS, ""
        if self._tls.selected_alpn_protocol() != ALPN:
            return TlsFailure.NO_APPLICATION_PROTOCOL, ""
        connector = self._connector
        if not connector.pins:
            return None
        certificate = self._tls.getpeercert(binary_form=True)
        assert certificate is not None  # without resumption TLS 1.3 has no handshake that lacks one
        chain_is_checked = connector.context.verify_mode is ssl.CERT_REQUIRED
        return judge_pinned(
            certificate,
            connector.pins,
            host=connector.host,
            wall=connector.wall(),
            chain_is_checked=chain_is_checked,
        )

    def _refuse(self, failure: TlsFailure, detail: str = "") -> None:
        self._error = TlsError(failure.value, detail or _SENTENCES.get(failure, ""))
        self._fail(failure)

    def _fail_for(self, error: ssl.SSLError) -> None:
        self._refuse(failure_of(error), _ALERT_SENTENCES.get(reason_of(error), ""))

    def _note(self, failure: TlsFailure) -> None:
        if self._error is None:
            self._error = TlsError(failure.value, _SENTENCES.get(failure, ""))

    def _tell(self, error: TlsError | None) -> None:
        on_handshake, self._on_handshake = self._on_handshake, None
        if on_handshake is not None:
            on_handshake(error)


def judge_pinned(
    certificate_der: bytes, pins: frozenset[str], *, host: str, wall: int, chain_is_checked: bool
) -> tuple[TlsFailure, str] | None:
    """What is wrong with a certificate that must have one of the pins, if anything is.

    With `chain_is_checked`, OpenSSL has seen to the dates and the name. `wall` is milliseconds since the Unix
    epoch. The second of the result is for people.
    """
    try:
        seen = key_pin(certificate_der), certificate_pin(certificate_der)
        if pins.isdisjoint(seen):
            return TlsFailure.PIN_MISMATCH, _mismatch(*seen, pins)
        if chain_is_checked:
            return None
        certificate = x509.load_der_x509_certificate(certificate_der)
        return _judge_dates(certificate, wall) or _judge_name(certificate, host)
    except (ValueError, UnsupportedAlgorithm) as error:
        return TlsFailure.CERTIFICATE_UNTRUSTED, f"the certificate cannot be read: {type(error).__name__}"


def _mismatch(key: str, certificate: str, pins: frozenset[str]) -> str:
    expected = sorted(pins)
    more = f" or {len(expected) - SHOWN_PINS} more" if len(expected) > SHOWN_PINS else ""
    return (
        f"the server shows none of the pins that are expected of it. It shows {key} (its key) and {certificate}"
        f" (the whole certificate); expected: {' or '.join(expected[:SHOWN_PINS])}{more}. If its operator confirms"
        " that the key was changed, give the new pin in place of the old one; else somebody may be in between"
    )


def _judge_dates(certificate: x509.Certificate, wall: int) -> tuple[TlsFailure, str] | None:
    now = datetime.fromtimestamp(wall / _MS, UTC)
    if now < certificate.not_valid_before_utc:
        return (
            TlsFailure.CERTIFICATE_EXPIRED,
            f"valid only from {certificate.not_valid_before_utc:%F %T} UTC on",
        )
    if now > certificate.not_valid_after_utc:
        return TlsFailure.CERTIFICATE_EXPIRED, f"expired at {certificate.not_valid_after_utc:%F %T} UTC"
    return None


def _judge_name(certificate: x509.Certificate, host: str) -> tuple[TlsFailure, str] | None:
    """RFC 9525 section 6: only subject alternative names count, of the kind that was asked for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return TlsFailure.CERTIFICATE_NAME_MISMATCH, "the certificate is for no name at all"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        dns_names = names.get_values_for_type(x509.DNSName)
        matches = any(dns_name_matches(pattern, host) for pattern in dns_names)
    else:
        matches = address in names.get_values_for_type(x509.IPAddress)
    if matches:
        return None
    return TlsFailure.CERTIFICATE_NAME_MISMATCH, f"the certificate is not for {host!r}"


def dns_name_matches(pattern: str, host: str) -> bool:
    """Whether a certificate's DNS name is for a host. `*` stands for the whole first label, and no more."""
    wanted = host.lower().rstrip(".")
    offered = pattern.lower().rstrip(".")
    if not offered.startswith("*."):
        return offered == wanted
    first, _, rest = wanted.partition(".")
    # A star right below a top-level domain would be for half the world.
    return bool(first) and "." in rest and offered[2:] == rest
