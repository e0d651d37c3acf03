"""The checks of the connection to a server, step by step until one fails.

    name -> TCP -> TLS, without trust -> WELCOME, and its clock -> trust -> session

Rules: no key is sent before the server has proved that it is trusted. The steps before that only report what an
unverified server presents.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from zcproto.certs import pair
from zcproto.cli import cert_report
from zcproto.cli.connect import ca_file, read_key
from zcproto.cli.doctor.finding import FAULT, OK, SKIPPED, WARNING, Finding, from_message
from zcproto.client.address import Address, parse_address
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.common.text import escape_text
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import Welcomed
from zcproto.errors import CallError, ConfigError, TlsError, ZcprotoError
from zcproto.tls.client import ALPN, judge_pinned
from zcproto.tls.context import client_context
from zcproto.tls.failure import TlsFailure, failure_of
from zcproto.tls.pins import parse_pins

GOOD_CLOCK: Final = 5.0
"""Seconds of difference above which it is a warning: clocks with NTP differ by far less."""

BAD_CLOCK: Final = 3_600.0
"""Seconds of difference above which expiries are misjudged."""

MAX_WELCOME: Final = 65_536

CURES: Final = {
    TlsFailure.NOT_TLS: "check that this is the port of zcproto, and that no proxy terminates TLS",
    TlsFailure.UNSUPPORTED_VERSION: "this is not a zcproto server, or a proxy before it uses an old TLS version",
    TlsFailure.NO_SHARED_SUITE: "this is not a zcproto server, or a proxy before it uses other cipher suites",
    TlsFailure.NO_APPLICATION_PROTOCOL: "this is not a zcproto server: check the port",
    TlsFailure.CERTIFICATE_REQUIRED: "it requires client certificates (tls.client_auth): connect with one",
    TlsFailure.DISCONNECTED: "it may be at its limit (its log has connection.refused), or a balancer has no server",
    TlsFailure.HANDSHAKE_TIMEOUT: "it is overloaded, or a firewall drops large packets: try from the server itself",
    TlsFailure.CERTIFICATE_EXPIRED: "renew it on the server (zcproto cert show), and compare the clocks",
    TlsFailure.CERTIFICATE_NAME_MISMATCH: (
        "connect to one of its names, or add this one to certificates.names on the server"
    ),
    TlsFailure.CERTIFICATE_UNTRUSTED: (
        "get the CA of the server (zcproto cert export-ca) and use --ca, or use --pin"
    ),
    TlsFailure.PIN_MISMATCH: "compare the pins with those of its operator (zcproto cert pins)",
}
"""The fix of each handshake failure, as a client sees it."""

_ANY_TLS: Final = "see the server's log for tls.failed, and docs/troubleshooting.md"


@dataclass(frozen=True, slots=True)
class Trust:
    """The trust options of the command line."""

    ca: Path | None
    pins: tuple[str, ...]
    home: Home

    @property
    def ca_file(self) -> Path | None:
        return ca_file(self.home, self.ca, self.pins)


@dataclass(frozen=True, slots=True)
class LoginAs:
    """The user of the session to open."""

    user: str
    key_file: Path | None


@dataclass(slots=True)
class _Seen:
    """The findings of a connection, and the certificate of the server."""

    findings: list[Finding] = field(default_factory=list)
    certificate: bytes = b""


def check(text: str, trust: Trust, login: LoginAs | None, timeout: float) -> list[Finding]:
    """Run the steps until one fails. Raises ConfigError for a malformed address or pin."""
    address = parse_address(text)
    try:
        pins = parse_pins(trust.pins)
    except TlsError as error:
        raise ConfigError([escape_text(str(error))]) from error
    key = None if login is None else read_key(login.key_file)
    seen = _Seen()
    is_reachable = _connect(address, timeout, seen)
    is_trusted = is_reachable and seen.certificate != b"" and _judge(address, trust, pins, timeout, seen)
    if login is not None:
        if is_trusted:
            seen.findings += asyncio.run(_session(str(address), trust, login.user, key, timeout))
        else:
            seen.findings.append(
                Finding("session", SKIPPED, "no key is sent to a server that is not trusted")
            )
    return seen.findings


# --- without trust ---------------------------------------------------------------------------------------


def _connect(address: Address, timeout: float, seen: _Seen) -> bool:
    """Check name, TCP, TLS and WELCOME. Return whether all of them work."""
    found = seen.findings
    try:
        raw = socket.create_connection(address, timeout)
    except socket.gaierror as error:
        found.append(
            Finding("reachable", FAULT, f"{address.host}: {error.strerror}", "check the name and DNS")
        )
        return False
    except TimeoutError:
        cure = "a firewall drops packets, or the machine is down: check both, and the port"
        found.append(Finding("reachable", FAULT, f"{address}: no answer within {timeout:g} s", cure))
        return False
    except OSError as error:
        cure = "start the server, and check that server.host is not only 127.0.0.1"
        found.append(Finding("reachable", FAULT, f"{address}: {error.strerror}", cure))
        return False
    peer = raw.getpeername()
    found.append(Finding("reachable", OK, f"{address} at {peer[0]} port {peer[1]}"))
    raw.settimeout(timeout)
    context = client_context(verify=False, protocols=[ALPN])
    try:
        with context.wrap_socket(raw, server_hostname=address.host.partition("%")[0]) as tls:
            return _greeted(tls, seen, system_clock.now() + timeout)
    except (OSError, ssl.SSLError) as error:
        raw.close()
        found.append(_handshake_fault(error, "handshake"))
        return False


def _greeted(tls: ssl.SSLSocket, seen: _Seen, deadline: float) -> bool:
    cipher = tls.cipher()
    assert cipher is not None, "the handshake is done"
    seen.certificate = tls.getpeercert(binary_form=True) or b""
    alpn = tls.selected_alpn_protocol()
    if alpn != ALPN:
        cure = CURES[TlsFailure.NO_APPLICATION_PROTOCOL]
        seen.findings.append(
            Finding("handshake", FAULT, f"TLS works, but its ALPN protocol is {alpn or 'missing'}", cure)
        )
        return False
    seen.findings.append(Finding("handshake", OK, f"{tls.version()}, {cipher[0]}, {alpn}"))
    connection = ClientConnection(max_frame=MAX_WELCOME, tolerance_ms=30_000)
    received = 0
    while received < MAX_WELCOME and system_clock.now() < deadline:  # also if it arrives byte by byte
        data = tls.recv(MAX_WELCOME)
        received += len(data)
        if not data:
            cure = "see its log: it may be at its limit, or require a client certificate"
            seen.findings.append(
                Finding("welcome", FAULT, "the server closed the connection without WELCOME", cure)
            )
            return False
        wall = system_clock.wall()
        for event in connection.receive_data(data, wall, system_clock.now()):
            if isinstance(event, Welcomed):
                seen.findings.append(_clock(connection.clock_offset_ms / MS_PER_SECOND))
                with contextlib.suppress(OSError):  # the server may have closed it
                    tls.unwrap()
                return True
            cure = "this is not a zcproto server, or it has a later protocol: compare the versions"
            seen.findings.append(Finding("welcome", FAULT, "its first frame is not a valid WELCOME", cure))
            return False
    seen.findings.append(
        Finding("welcome", FAULT, "its WELCOME does not end", "this is not a zcproto server")
    )
    return False


def _clock(ahead: float) -> Finding:
    """Judge the clock of the server, which is `ahead` seconds ahead of this machine's."""
    if abs(ahead) <= GOOD_CLOCK:
        return Finding("clock", OK, "the clocks of the server and this machine agree within 5 s")
    found = f"the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    state = FAULT if abs(ahead) > BAD_CLOCK else WARNING
    return Finding("clock", state, found, "synchronize both with NTP: timedatectl set-ntp true")


def _handshake_fault(error: Exception, check: str) -> Finding:
    if isinstance(error, ssl.SSLError):
        failure = failure_of(error)
        return Finding(check, FAULT, failure.value.replace("_", " "), CURES.get(failure, _ANY_TLS))
    if isinstance(error, TimeoutError):
        return Finding(check, FAULT, "no answer in time", CURES[TlsFailure.HANDSHAKE_TIMEOUT])
    reason = getattr(error, "strerror", None) or type(error).__name__
    return Finding(check, FAULT, str(reason), CURES[TlsFailure.DISCONNECTED])


# --- trust -----------------------------------------------------------------------------------------------


def _judge(address: Address, trust: Trust, pins: frozenset[str], timeout: float, seen: _Seen) -> bool:
    """Return whether a client with this trust accepts the server."""
    host = address.host.partition("%")[0]
    by_ca = trust.ca is not None or not pins
    source = "the system's store" if trust.ca_file is None else str(trust.ca_file)
    failure: TlsFailure | None = None
    detail = ""
    if by_ca:
        try:
            context = client_context(ca_file=trust.ca_file, protocols=[ALPN])
        except ZcprotoError as error:
            seen.findings.append(from_message("trust", escape_text(str(error))))
            return False
        try:
            with (
                socket.create_connection(address, timeout) as raw,
                context.wrap_socket(raw, server_hostname=host) as tls,
            ):
                seen.certificate = tls.getpeercert(binary_form=True) or b""
                with contextlib.suppress(OSError):
                    tls.unwrap()
        except ssl.SSLCertVerificationError as error:
            failure, detail = failure_of(error), error.verify_message
        except OSError as error:
            seen.findings.append(_handshake_fault(error, "trust"))
            return False
    if failure is None and pins:
        judgement = judge_pinned(
            seen.certificate, pins, host=host, wall=system_clock.wall(), chain_is_checked=by_ca
        )
        if judgement is not None:
            failure, detail = judgement
        source = f"{source} and a pin" if by_ca else "a pin"
    about = list(_about(seen.certificate))
    if failure is None:
        seen.findings.append(Finding("trust", OK, f"by {source}; {'; '.join(about)}"))
        seen.findings += _near_end(seen.certificate)
        return True
    found = f"{failure.value.replace('_', ' ')}: {escape_text(detail, 300)}; {'; '.join(about)}"
    seen.findings.append(Finding("trust", FAULT, found, CURES.get(failure, _ANY_TLS)))
    return False


def _about(der: bytes) -> Iterator[str]:
    """Describe the certificate of a server, which may not be trusted."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        yield f"names: {cert_report.shown_names(cert_report.names_of(certificate)) or 'none'}"
        yield f"until {certificate.not_valid_after_utc:%Y-%m-%d}"
        yield f"pin {pair.spki_pin(der)}"
    except pair.UNREADABLE:
        yield "its certificate cannot be read"


def _near_end(der: bytes) -> Iterator[Finding]:
    now = datetime.fromtimestamp(system_clock.wall() / MS_PER_SECOND, UTC)
    certificate = x509.load_der_x509_certificate(der)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    left = certificate.not_valid_after_utc - now
    if left < life / 6:  # renewal is due at a third of the life at the latest
        cure = "its renewal is overdue: run zcproto cert show on the server"
        yield Finding("trust", WARNING, f"its certificate has {left.days} days left", cure)


# --- the session -----------------------------------------------------------------------------------------


async def _session(address: str, trust: Trust, user: str, key: str | None, limit: float) -> list[Finding]:
    from zcproto.client import connect  # noqa: PLC0415 - needed only with a key

    client = connect(
        address,
        user=user,
        key=key,
        ca_file=trust.ca_file,
        pins=trust.pins,
        timeout=limit,
        connect_timeout=limit,
        client="zcproto-doctor",
        home=trust.home.path,
    )
    try:
        async with client:
            await client.call("session.info")
    except CallError as error:
        return [Finding("session", FAULT, escape_text(str(error), 500), _session_cure(error))]
    except (ZcprotoError, OSError) as error:
        return [from_message("session", escape_text(str(error), 500))]
    return [Finding("session", OK, f"{user} opened, used and closed one")]


def _session_cure(error: CallError) -> str:
    return {
        "UNAUTHENTICATED": "check the name and the key: zcproto user list, zcproto user new-key on the server",
        "RESOURCE_EXHAUSTED": "the user is at sessions.per_user, or failed too often: wait, or end some sessions",
        "UNAVAILABLE": "the store of the server does not answer, or it drains: run zcproto doctor on the server",
    }.get(error.code.name, "see the server's log")
