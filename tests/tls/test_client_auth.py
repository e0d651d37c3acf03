"""Test client certificates: acceptance, alerts and counters of refusals."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.identities import (
    DAY,
    Identity,
    client_trust,
    for_clients,
    for_purposes,
    for_servers_only,
    key_pin_of,
    revocation_list,
    write_identity,
)
from tests.tls.support import TlsPair
from zcproto.errors import CertificateError
from zcproto.tls.context import client_context, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import certificate_pin
from zcproto.tls.transport import TlsPhase

OTHER_PIN = "sha256/" + "A" * 43 + "="


@dataclass
class ClientAuth:
    """A CA of clients, which is not that of the servers, and connections whose server asks for its certificates."""

    ca: trustme.CA
    ada: trustme.LeafCert
    folder: Path
    timers: FakeTimers
    pairs: ServerPairs
    servers_ca: Path

    @property
    def identity(self) -> Identity:
        """A valid certificate of a client."""
        return write_identity(self.folder, self.ada)

    def asking(self, client_auth: str = "required", **options: Any) -> ssl.SSLContext:
        """Return a server context that requests client certificates."""
        options.setdefault("ca", self.ca.cert_pem.bytes())
        trust = client_trust(self.folder, **options, is_required=client_auth == "required")
        return server_context([self.pairs.ecdsa], ["zcp/1"], clients=None if client_auth == "off" else trust)

    def connect(
        self, shown: Identity | None, context: ssl.SSLContext | None = None, **options: Any
    ) -> TlsPair:
        """Return a connection before its first byte, of a client that shows a certificate, or none."""
        files = {} if shown is None else {"certificate": shown.certificate, "key": shown.key}
        client = client_context(ca_file=self.servers_ca, **files)
        return TlsPair(self.timers, context or self.asking(), client, **options)

    def certificate(self, case: str) -> Identity | None:
        """Return what a client shows in a case of REFUSED."""
        now = datetime.now(UTC)
        match case:
            case "none":
                return None
            case "untrusted":
                leaf = for_clients(trustme.CA(key_type=trustme.KeyType.ECDSA))
            case "expired":
                leaf = for_clients(self.ca, not_after=now - DAY)
            case "not yet valid":
                leaf = for_clients(self.ca, not_before=now + DAY)
            case "purpose":
                return for_servers_only(self.ca, self.folder)
            case _:
                leaf = self.ada
        return write_identity(self.folder, leaf)

    def revocations(self, case: str) -> bytes | None:
        """Return the list of revoked certificates in a case of REFUSED."""
        match case:
            case "revoked":
                return revocation_list(self.ca, self.ada)
            case "expired list":
                return revocation_list(self.ca, start=-2 * DAY, end=-DAY)
            case "list of tomorrow":
                return revocation_list(self.ca, start=DAY, end=2 * DAY)
            case "list of another":
                return revocation_list(trustme.CA(organization_name="x", key_type=trustme.KeyType.ECDSA))
            case "forged list":
                return revocation_list(self.ca, signer=trustme.CA(key_type=trustme.KeyType.ECDSA))
        return None


@pytest.fixture(scope="module")
def client_ca() -> trustme.CA:
    return trustme.CA(organization_name="clients", key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="module")
def ada(client_ca: trustme.CA) -> trustme.LeafCert:
    return for_clients(client_ca)


@pytest.fixture
def auth(
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
    server_pairs: ServerPairs,
    ca_file: Path,
) -> ClientAuth:
    return ClientAuth(client_ca, ada, tmp_path, timers, server_pairs, ca_file)


def refused(pair: TlsPair) -> ssl.SSLError:
    """Run the handshake to its refusal. Return the error of the client."""
    pair.exchange()
    assert pair.phase is TlsPhase.CLOSING
    assert pair.protocol.calls == []
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.handshakes_completed == 0
    return pair.refusal()


def refused_after_the_handshake(pair: TlsPair, failure: TlsFailure) -> None:
    """Run the handshake, after which the server finds the certificate wrong by itself."""
    pair.exchange(b"at once")
    assert (pair.protocol.calls, pair.protocol.received) == ([], b"")
    assert pair.failures == {failure: 1}
    assert pair.acceptor.handshakes_completed == 0
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.client_saw_close_notify()


# --- accepted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_auth", ["optional", "required"])
def test_valid_client_certificate_is_accepted_and_readable(auth: ClientAuth, client_auth: str) -> None:
    identity = auth.identity
    pair = auth.connect(identity, auth.asking(client_auth))
    assert pair.server.peer_certificate() is None
    seen: list[bytes | None] = []
    pair.protocol.actions = {"made": lambda protocol: seen.append(protocol.transport.peer_certificate())}
    pair.agree()
    assert seen == [identity.der]
    assert pair.server.peer_certificate() == identity.der
    assert pair.failures == {}
    pair.say(b"hello")
    assert pair.protocol.received == b"hello"
    pair.raw.lose()
    assert pair.server.peer_certificate() is None


@pytest.mark.parametrize(("client_auth", "shows"), [("off", False), ("optional", False), ("off", True)])
def test_server_that_does_not_ask_or_does_not_insist_gets_no_certificate(
    auth: ClientAuth, client_auth: str, shows: bool
) -> None:
    pair = auth.connect(auth.identity if shows else None, auth.asking(client_auth)).agree()
    assert pair.server.peer_certificate() is None


def test_client_ca_may_be_a_file(auth: ClientAuth) -> None:
    file, crl = auth.folder / "clients.pem", auth.folder / "clients.crl"
    auth.ca.cert_pem.write_to_path(file)
    crl.write_bytes(revocation_list(auth.ca))
    auth.connect(auth.identity, auth.asking(ca=file, crl=crl)).agree()


def test_intermediate_ca_is_trusted_without_root_or_siblings(auth: ClientAuth) -> None:
    issuing, sister = auth.ca.create_child_ca(), auth.ca.create_child_ca()
    context = auth.asking(ca=issuing.cert_pem.bytes())
    ours = write_identity(auth.folder, issuing.issue_cert("ada@example.org"), "ours")
    auth.connect(ours, context).agree()
    theirs = write_identity(auth.folder, sister.issue_cert("ada@example.org"), "theirs")
    assert "UNKNOWN_CA" in refused(auth.connect(theirs, context)).reason


def test_client_chain_to_root_is_accepted(auth: ClientAuth) -> None:
    identity = write_identity(auth.folder, auth.ca.create_child_ca().issue_cert("ada@example.org"))
    assert auth.connect(identity).agree().server.peer_certificate() == identity.der


def test_crl_without_the_client_accepts_it(auth: ClientAuth) -> None:
    crl = revocation_list(auth.ca, for_clients(auth.ca, "eve@example.org"))
    auth.connect(auth.identity, auth.asking(crl=crl)).agree()


@pytest.mark.parametrize("others", [[], [ExtendedKeyUsageOID.SERVER_AUTH]])
def test_certificate_with_client_auth_among_its_purposes_is_accepted(
    auth: ClientAuth, others: list[x509.ObjectIdentifier]
) -> None:
    purposes = [*others, ExtendedKeyUsageOID.CLIENT_AUTH]
    auth.connect(for_purposes(auth.ca, auth.folder, *purposes)).agree()


# --- refused ------------------------------------------------------------------------------------------

REFUSED = [
    ("none", TlsFailure.CERTIFICATE_REQUIRED, "CERTIFICATE_REQUIRED"),
    ("untrusted", TlsFailure.CERTIFICATE_UNTRUSTED, "UNKNOWN_CA"),
    ("expired", TlsFailure.CERTIFICATE_EXPIRED, "CERTIFICATE_EXPIRED"),
    ("not yet valid", TlsFailure.CERTIFICATE_EXPIRED, "BAD_CERTIFICATE"),
    ("purpose", TlsFailure.CERTIFICATE_UNTRUSTED, "UNSUPPORTED_CERTIFICATE"),
    ("revoked", TlsFailure.CERTIFICATE_REVOKED, "CERTIFICATE_REVOKED"),
    ("expired list", TlsFailure.REVOCATION_UNKNOWN, "CERTIFICATE_EXPIRED"),
    ("list of tomorrow", TlsFailure.REVOCATION_UNKNOWN, "BAD_CERTIFICATE"),
    ("list of another", TlsFailure.REVOCATION_UNKNOWN, "UNKNOWN_CA"),
    ("forged list", TlsFailure.REVOCATION_UNKNOWN, "DECRYPT_ERROR"),
]


@pytest.mark.parametrize(
    ("client_auth", "case", "failure", "alert"),
    [("required", *row) for row in REFUSED] + [("optional", *row) for row in REFUSED[1:]],
)
def test_each_client_certificate_refusal_has_cause_and_alert(
    auth: ClientAuth, client_auth: str, case: str, failure: TlsFailure, alert: str
) -> None:
    context = auth.asking(client_auth, crl=auth.revocations(case))
    pair = auth.connect(auth.certificate(case), context)
    error = refused(pair)
    assert alert in error.reason
    assert pair.failures == {failure: 1}
    if (name := NAMES.get(case)) is not None:
        assert f"alert {name}" in str(error)


NAMES = {
    "none": "certificate required",
    "revoked": "certificate revoked",
    "expired": "certificate expired",
    "untrusted": "unknown ca",
}
"""Alerts of RFC 8446, section 6: OpenSSL has these names for 116, 44, 45 and 48."""


def test_certificate_without_extended_key_usage_is_refused(auth: ClientAuth) -> None:
    """OpenSSL accepts it for every purpose."""
    pair = auth.connect(for_purposes(auth.ca, auth.folder))
    refused_after_the_handshake(pair, TlsFailure.CERTIFICATE_UNTRUSTED)


@pytest.mark.parametrize(
    "purpose", [ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, ExtendedKeyUsageOID.CODE_SIGNING]
)
def test_certificate_for_other_purposes_is_refused(auth: ClientAuth, purpose: x509.ObjectIdentifier) -> None:
    pair = auth.connect(for_purposes(auth.ca, auth.folder, purpose))
    refused(pair)
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}


# --- pins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin_of", [key_pin_of, certificate_pin])
def test_client_with_matching_pin_is_accepted(auth: ClientAuth, pin_of: Callable[[bytes], str]) -> None:
    identity = auth.identity
    auth.connect(identity, client_pins=frozenset({OTHER_PIN, pin_of(identity.der)})).agree()


def test_client_with_wrong_pin_is_refused_and_counted(auth: ClientAuth) -> None:
    pair = auth.connect(auth.identity, client_pins=frozenset({OTHER_PIN}))
    refused_after_the_handshake(pair, TlsFailure.PIN_MISMATCH)


def test_client_pins_are_checked_in_addition_to_ca(auth: ClientAuth) -> None:
    stranger = auth.certificate("untrusted")
    assert stranger is not None
    pair = auth.connect(stranger, client_pins=frozenset({key_pin_of(stranger.der)}))
    assert "UNKNOWN_CA" in refused(pair).reason
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}


def test_pins_do_not_require_optional_client_certificate(auth: ClientAuth) -> None:
    auth.connect(None, auth.asking("optional"), client_pins=frozenset({OTHER_PIN})).agree()


def test_client_pins_can_change_while_connections_are_open(auth: ClientAuth) -> None:
    identity = auth.identity
    first = auth.connect(identity, client_pins=frozenset({key_pin_of(identity.der)})).agree()
    first.acceptor.client_pins = frozenset({OTHER_PIN})
    auth.connect(identity, acceptor=first.acceptor).exchange()
    assert first.phase is TlsPhase.OPEN
    assert first.failures == {TlsFailure.PIN_MISMATCH: 1}


# --- contexts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "missing"), [("ca", "no CA certificate"), ("crl", "no certificate rev")])
@pytest.mark.parametrize("content", ["", "garbage", "the other"])
def test_file_without_certificate_or_crl_is_refused(
    auth: ClientAuth, option: str, missing: str, content: str
) -> None:
    data = content.encode()
    if content == "the other":
        data = revocation_list(auth.ca) if option == "ca" else auth.ca.cert_pem.bytes()
    path = auth.folder / "clients.pem"
    path.write_bytes(data)
    with pytest.raises(CertificateError, match=missing) as caught:
        auth.asking(**{option: path})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("option", ["ca", "crl"])
def test_missing_client_ca_file_is_named(auth: ClientAuth, option: str) -> None:
    with pytest.raises(CertificateError, match=r"gone\.pem: no .* could be read from it: No such file"):
        auth.asking(**{option: auth.folder / "gone.pem"})


def test_harmless_deviations_from_rfc_5280_are_accepted(auth: ClientAuth) -> None:
    """Non-critical basic constraints and no key ids, which OpenSSL's strict mode refuses."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    names = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("CA", "ada")]
    now = datetime.now(UTC)

    def issue(number: int) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(names[number])
            .issuer_name(names[0])
            .public_key(keys[number].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(not number, None), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(keys[0], hashes.SHA256())
        )

    form = serialization.Encoding.PEM
    identity = Identity(auth.folder / "ada.crt", auth.folder / "ada.key")
    identity.certificate.write_bytes(issue(1).public_bytes(form))
    identity.key.touch(0o600)
    identity.key.write_bytes(
        keys[1].private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = auth.asking(ca=issue(0).public_bytes(form))
    auth.connect(identity, context).agree()
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    strict = auth.connect(identity, context)
    refused(strict)
    assert strict.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}
