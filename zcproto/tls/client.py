"""Run the client side of TLS connections: the handshake and the verification of the server.

Decides whether the negotiated parameters are allowed and whether the certificate is the expected one. Until then
only the handshake is sent: with a wrong pin not even the Finished goes out, so an unexpected server never sees
application data or the certificate of the client.

A client certificate is presented to servers that request one. In TLS 1.3 the client's handshake ends before the
server verifies the certificate, so a refusal arrives as an alert in place of the first data.

Trust is configured by the context and the pins together:

- CA: OpenSSL checks chain, dates and name; pins are checked in addition;
- pins alone (a context that does not verify, with pins): the pin replaces the chain; dates and name are checked
  here;
- none (a context that does not verify, without pins): callers must require an explicit opt-in.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from datetime import UTC, datetime
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import TlsError
from zcproto.tls.context import suites_are_allowed
from zcproto.tls.failure import CERTIFICATE_CURES, TlsFailure, failure_of, reason_of
from zcproto.tls.pins import certificate_pin, key_pin
from zcproto.tls.transport import TlsPhase, TlsTransport, receive_buffer

ALPN: Final = "zcp/1"
_MS: Final = 1000

_SENTENCES: Final = {
    TlsFailure.HANDSHAKE_TIMEOUT: "the server did not finish the TLS handshake in time",
    TlsFailure.DISCONNECTED: "the server closed the connection during the TLS handshake: it may be full or down",
    TlsFailure.NOT_TLS: "the server at this address does not speak TLS; check host and port",
    TlsFailure.UNSUPPORTED_VERSION: "the server does not speak TLS 1.3",
    TlsFailure.NO_SHARED_PARAMETERS: (
        "the server supports no cipher suite, key-exchange group or signature algorithm of this client; its log has"
        " the cause"
    ),
    TlsFailure.NO_APPLICATION_PROTOCOL: f"the server speaks TLS, but not {ALPN}",
    TlsFailure.WRONG_PARAMETERS: "the server negotiated a TLS version or cipher suite that is not allowed",
    TlsFailure.PEER_REJECTED_CERTIFICATE: (
        "the server refused the certificate of this client; see the server's log for the reason"
    ),
    TlsFailure.CERTIFICATE_REQUIRED: (
        "the server requires a client certificate; get one from the server's operator and pass it as `certificate`,"
        " with its `certificate_key`"
    ),
}

# Alerts about the client certificate (RFC 8446 section 6.2), with their cure
_ALERT_SENTENCES: Final = {
    "SSLV3_ALERT_CERTIFICATE_REVOKED": (
        "the certificate of this client is revoked; get a new one from the server's operator"
    ),
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": (
        "the server considers the certificate of this client expired; renew it. If it is valid, the server's clock"
        " is wrong or its revocation list has expired"
    ),
    "TLSV1_ALERT_UNKNOWN_CA": (
        "the server does not trust the CA that issued the certificate of this client; use a certificate from a CA"
        " that it trusts for clients, with the intermediate CAs after it in its file"
    ),
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": (
        "the certificate of this client has the wrong purpose; get one with extended key usage clientAuth"
    ),
    "SSLV3_ALERT_BAD_CERTIFICATE": (
        "the server considers the certificate of this client invalid: not valid yet, damaged, or with an insecure"
        " signature; get a new one, and compare the clocks"
    ),
}
SHOWN_PINS: Final = 8


@dataclass(slots=True, eq=False)
class TlsConnector:
    """The state shared by the connections of one loop to one server.

    Args:
        context: a `client_context`.
        host: the name or address that the certificate must be valid for, and the server name sent (RFC 6066).
        pins: pins, from `parse_pins`.
        wall: returns the time that dates are checked against when only pins are trusted.
        handshake_timeout: seconds from the TCP connection to the end of the handshake.
    """

    context: ssl.SSLContext
    host: str
    wheel: DeadlineWheel
    _: KW_ONLY
    pins: frozenset[str] = frozenset()
    wall: Callable[[], int]
    buffer: memoryview = field(default_factory=receive_buffer)
    handshake_timeout: float = 5.0

    def __post_init__(self) -> None:
        self.host = self.host.partition("%")[0]  # a zone has a local meaning only (RFC 6874)


class TlsClientTransport(TlsTransport):
    """One connection of a TlsConnector, to be passed to `loop.create_connection` as its protocol.

    `on_handshake` is called once: with None when `protocol` is connected, or with the error after the connection is
    gone, because its receiver may stop the loop at once.
    """

    __slots__ = ("_connector", "_on_handshake", "_waiting")

    @property
    def error(self) -> TlsError | None:
        """Return the error that ended this connection; None after a clean close."""
        return self._error

    def __init__(
        self,
        connector: TlsConnector,
        protocol: asyncio.Protocol,
        on_handshake: Callable[[TlsError | None], None],
    ) -> None:
        super().__init__(connector.buffer, connector.wheel, connector.host)
        self._connector = connector
        self._waiting: asyncio.Protocol | None = protocol  # connected after the handshake
        self._on_handshake: Callable[[TlsError | None], None] | None = on_handshake
        self._phase = TlsPhase.HANDSHAKE

    # --- callbacks of the TCP transport ---------------------------------------------------------

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
            self._report(self._error)
        else:  # closed locally during the handshake: the caller must not wait for ever
            self._report(TlsError(TlsFailure.DISCONNECTED.value, "closed before the handshake was complete"))

    # --- the handshake --------------------------------------------------------------------------

    def _handshake_completed(self) -> None:
        assert self._outgoing is not None
        refusal = self._judge()
        if refusal is not None:
            self._outgoing.read()  # drop our Finished: the server must not consider this connection established
            self._refuse(*refusal)
            return
        self._wheel.discard(self)
        self._flush()
        self._phase = TlsPhase.OPEN
        protocol, self._waiting = self._waiting, None
        assert protocol is not None
        self._protocol = protocol
        protocol.connection_made(self)
        self._report(None)
        if self._phase is TlsPhase.OPEN and not self._reading_paused:
            self._read_records(0)

    def _judge(self) -> tuple[TlsFailure, str] | None:
        """Return the failure of a handshake that OpenSSL completed, or None if it is acceptable."""
        if not suites_are_allowed(self._tls):
            return TlsFailure.WRONG_PARAMETERS, ""
        if self._tls.selected_alpn_protocol() != ALPN:
            return TlsFailure.NO_APPLICATION_PROTOCOL, ""
        connector = self._connector
        if not connector.pins:
            return None
        certificate = self._tls.getpeercert(binary_form=True)
        assert certificate is not None  # always present in TLS 1.3 without resumption
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
        failure = failure_of(error)
        if isinstance(error, ssl.SSLCertVerificationError):
            reason, cure = error.verify_message.rstrip("."), CERTIFICATE_CURES.get(failure)
            detail = f"{reason}; {cure}" if cure else reason
        else:
            detail = _ALERT_SENTENCES.get(reason_of(error), "")
        self._refuse(failure, detail)

    def _note(self, failure: TlsFailure) -> None:
        if self._error is None:
            self._error = TlsError(failure.value, _SENTENCES.get(failure, ""))

    def _report(self, error: TlsError | None) -> None:
        on_handshake, self._on_handshake = self._on_handshake, None
        if on_handshake is not None:
            on_handshake(error)


def judge_pinned(
    certificate_der: bytes, pins: frozenset[str], *, host: str, wall: int, chain_is_checked: bool
) -> tuple[TlsFailure, str] | None:
    """Return the failure and its description if a certificate does not match the pins, or None.

    With `chain_is_checked`, OpenSSL has already checked dates and name. `wall` is Unix time in milliseconds.
    """
    try:
        certificate = x509.load_der_x509_certificate(certificate_der)
        seen = key_pin(certificate.public_key()), certificate_pin(certificate_der)
        if pins.isdisjoint(seen):
            return TlsFailure.PIN_MISMATCH, _mismatch(*seen, pins)
        if chain_is_checked:
            return None
        return _judge_dates(certificate, wall) or _judge_name(certificate, host)
    except (ValueError, UnsupportedAlgorithm) as error:
        return TlsFailure.CERTIFICATE_UNTRUSTED, f"the certificate cannot be read: {type(error).__name__}"


def _mismatch(key: str, certificate: str, pins: frozenset[str]) -> str:
    expected = sorted(pins)
    more = f" or {len(expected) - SHOWN_PINS} more" if len(expected) > SHOWN_PINS else ""
    return (
        f"the server matches none of the expected pins. Its key has {key}, its certificate {certificate}; expected:"
        f" {' or '.join(expected[:SHOWN_PINS])}{more}. If its operator confirms that the key was changed, replace"
        " the old pin by the new one; otherwise the connection may be intercepted"
    )


def _judge_dates(certificate: x509.Certificate, wall: int) -> tuple[TlsFailure, str] | None:
    now = datetime.fromtimestamp(wall / _MS, UTC)
    if now < certificate.not_valid_before_utc:
        return (
            TlsFailure.CERTIFICATE_EXPIRED,
            f"valid from {certificate.not_valid_before_utc:%F %T} UTC",
        )
    if now > certificate.not_valid_after_utc:
        return TlsFailure.CERTIFICATE_EXPIRED, f"expired at {certificate.not_valid_after_utc:%F %T} UTC"
    return None


def _judge_name(certificate: x509.Certificate, host: str) -> tuple[TlsFailure, str] | None:
    """Check the name: only subject alternative names of the requested type count (RFC 9525 section 6)."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return TlsFailure.CERTIFICATE_NAME_MISMATCH, "the certificate has no subject alternative name"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        dns_names = names.get_values_for_type(x509.DNSName)
        matches = any(dns_name_matches(pattern, host) for pattern in dns_names)
    else:
        matches = address in names.get_values_for_type(x509.IPAddress)
    if matches:
        return None
    return TlsFailure.CERTIFICATE_NAME_MISMATCH, f"the certificate is not valid for {host!r}"


def dns_name_matches(pattern: str, host: str) -> bool:
    """Return True if a certificate's DNS name matches a host. `*` stands for exactly the first label."""
    wanted = host.lower().rstrip(".")
    offered = pattern.lower().rstrip(".")
    if not offered.startswith("*."):
        return offered == wanted
    first, _, rest = wanted.partition(".")
    # A star directly below a top-level domain would match too much.
    return bool(first) and "." in rest and offered[2:] == rest
