"""Test client certificates: acceptance, alerts and counters of refusals."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509
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


@pytest.fixture(scope="module")
def client_ca() -> trustme.CA:
    """The CA of the clients, which is not that of the servers."""
    return trustme.CA(organization_name="clients", key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="module")
def ada(client_ca: trustme.CA) -> trustme.LeafCert:
    return for_clients(client_ca)


@pytest.fixture
def identity(ada: trustme.LeafCert, tmp_path: Path) -> Identity:
    return write_identity(tmp_path, ada)


Asking = Callable[..., ssl.SSLContext]


@pytest.fixture
def asking(server_pairs: ServerPairs, client_ca: trustme.CA, tmp_path: Path) -> Asking:
    """Return a server context that requests client certificates."""

    def make(client_auth: str = "required", **options: Any) -> ssl.SSLContext:
        options.setdefault("ca", client_ca.cert_pem.bytes())
        trust = client_trust(tmp_path, **options, is_required=client_auth == "required")
        clients = None if client_auth == "off" else trust
        return server_context([server_pairs.ecdsa], ["zcp/1"], clients=clients)

    return make


@pytest.fixture
def showing(ca_file: Path) -> Callable[[Identity | None], ssl.SSLContext]:
    """Return a client context with a certificate, or without."""

    def make(identity: Identity | None) -> ssl.SSLContext:
        if identity is None:
            return client_context(ca_file=ca_file)
        return client_context(ca_file=ca_file, certificate=identity.certificate, key=identity.key)

    return make


def refused(pair: TlsPair) -> ssl.SSLError:
    """Run the handshake to its refusal. Return the error of the client."""
    pair.exchange()
    assert pair.phase is TlsPhase.CLOSING
    assert pair.protocol.calls == []
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.handshakes_completed == 0
    return pair.refusal()


# --- accepted -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_auth", ["optional", "required"])
def test_valid_client_certificate_is_accepted_and_readable(
    client_auth: str, asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(client_auth), showing(identity)).agree()
    assert pair.server.peer_certificate() == identity.der
    assert pair.failures == {}
    pair.say(b"hello")
    assert pair.protocol.received == b"hello"


@pytest.mark.parametrize("client_auth", ["off", "optional"])
def test_optional_client_auth_accepts_client_without_certificate(
    client_auth: str, asking: Asking, showing: Any, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(client_auth), showing(None)).agree()
    assert pair.server.peer_certificate() is None


def test_client_certificate_is_not_sent_unless_requested(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking("off"), showing(identity)).agree()
    assert pair.server.peer_certificate() is None


def test_no_peer_certificate_before_and_after_connection(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity))
    assert pair.server.peer_certificate() is None
    pair.agree()
    pair.raw.lose()
    assert pair.server.peer_certificate() is None


def test_certificate_is_readable_in_connection_made(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity))
    seen: list[bytes | None] = []
    pair.protocol.actions = {"made": lambda protocol: seen.append(protocol.transport.peer_certificate())}
    pair.agree()
    assert seen == [identity.der]


def test_client_ca_may_be_a_file(
    asking: Asking,
    showing: Any,
    identity: Identity,
    client_ca: trustme.CA,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    file, crl = tmp_path / "clients.pem", tmp_path / "clients.crl"
    client_ca.cert_pem.write_to_path(file)
    crl.write_bytes(revocation_list(client_ca))
    TlsPair(timers, asking(ca=file, crl=crl), showing(identity)).agree()


def test_intermediate_ca_is_trusted_without_root_or_siblings(
    asking: Asking, showing: Any, client_ca: trustme.CA, tmp_path: Path, timers: FakeTimers
) -> None:
    issuing, sister = client_ca.create_child_ca(), client_ca.create_child_ca()
    context = asking(ca=issuing.cert_pem.bytes())
    ours = write_identity(tmp_path, issuing.issue_cert("ada@example.org"), "ours")
    TlsPair(timers, context, showing(ours)).agree()
    theirs = write_identity(tmp_path, sister.issue_cert("ada@example.org"), "theirs")
    pair = TlsPair(timers, context, showing(theirs))
    assert "UNKNOWN_CA" in refused(pair).reason


def test_client_chain_to_root_is_accepted(
    asking: Asking, showing: Any, client_ca: trustme.CA, tmp_path: Path, timers: FakeTimers
) -> None:
    leaf = client_ca.create_child_ca().issue_cert("ada@example.org")
    identity = write_identity(tmp_path, leaf)
    pair = TlsPair(timers, asking(), showing(identity)).agree()
    assert pair.server.peer_certificate() == identity.der


# --- refused ------------------------------------------------------------------------------------------


def certificate_of(case: str, client_ca: trustme.CA, ada: trustme.LeafCert, folder: Path) -> Identity | None:
    now = datetime.now(UTC)
    match case:
        case "none":
            return None
        case "untrusted":
            leaf = for_clients(trustme.CA(key_type=trustme.KeyType.ECDSA))
        case "expired":
            leaf = for_clients(client_ca, not_after=now - DAY)
        case "not yet valid":
            leaf = for_clients(client_ca, not_before=now + DAY)
        case "purpose":
            return for_servers_only(client_ca, folder)
        case _:
            leaf = ada
    return write_identity(folder, leaf)


def list_of(case: str, client_ca: trustme.CA, ada: trustme.LeafCert) -> bytes | None:
    match case:
        case "revoked":
            return revocation_list(client_ca, ada)
        case "expired list":
            return revocation_list(client_ca, start=-2 * DAY, end=-DAY)
        case "list of tomorrow":
            return revocation_list(client_ca, start=DAY, end=2 * DAY)
        case "list of another":
            return revocation_list(trustme.CA(organization_name="x", key_type=trustme.KeyType.ECDSA))
        case "forged list":
            return revocation_list(client_ca, signer=trustme.CA(key_type=trustme.KeyType.ECDSA))
    return None


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
    case: str,
    failure: TlsFailure,
    alert: str,
    client_auth: str,
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    context = asking(client_auth, crl=list_of(case, client_ca, ada))
    pair = TlsPair(timers, context, showing(certificate_of(case, client_ca, ada, tmp_path)))
    assert alert in refused(pair).reason
    assert pair.failures == {failure: 1}


@pytest.mark.parametrize(
    ("number", "case"), [(116, "none"), (44, "revoked"), (45, "expired"), (48, "untrusted")]
)
def test_client_auth_alerts_match_rfc_8446(
    number: int,
    case: str,
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    """Compare with RFC 8446 section 6, by the number in OpenSSL's error (SSL_AD_REASON_OFFSET)."""
    context = asking(crl=list_of(case, client_ca, ada))
    pair = TlsPair(timers, context, showing(certificate_of(case, client_ca, ada, tmp_path)))
    words = str(refused(pair))
    names = {
        116: "certificate required",
        44: "certificate revoked",
        45: "certificate expired",
        48: "unknown ca",
    }
    assert f"alert {names[number]}" in words


def test_crl_without_the_client_accepts_it(
    asking: Asking, showing: Any, client_ca: trustme.CA, identity: Identity, timers: FakeTimers
) -> None:
    context = asking(crl=revocation_list(client_ca, for_clients(client_ca, "eve@example.org")))
    TlsPair(timers, context, showing(identity)).agree()


# --- pins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin_of", [key_pin_of, certificate_pin])
def test_client_with_matching_pin_is_accepted(
    pin_of: Callable[[bytes], str], asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pins = frozenset({OTHER_PIN, pin_of(identity.der)})
    TlsPair(timers, asking(), showing(identity), client_pins=pins).agree()


def test_certificate_without_extended_key_usage_is_refused(
    asking: Asking, showing: Any, client_ca: trustme.CA, tmp_path: Path, timers: FakeTimers
) -> None:
    """OpenSSL accepts it for every purpose."""
    pair = TlsPair(timers, asking(), showing(for_purposes(client_ca, tmp_path)))
    pair.exchange(b"at once")
    assert pair.protocol.calls == []
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}
    assert pair.acceptor.handshakes_completed == 0
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.client_saw_close_notify()


@pytest.mark.parametrize(
    "purposes",
    [
        [ExtendedKeyUsageOID.CLIENT_AUTH],
        [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
    ],
)
def test_certificate_with_client_auth_among_its_purposes_is_accepted(
    purposes: list[x509.ObjectIdentifier],
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    TlsPair(timers, asking(), showing(for_purposes(client_ca, tmp_path, *purposes))).agree()


@pytest.mark.parametrize(
    "purposes", [[ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE], [ExtendedKeyUsageOID.CODE_SIGNING]]
)
def test_certificate_for_other_purposes_is_refused(
    purposes: list[x509.ObjectIdentifier],
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    pair = TlsPair(timers, asking(), showing(for_purposes(client_ca, tmp_path, *purposes)))
    refused(pair)
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}


def test_client_with_wrong_pin_is_refused_and_counted(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity), client_pins=frozenset({OTHER_PIN}))
    pair.exchange(b"at once")
    assert pair.protocol.calls == []
    assert pair.protocol.received == b""
    assert pair.failures == {TlsFailure.PIN_MISMATCH: 1}
    assert pair.acceptor.handshakes_completed == 0
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.client_saw_close_notify()


def test_client_pins_are_checked_in_addition_to_ca(
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    stranger = certificate_of("untrusted", client_ca, ada, tmp_path)
    assert stranger is not None
    pins = frozenset({key_pin_of(stranger.der)})
    pair = TlsPair(timers, asking(), showing(stranger), client_pins=pins)
    assert "UNKNOWN_CA" in refused(pair).reason
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}


def test_pins_do_not_require_optional_client_certificate(
    asking: Asking, showing: Any, timers: FakeTimers
) -> None:
    TlsPair(timers, asking("optional"), showing(None), client_pins=frozenset({OTHER_PIN})).agree()


def test_client_pins_can_change_while_connections_are_open(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    first = TlsPair(
        timers, asking(), showing(identity), client_pins=frozenset({key_pin_of(identity.der)})
    ).agree()
    first.acceptor.client_pins = frozenset({OTHER_PIN})
    second = TlsPair(timers, asking(), showing(identity), acceptor=first.acceptor)
    second.exchange()
    assert first.phase is TlsPhase.OPEN
    assert first.failures == {TlsFailure.PIN_MISMATCH: 1}


# --- contexts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "missing"), [("ca", "no CA certificate"), ("crl", "no certificate rev")])
@pytest.mark.parametrize("content", ["", "garbage", "the other"])
def test_file_without_certificate_or_crl_is_refused(
    option: str,
    missing: str,
    content: str,
    asking: Asking,
    client_ca: trustme.CA,
    tmp_path: Path,
) -> None:
    data = content.encode()
    if content == "the other":
        data = revocation_list(client_ca) if option == "ca" else client_ca.cert_pem.bytes()
    path = tmp_path / "clients.pem"
    path.write_bytes(data)
    with pytest.raises(CertificateError, match=missing) as caught:
        asking(**{option: path})
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("option", ["ca", "crl"])
def test_missing_client_ca_file_is_named(option: str, asking: Asking, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"gone\.pem: no .* could be read from it: No such file"):
        asking(**{option: tmp_path / "gone.pem"})


def test_harmless_deviations_from_rfc_5280_are_accepted(
    asking: Asking, showing: Any, tmp_path: Path, timers: FakeTimers
) -> None:
    """Non-critical basic constraints and no key ids, which OpenSSL's strict mode refuses."""
    from datetime import timedelta

    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

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
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(not number, None), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .sign(keys[0], hashes.SHA256())
        )

    form = serialization.Encoding.PEM
    identity = Identity(tmp_path / "ada.crt", tmp_path / "ada.key")
    identity.certificate.write_bytes(issue(1).public_bytes(form))
    identity.key.touch(0o600)
    identity.key.write_bytes(
        keys[1].private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = asking(ca=issue(0).public_bytes(form))
    TlsPair(timers, context, showing(identity)).agree()
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    strict = TlsPair(timers, context, showing(identity))
    refused(strict)
    assert strict.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}
