"""Test the TLS client against OpenSSL in memory and against our server over loopback."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import ssl
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import zcproto.tls.client as tls_client
from tests.conftest import ServerPairs
from tests.helpers import WALL, FakeTimers, MockTransport
from tests.tls.identities import key_pin_of
from tests.tls.support import all_gone
from zcproto.common.deadlines import DeadlineWheel
from zcproto.errors import TlsError
from zcproto.tls.client import SHOWN_PINS, TlsClientTransport, TlsConnector, dns_name_matches, judge_pinned
from zcproto.tls.client_hello import AlertDescription, alert_record
from zcproto.tls.context import SiteContexts, client_context, server_context
from zcproto.tls.failure import TlsFailure, failure_of
from zcproto.tls.pins import certificate_pin, parse_pins
from zcproto.tls.server import TlsAcceptor, TlsServerTransport
from zcproto.tls.transport import LINGER_TIME

NOW = datetime.fromtimestamp(WALL / 1000, UTC)
DAY = timedelta(days=1)


class Recorder(asyncio.Protocol):
    """A protocol that records its callbacks."""

    def __init__(self, on_made: Callable[[Any], None] = lambda transport: None) -> None:
        self.calls: list[Any] = []
        self.received = bytearray()
        self._on_made = on_made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("made")
        self._on_made(transport)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def eof_received(self) -> None:
        self.calls.append("eof")

    def connection_lost(self, exc: Exception | None) -> None:
        self.calls.append(exc)


class Peer:
    """An OpenSSL server in memory, joined to a client transport by a mock of TCP."""

    def __init__(
        self,
        timers: FakeTimers,
        server: ssl.SSLContext,
        client: ssl.SSLContext,
        *,
        host: str = "localhost",
        pins: frozenset[str] = frozenset(),
        wall: int = WALL,
        protocol: Recorder | None = None,
    ) -> None:
        self.calls: list[TlsError | None] = []
        self.protocol = Recorder() if protocol is None else protocol
        self.connector = TlsConnector(
            client, host, DeadlineWheel(timers), pins=pins, wall=lambda: wall, handshake_timeout=5.0
        )
        self.client = TlsClientTransport(self.connector, self.protocol, self.calls.append)
        self.raw = MockTransport(timers)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = server.wrap_bio(self.incoming, self.outgoing, server_side=True)
        self.agreed = False
        self.error: ssl.SSLError | None = None

    def connect(self) -> Peer:
        self.raw.connect(self.client)
        return self

    def pump(self) -> Peer:
        """Transfer bytes both ways until both ends are idle."""
        while True:
            sent = self.raw.take()
            self.incoming.write(sent)
            self.step()
            answer = self.outgoing.read()
            if answer:
                self.raw.deliver(answer)
            elif not sent:
                return self

    def step(self) -> None:
        if self.agreed or self.error is not None:
            return
        try:
            self.tls.do_handshake()
            self.agreed = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError as error:
            self.error = error

    @property
    def failure(self) -> TlsError:
        """Return the reported error. It is reported only after the server has closed its end."""
        if not self.raw.lost:
            assert self.calls == []
            self.raw.lose()
        (error,) = self.calls
        assert error is not None
        return error


def serving(leaf: trustme.LeafCert, alpn: list[str] | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    leaf.configure_cert(context)
    context.set_alpn_protocols(["zcp/1"] if alpn is None else alpn)
    context.num_tickets = 0
    return context


def der_of(leaf: trustme.LeafCert) -> bytes:
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


@pytest.fixture(scope="module")
def leaf(ca: trustme.CA) -> trustme.LeafCert:
    return ca.issue_cert("localhost", "127.0.0.1", "::1", key_type=trustme.KeyType.ECDSA)


@pytest.fixture
def peer(timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path) -> Peer:
    return Peer(timers, serving(leaf), client_context(ca_file=ca_file))


# --- valid server ----------------------------------------------------------------------------------


def test_trusted_server_exchanges_data_both_ways(peer: Peer) -> None:
    peer.connect().pump()
    assert peer.calls == [None]
    assert peer.protocol.calls == ["made"]
    assert peer.tls.selected_alpn_protocol() == "zcp/1"
    peer.tls.write(b"welcome")
    peer.pump()
    assert peer.protocol.received == b"welcome"
    peer.client.write(b"request")
    peer.incoming.write(peer.raw.take())
    assert peer.tls.read(100) == b"request"


def test_data_in_the_same_read_as_end_of_handshake_is_delivered(peer: Peer, timers: FakeTimers) -> None:
    peer.connect()
    peer.incoming.write(peer.raw.take())
    peer.step()
    flight = peer.outgoing.read()
    assert not peer.agreed  # the server waits only for our Finished
    peer.raw.deliver(flight)
    peer.incoming.write(peer.raw.take())
    peer.step()
    peer.tls.write(b"at once")
    peer.raw.deliver(peer.outgoing.read())
    assert peer.protocol.received == b"at once"


def test_handshake_byte_by_byte_succeeds(peer: Peer) -> None:
    peer.connect()
    while not peer.agreed:
        peer.incoming.write(peer.raw.take())
        peer.step()
        peer.raw.deliver(peer.outgoing.read(), piece=1)
    assert peer.calls == [None]


def test_no_deadline_after_handshake(peer: Peer, timers: FakeTimers) -> None:
    peer.connect().pump()
    timers.advance(3_600)
    assert peer.protocol.calls == ["made"]


def test_protocol_may_close_in_connection_made(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path
) -> None:
    protocol = Recorder(on_made=lambda transport: transport.close())
    peer = Peer(timers, serving(leaf), client_context(ca_file=ca_file), protocol=protocol).connect().pump()
    assert peer.calls == [None]
    assert peer.client.is_closing()
    assert peer.raw.eof_written


def test_paused_protocol_gets_buffered_data_later(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path
) -> None:
    protocol = Recorder(on_made=lambda transport: transport.pause_reading())
    peer = Peer(timers, serving(leaf), client_context(ca_file=ca_file), protocol=protocol).connect().pump()
    assert not peer.raw.is_reading()
    peer.client.resume_reading()
    peer.tls.write(b"later")
    peer.pump()
    assert peer.raw.is_reading()
    assert protocol.received == b"later"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::1%lo"])
def test_ip_address_is_matched_in_certificate(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path, host: str
) -> None:
    peer = Peer(timers, serving(leaf), client_context(ca_file=ca_file), host=host).connect().pump()
    assert peer.calls == [None]


# --- invalid certificates -----------------------------------------------------------------


def test_server_of_unknown_ca_is_untrusted_and_gets_alert(timers: FakeTimers, ca_file: Path) -> None:
    other = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("localhost")
    peer = Peer(timers, serving(other), client_context(ca_file=ca_file)).connect().pump()
    assert peer.failure.failure == "certificate_untrusted"
    assert peer.failure.detail.endswith(
        "issuer certificate; get the CA of the server (zcproto cert export-ca), and give it as ca_file"
    )
    assert peer.error is not None
    assert "UNKNOWN_CA" in peer.error.reason
    assert peer.protocol.calls == []


def test_expired_certificate_is_distinguished_from_untrusted(
    timers: FakeTimers, ca: trustme.CA, ca_file: Path
) -> None:
    old = ca.issue_cert("localhost", not_after=datetime.now(UTC) - DAY)
    peer = Peer(timers, serving(old), client_context(ca_file=ca_file)).connect().pump()
    assert peer.failure.failure == "certificate_expired"
    assert "expired" in peer.failure.detail


@pytest.mark.parametrize("host", ["example.org", "127.0.0.2"])
def test_name_mismatch_is_distinguished_from_untrusted(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path, host: str
) -> None:
    peer = Peer(timers, serving(leaf), client_context(ca_file=ca_file), host=host).connect().pump()
    assert peer.failure.failure == "certificate_name_mismatch"
    assert host in peer.failure.detail


def test_without_verification_any_certificate_is_accepted(timers: FakeTimers) -> None:
    other = trustme.CA().issue_cert("elsewhere")
    peer = Peer(timers, serving(other), client_context(verify=False)).connect().pump()
    assert peer.calls == [None]


# --- negotiated parameters -------------------------------------------------------------------


@pytest.mark.parametrize("alpn", [[], ["h2"]])
def test_server_without_zcp_alpn_gets_no_byte(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path, alpn: list[str]
) -> None:
    peer = Peer(timers, serving(leaf, alpn), client_context(ca_file=ca_file)).connect().pump()
    assert peer.failure.failure == "no_application_protocol"
    assert not peer.agreed  # not even our Finished was sent
    assert peer.raw.eof_written
    assert peer.protocol.calls == []


def test_disallowed_suite_is_refused(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls_client, "suites_are_allowed", lambda tls: False)
    peer.connect().pump()
    assert peer.failure.failure == "wrong_parameters"
    assert not peer.agreed


def test_tls_1_2_only_server_is_unsupported_version(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path
) -> None:
    context = serving(leaf)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    peer = Peer(timers, context, client_context(ca_file=ca_file)).connect().pump()
    assert peer.failure.failure == "unsupported_version"
    assert "TLS 1.3" in str(peer.failure)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (alert_record(AlertDescription.HANDSHAKE_FAILURE), "no_shared_parameters"),
        (alert_record(AlertDescription.PROTOCOL_VERSION), "unsupported_version"),
        (alert_record(AlertDescription.NO_APPLICATION_PROTOCOL), "no_application_protocol"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not_tls"),
        (b"SSH-2.0-OpenSSH_9.9\r\n", "not_tls"),
    ],
)
def test_each_refusal_has_cause_and_message(peer: Peer, answer: bytes, failure: str) -> None:
    peer.connect()
    peer.raw.take()
    peer.raw.deliver(answer)
    assert peer.failure.failure == failure
    assert peer.failure.detail


def test_alert_120_is_recognised_by_message_without_reason_name() -> None:
    error = ssl.SSLError(1, "[SSL] tlsv1 alert no application protocol (_ssl.c:1006)")
    error.reason = None  # type: ignore[assignment]
    assert failure_of(error) is TlsFailure.NO_APPLICATION_PROTOCOL


def test_required_client_certificate_ends_open_connection(
    timers: FakeTimers, leaf: trustme.LeafCert, ca: trustme.CA, ca_file: Path
) -> None:
    context = serving(leaf)
    ca.configure_trust(context)
    context.verify_mode = ssl.CERT_REQUIRED
    peer = Peer(timers, context, client_context(ca_file=ca_file)).connect().pump()
    assert peer.calls == [None]  # in TLS 1.3 the client finishes before its certificate is verified
    peer.raw.lose()
    assert isinstance(peer.protocol.calls[-1], TlsError)
    assert peer.protocol.calls[-1].failure == "certificate_required"
    assert "certificate_key" in peer.protocol.calls[-1].detail
    assert peer.client.error is peer.protocol.calls[-1]


# --- failed handshakes -------------------------------------------------------------------


def test_silent_server_ends_at_handshake_timeout(peer: Peer, timers: FakeTimers) -> None:
    peer.connect()
    timers.advance(4.9)
    assert peer.calls == []
    timers.advance(0.3)
    assert peer.raw.eof_written
    timers.advance(LINGER_TIME + 1)
    assert peer.raw.aborted
    assert peer.calls == [peer.failure]
    assert peer.failure.failure == "handshake_timeout"
    assert peer.failure.detail


@pytest.mark.parametrize("end", [MockTransport.deliver_eof, MockTransport.lose])
def test_close_during_handshake_is_distinguished_from_truncation(
    peer: Peer, timers: FakeTimers, end: Callable[[MockTransport], None]
) -> None:
    peer.connect()
    end(peer.raw)
    assert peer.failure.failure == "disconnected"
    timers.advance(LINGER_TIME + 1)
    assert peer.protocol.calls == []


def test_local_close_during_handshake_is_reported(peer: Peer, timers: FakeTimers) -> None:
    peer.connect()
    peer.client.close()
    peer.raw.lose()
    assert peer.failure.failure == "disconnected"


def test_aborted_handshake_is_reported_once(peer: Peer, timers: FakeTimers) -> None:
    peer.connect()
    peer.client.abort()
    timers.run()
    assert peer.failure.failure == "disconnected"


def test_no_reference_to_protocol_after_end(peer: Peer, timers: FakeTimers) -> None:
    class Callback:
        def __call__(self, error: TlsError | None) -> None:
            pass

    protocol, on_handshake = Recorder(), Callback()
    references = [weakref.ref(protocol), weakref.ref(on_handshake)]
    client = TlsClientTransport(peer.connector, protocol, on_handshake)
    peer.raw.connect(client)
    client.abort()
    timers.run()
    assert client.is_closing()
    del protocol, on_handshake
    assert [reference() for reference in references] == [None, None]


def test_transport_uses_slots() -> None:
    assert "__dict__" not in TlsClientTransport.__slots__
    assert "__slots__" in vars(TlsClientTransport)


# --- pins -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin_of", [key_pin_of, certificate_pin])
def test_pin_alone_is_sufficient(
    timers: FakeTimers, leaf: trustme.LeafCert, pin_of: Callable[[bytes], str]
) -> None:
    pins = parse_pins(["sha256/" + "A" * 43 + "=", pin_of(der_of(leaf))])
    wall = round(datetime.now(UTC).timestamp() * 1000)
    peer = Peer(timers, serving(leaf), client_context(verify=False), pins=pins, wall=wall).connect().pump()
    assert peer.calls == [None]
    assert peer.agreed


@pytest.mark.parametrize("by_ca", [True, False])
def test_wrong_pin_ends_connection_before_any_byte_and_names_both_pins(
    timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path, by_ca: bool
) -> None:
    wrong = "sha256/" + "A" * 43 + "="
    context = client_context(ca_file=ca_file) if by_ca else client_context(verify=False)
    peer = Peer(timers, serving(leaf), context, pins=parse_pins([wrong])).connect().pump()
    assert peer.failure.failure == "pin_mismatch"
    seen, _, expected = peer.failure.detail.partition("expected:")
    assert f"Its key has {key_pin_of(der_of(leaf))}" in seen
    assert f"its certificate {certificate_pin(der_of(leaf))}" in seen
    assert wrong in expected
    assert not peer.agreed
    assert peer.raw.take() == b""
    assert peer.raw.eof_written
    assert peer.protocol.calls == []


def test_long_list_of_expected_pins_is_shortened(timers: FakeTimers, leaf: trustme.LeafCert) -> None:
    pins = ["sha256/" + base64.b64encode(bytes([number]) * 32).decode() for number in range(64)]
    context = client_context(verify=False)
    peer = Peer(timers, serving(leaf), context, pins=parse_pins(pins)).connect().pump()
    assert sum(pin in peer.failure.detail for pin in pins) == SHOWN_PINS
    assert f"or {64 - SHOWN_PINS} more" in peer.failure.detail


def test_pin_is_checked_in_addition_to_ca(timers: FakeTimers, leaf: trustme.LeafCert, ca_file: Path) -> None:
    pins = parse_pins([key_pin_of(der_of(leaf))])
    good = Peer(timers, serving(leaf), client_context(ca_file=ca_file), pins=pins).connect().pump()
    assert good.calls == [None]
    bad = Peer(timers, serving(leaf), client_context(ca_file=ca_file), pins=pins, host="example.org")
    assert bad.connect().pump().failure.failure == "certificate_name_mismatch"


def test_pin_does_not_replace_name_check(timers: FakeTimers, leaf: trustme.LeafCert) -> None:
    pins = parse_pins([key_pin_of(der_of(leaf))])
    wall = round(datetime.now(UTC).timestamp() * 1000)
    context = client_context(verify=False)
    peer = Peer(timers, serving(leaf), context, pins=pins, wall=wall, host="example.org").connect().pump()
    assert peer.failure.failure == "certificate_name_mismatch"
    assert not peer.agreed


def certificate(
    names: list[x509.GeneralName] | None, start: datetime = NOW - DAY, end: datetime = NOW + DAY
) -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )
    if names is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


DNS = [x509.DNSName("localhost"), x509.DNSName("*.example.org")]
ADDRESS: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("192.0.2.1"))]


def verdict(der: bytes, host: str = "localhost", *, wall: int = WALL) -> TlsFailure | None:
    found = judge_pinned(der, frozenset({key_pin_of(der)}), host=host, wall=wall, chain_is_checked=False)
    if found is None:
        return None
    assert found[1]
    return found[0]


@pytest.mark.parametrize(
    ("names", "host", "matches"),
    [
        (DNS, "localhost", True),
        (DNS, "LocalHost.", True),
        (DNS, "a.example.org", True),
        (DNS, "a.b.example.org", False),
        (DNS, "example.org", False),
        (DNS, "127.0.0.1", False),
        (ADDRESS, "192.0.2.1", True),
        (ADDRESS, "192.0.2.2", False),
        ([x509.DNSName("192.0.2.1")], "192.0.2.1", False),  # addresses do not match DNS names
        ([x509.RFC822Name("localhost")], "localhost", False),
        (None, "localhost", False),  # the common name does not count (RFC 9525 section 2)
    ],
)
def test_pinned_certificate_must_match_host(
    names: list[x509.GeneralName] | None, host: str, matches: bool
) -> None:
    expected = None if matches else TlsFailure.CERTIFICATE_NAME_MISMATCH
    assert verdict(certificate(names), host) is expected


@pytest.mark.parametrize(
    ("days", "good"), [(-1.1, False), (-0.9, True), (0, True), (0.9, True), (1.1, False)]
)
def test_pinned_certificate_must_be_valid_now(days: float, good: bool) -> None:
    found = verdict(certificate(list(DNS)), wall=WALL + round(days * 86_400_000))
    assert found is (None if good else TlsFailure.CERTIFICATE_EXPIRED)


def test_unreadable_certificate_is_untrusted() -> None:
    found = judge_pinned(b"\x30\x00", frozenset({"x"}), host="a", wall=WALL, chain_is_checked=True)
    assert found is not None
    assert found[0] is TlsFailure.CERTIFICATE_UNTRUSTED


@pytest.mark.parametrize(
    ("pattern", "host", "matches"),
    [
        ("example.org", "example.org", True),
        ("EXAMPLE.org.", "example.ORG", True),
        ("example.org", "www.example.org", False),
        ("*.example.org", "www.example.org", True),
        ("*.example.org", ".example.org", False),
        ("*.org", "example.org", False),
        ("w*.example.org", "www.example.org", False),
        ("*", "localhost", False),
        ("www.*.org", "www.example.org", False),
    ],
)
def test_wildcard_matches_exactly_one_label(pattern: str, host: str, matches: bool) -> None:
    assert dns_name_matches(pattern, host) is matches


# --- our own server ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ecdsa", "rsa"])
async def test_client_and_server_over_loopback(server_pairs: ServerPairs, ca_file: Path, kind: str) -> None:
    loop = asyncio.get_running_loop()
    wheel = DeadlineWheel(loop)
    received: asyncio.Future[bytes] = loop.create_future()

    class Greeter(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.write(b"welcome")
            transport.close()

    class Listener(Recorder):
        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            received.set_result(bytes(self.received))

    pair = getattr(server_pairs, kind)
    context = server_context([(pair.certificate, pair.key)], ["zcp/1"])
    acceptor = TlsAcceptor(SiteContexts(context), {"zcp/1": Greeter}, wheel, loop)
    accepted = TlsServerTransport(acceptor, "peer")
    server = await loop.create_server(lambda: accepted, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    connector = TlsConnector(client_context(ca_file=ca_file), host, wheel, wall=lambda: WALL)
    errors: list[TlsError | None] = []
    protocol = Listener()
    await loop.create_connection(lambda: TlsClientTransport(connector, protocol, errors.append), host, port)
    assert await received == b"welcome"
    assert errors == [None]
    assert protocol.calls == ["made", "eof", None]
    server.close()
    await server.wait_closed()
    await all_gone([accepted])
    wheel.close()
