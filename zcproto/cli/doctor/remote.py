"""The checks of the connection to a server, step by step until one fails.

    name -> TCP -> TLS, without trust -> WELCOME, and its clock -> trust -> session

Rules: no key is sent before the server has proved that it is trusted. The steps before that only report what an
unverified server presents.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from cryptography import x509

from zcproto.certs import pair
from zcproto.cli import cert_report
from zcproto.cli.connect import CURES, TrustChoice, read_key, run
from zcproto.cli.output import utc
from zcproto.client.endpoints import Address, parse_address
from zcproto.common.clock import MS_PER_SECOND, system_clock
from zcproto.common.home import Home
from zcproto.common.text import counted, escape_text
from zcproto.config.types import is_loopback
from zcproto.connection.client import ClientConnection
from zcproto.connection.events import Welcomed
from zcproto.errors import CallError, Code, ConfigError, TlsError, ZcprotoError
from zcproto.tls.client import ALPN, judge_pinned
from zcproto.tls.context import client_context
from zcproto.tls.failure import TlsFailure, failure_of
from zcproto.tls.pins import key_pin, parse_pins

OK: Final = "ok"
SKIPPED: Final = "skipped"
WARNING: Final = "warning"
FAULT: Final = "fault"

Result = tuple[str, ...]
"""The fields of a Finding except its check."""

GOOD_CLOCK: Final = 5.0
"""Seconds of difference above which it is a warning: clocks with NTP differ by far less."""

BAD_CLOCK: Final = 3_600.0
"""Seconds of difference above which expiries are misjudged."""

MAX_WELCOME: Final = 65_536

SESSION_CURES: Final = {
    Code.UNAUTHENTICATED: "check the name and the key: zcproto user list, zcproto user new-key on the server",
    Code.RESOURCE_EXHAUSTED: "the user is at sessions.per_user, or failed too often: wait, or end some sessions",
    Code.UNAVAILABLE: "the store of the server does not answer, or it drains: run zcproto doctor on the server",
}

_FIREWALL: Final = "a firewall drops packets, or the machine is down: check both, and the port"

_CURES_OF_SILENCE: Final = frozenset(
    {_FIREWALL, CURES[TlsFailure.HANDSHAKE_TIMEOUT], CURES[TlsFailure.DISCONNECTED]}
)
"""The cures for servers of other machines that do not answer. None of them applies to this machine."""

NOT_SERVING: Final = "the server is stopped or hangs: see its log, then start or restart it"

_ANY_TLS: Final = "see the server's log for tls.failed, and docs/troubleshooting.md"


class Finding(NamedTuple):
    """One line of the report. `cure` is empty if nothing has to be done."""

    check: str
    state: str
    found: str
    cure: str = ""


def from_message(message: str) -> Result:
    """Return the fault of an error message, whose fix follows the first semicolon."""
    found, _, cure = message.partition("; ")
    return FAULT, found, cure


class StepFailed(Exception):
    """Ends the steps with a fault."""

    def __init__(self, check: str, found: str, cure: str) -> None:
        self.finding = Finding(check, FAULT, found, cure)


def check(
    text: str,
    trust: TrustChoice,
    home: Home,
    login: tuple[str, Path | None] | None,
    timeout: float,
    *,
    server_name: str | None = None,
    is_here: bool = False,
) -> list[Finding]:
    """Run the steps until one fails. Raises ConfigError for a malformed address or pin.

    `login` is the user of the session to open, and the file with the key. `server_name`, by default the host, is
    requested from the server and looked for in its certificate. `is_here`: the server is of this machine, as behind
    a loopback address.
    """
    address = parse_address(text)
    try:
        pins = parse_pins(trust.pins)
    except TlsError as error:
        raise ConfigError([escape_text(str(error))]) from error
    key = None if login is None else read_key(login[1])
    findings: list[Finding] = []
    try:
        name = server_name or address.host.partition("%")[0]
        certificate = _connect(address, name, timeout, findings)
        _judge(address, name, trust.ca_file(home, text), pins, timeout, certificate, findings)
    except StepFailed as failed:
        found = failed.finding
        if found.cure in _CURES_OF_SILENCE and (is_here or is_loopback(address.host)):
            found = found._replace(cure=NOT_SERVING)
        findings.append(found)
        if login is not None:
            findings.append(Finding("session", SKIPPED, "no key is sent to a server that is not trusted"))
    else:
        if login is not None and key is not None:
            findings.append(_session(str(address), server_name, trust, home, login[0], key, timeout))
    return findings


# --- without trust ---------------------------------------------------------------------------------------


def _connect(address: Address, name: str, timeout: float, findings: list[Finding]) -> bytes:
    """Check name, TCP, TLS and WELCOME. Return the certificate of the server. Raises StepFailed."""
    try:
        raw = socket.create_connection(address, timeout)
    except socket.gaierror as error:
        raise StepFailed(
            "reachable", f"{address.host}: {error.strerror}", "check the name and DNS"
        ) from error
    except TimeoutError as error:
        raise StepFailed("reachable", f"{address}: no answer within {timeout:g} s", _FIREWALL) from error
    except OSError as error:
        cure = "start the server, and check that server.host is not only 127.0.0.1"
        raise StepFailed("reachable", f"{address}: {error.strerror}", cure) from error
    peer = raw.getpeername()
    findings.append(Finding("reachable", OK, f"{address} at {peer[0]} port {peer[1]}"))
    raw.settimeout(timeout)
    context = client_context(verify=False, protocols=[ALPN])
    try:
        with context.wrap_socket(raw, server_hostname=name) as tls:
            findings.append(Finding("handshake", OK, _negotiated(tls)))
            greeted = _welcome(tls, system_clock.now() + timeout)
            findings.append(_clock(greeted.clock_offset_ms / MS_PER_SECOND))
            findings.append(_features(greeted.welcome))
            certificate = tls.getpeercert(binary_form=True) or b""
            with contextlib.suppress(OSError):  # the server may have closed it
                tls.unwrap()
            return certificate
    except (OSError, ssl.SSLError) as error:
        raw.close()
        raise _handshake_failed(error, "handshake") from error


def _negotiated(tls: ssl.SSLSocket) -> str:
    cipher, alpn = tls.cipher(), tls.selected_alpn_protocol()
    assert cipher is not None, "the handshake is complete"
    if alpn != ALPN:
        found = f"TLS works, but its ALPN protocol is {alpn or 'missing'}"
        raise StepFailed("handshake", found, CURES[TlsFailure.NO_APPLICATION_PROTOCOL])
    group: Any = getattr(tls, "group", lambda: None)()  # from Python 3.15 on
    return ", ".join(filter(None, (tls.version(), cipher[0], group, alpn)))


def _welcome(tls: ssl.SSLSocket, deadline: float) -> ClientConnection:
    """Read WELCOME; return the connection that has received it."""
    connection = ClientConnection(max_frame=MAX_WELCOME, tolerance_ms=30_000)
    received = 0
    while received < MAX_WELCOME and system_clock.now() < deadline:  # also if it arrives byte by byte
        data = tls.recv(MAX_WELCOME)
        received += len(data)
        if not data:
            cure = "see its log: it may be at its limit, or require a client certificate"
            raise StepFailed("welcome", "the server closed the connection without WELCOME", cure)
        for event in connection.receive_data(data, system_clock.wall(), system_clock.now()):
            if isinstance(event, Welcomed):
                return connection
            cure = "this is not a zcproto server, or it has a later protocol: compare the versions"
            raise StepFailed("welcome", "its first frame is not a valid WELCOME", cure)
    raise StepFailed("welcome", "its WELCOME does not end", "this is not a zcproto server")


def _clock(ahead: float) -> Finding:
    """Judge the clock of the server, which is `ahead` seconds ahead of this machine's."""
    if abs(ahead) <= GOOD_CLOCK:
        return Finding("clock", OK, "the clocks of the server and this machine agree within 5 s")
    found = f"the server's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    state = FAULT if abs(ahead) > BAD_CLOCK else WARNING
    return Finding("clock", state, found, "synchronize both with NTP: timedatectl set-ntp true")


def _features(welcome: Mapping[str, Any]) -> Finding:
    """Report what the server has beside calls."""
    streams, calls = welcome.get("streams"), welcome.get("calls")
    found = "no streams" if streams is None else counted(streams["max_open"], "stream")
    found += ", also durable ones," if (streams or {}).get("durable") else ""
    more = "no calls of clients" if calls is None else f"{counted(calls['max'], 'call')} of clients"
    return Finding("streams", OK, f"{found} and {more} on a connection")


def _handshake_failed(error: Exception, check: str) -> StepFailed:
    if isinstance(error, ssl.SSLError):
        failure = failure_of(error)
        return StepFailed(check, failure.value.replace("_", " "), CURES.get(failure, _ANY_TLS))
    if isinstance(error, TimeoutError):
        return StepFailed(check, "no answer in time", CURES[TlsFailure.HANDSHAKE_TIMEOUT])
    reason = getattr(error, "strerror", None) or type(error).__name__
    return StepFailed(check, str(reason), CURES[TlsFailure.DISCONNECTED])


# --- trust -----------------------------------------------------------------------------------------------


def _judge(
    address: Address,
    host: str,
    ca_file: Path | None,
    pins: frozenset[str],
    timeout: float,
    certificate: bytes,
    findings: list[Finding],
) -> None:
    """Check whether a client with this trust accepts the server. Raises StepFailed."""
    by_ca = ca_file is not None or not pins
    source = "the system's store" if ca_file is None else str(ca_file)
    failure: TlsFailure | None = None
    detail = ""
    if by_ca:
        try:
            context = client_context(ca_file=ca_file, protocols=[ALPN])
        except ZcprotoError as error:
            found, _, cure = escape_text(str(error)).partition("; ")
            raise StepFailed("trust", found, cure) from error
        try:
            with (
                socket.create_connection(address, timeout) as raw,
                context.wrap_socket(raw, server_hostname=host) as tls,
            ):
                certificate = tls.getpeercert(binary_form=True) or b""
                with contextlib.suppress(OSError):
                    tls.unwrap()
        except ssl.SSLCertVerificationError as error:
            failure, detail = failure_of(error), error.verify_message
        except OSError as error:
            raise _handshake_failed(error, "trust") from error
    if failure is None and pins:
        judgement = judge_pinned(
            certificate, pins, host=host, wall=system_clock.wall(), chain_is_checked=by_ca
        )
        if judgement is not None:
            failure, detail = judgement
        source = f"{source} and a pin" if by_ca else "a pin"
    about = "; ".join(_about(certificate))
    if failure is not None:
        found = f"{failure.value.replace('_', ' ')}: {escape_text(detail, 300)}; {about}"
        raise StepFailed("trust", found, CURES.get(failure, _ANY_TLS))
    findings.append(Finding("trust", OK, f"by {source}; {about}"))
    findings += _near_end(certificate)


def _about(der: bytes) -> Iterator[str]:
    """Describe the certificate of a server, which may not be trusted."""
    try:
        certificate = x509.load_der_x509_certificate(der)
        yield f"names: {cert_report.shown_names(cert_report.names_of(certificate)) or 'none'}"
        yield f"until {certificate.not_valid_after_utc:%Y-%m-%d}"
        yield f"pin {key_pin(certificate.public_key())}"
    except pair.UNREADABLE:
        yield "its certificate cannot be read"


def _near_end(der: bytes) -> Iterator[Finding]:
    certificate = x509.load_der_x509_certificate(der)
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    left = certificate.not_valid_after_utc - utc()
    if left < life / 6:  # renewal is due at a third of the life at the latest
        cure = "its renewal is overdue: run zcproto cert show on the server"
        yield Finding("trust", WARNING, f"its certificate has {counted(left.days, 'day')} left", cure)


# --- the session -----------------------------------------------------------------------------------------


def _session(
    address: str, server_name: str | None, trust: TrustChoice, home: Home, user: str, key: str, timeout: float
) -> Finding:
    async def use_session() -> None:
        options = {
            "user": user,
            "key": key,
            "timeout": timeout,
            "connect_timeout": timeout,
            "start_timeout": 0,
            "server_hostname": server_name,
        }
        async with trust.make_client(home, address, client="zcproto-doctor", **options) as client:
            await client.call("session.info")

    try:
        run(use_session())
    except CallError as error:
        cure = SESSION_CURES.get(error.code, "see the server's log")
        return Finding("session", FAULT, escape_text(str(error), 500), cure)
    except (ZcprotoError, OSError) as error:
        return Finding("session", *from_message(escape_text(str(error), 500)))
    return Finding("session", OK, f"{user} opened, used and closed one")
