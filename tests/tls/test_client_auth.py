"""Clients with certificates: who is let in, what the others are told, and what is counted."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme
from cryptography import x509

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.identities import DAY, Identity, for_clients, for_servers_only, revocation_list, write_identity
from tests.tls.support import TlsPair
from zcproto.errors import CertificateError
from zcproto.tls.context import ClientAuth, client_context, server_context
from zcproto.tls.failure import TlsFailure
from zcproto.tls.pins import certificate_pin, key_pin
from zcproto.tls.transport import Phase

OTHER_PIN = "sha256/" + "A" * 43 + "="


@pytest.fixture(scope="module")
def client_ca() -> trustme.CA:
    """The authority of the clients, which is not the servers'."""
    return trustme.CA(organization_name="clients", key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="module")
def ada(client_ca: trustme.CA) -> trustme.LeafCert:
    return for_clients(client_ca)


@pytest.fixture
def identity(ada: trustme.LeafCert, tmp_path: Path) -> Identity:
    return write_identity(tmp_path, ada)


Asking = Callable[..., ssl.SSLContext]


@pytest.fixture
def asking(server_pairs: ServerPairs, client_ca: trustme.CA) -> Asking:
    """A server's context that asks for certificates."""

    def make(client_auth: ClientAuth = "required", **options: Any) -> ssl.SSLContext:
        options.setdefault("client_ca", client_ca.cert_pem.bytes())
        return server_context([server_pairs.ecdsa], ["zcp/1"], client_auth=client_auth, **options)

    return make


@pytest.fixture
def showing(ca_file: Path) -> Callable[[Identity | None], ssl.SSLContext]:
    """A client's context that shows a certificate, or none."""

    def make(identity: Identity | None) -> ssl.SSLContext:
        if identity is None:
            return client_context(ca_file=ca_file)
        return client_context(ca_file=ca_file, certificate=identity.certificate, key=identity.key)

    return make


def refused(pair: TlsPair) -> ssl.SSLError:
    """Carry the handshake to its end, which is a refusal; what the client reads of it."""
    pair.raw.deliver(pair.step())
    pair.hear()
    pair.raw.deliver(pair.step())
    assert pair.phase is Phase.CLOSING
    assert pair.above.told == []
    assert pair.log[-1] == "slot free"
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.acceptor.handshakes_completed == 0
    return pair.refusal()


# --- let in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client_auth", ["optional", "required"])
def test_a_client_with_a_good_certificate_is_let_in_and_the_certificate_can_be_had(
    client_auth: ClientAuth, asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(client_auth), showing(identity)).agree()
    assert pair.server.peer_certificate() == identity.der
    assert pair.failures == {}
    pair.say(b"hello")
    assert pair.above.received == b"hello"


@pytest.mark.parametrize("client_auth", ["off", "optional"])
def test_a_client_without_a_certificate_is_let_in_where_none_is_required(
    client_auth: ClientAuth, asking: Asking, showing: Any, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(client_auth), showing(None)).agree()
    assert pair.server.peer_certificate() is None


def test_a_server_that_does_not_ask_is_shown_nothing(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking("off", client_ca=None), showing(identity)).agree()
    assert pair.server.peer_certificate() is None


def test_before_and_after_the_connection_there_is_no_certificate(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity))
    assert pair.server.peer_certificate() is None
    pair.agree()
    pair.raw.lose()
    assert pair.server.peer_certificate() is None


def test_what_is_above_can_read_the_certificate_when_it_begins(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity))
    seen: list[bytes | None] = []
    pair.above._then = {"made": lambda above: seen.append(above.transport.peer_certificate())}
    pair.agree()
    assert seen == [identity.der]


def test_the_authority_may_be_a_file(
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
    TlsPair(timers, asking(client_ca=file, client_crl=crl), showing(identity)).agree()


def test_an_issuing_authority_is_trusted_without_its_root_and_without_its_sisters(
    asking: Asking, showing: Any, client_ca: trustme.CA, tmp_path: Path, timers: FakeTimers
) -> None:
    issuing, sister = client_ca.create_child_ca(), client_ca.create_child_ca()
    context = asking(client_ca=issuing.cert_pem.bytes())
    ours = write_identity(tmp_path, issuing.issue_cert("ada@example.org"), "ours")
    TlsPair(timers, context, showing(ours)).agree()
    theirs = write_identity(tmp_path, sister.issue_cert("ada@example.org"), "theirs")
    pair = TlsPair(timers, context, showing(theirs))
    assert "UNKNOWN_CA" in refused(pair).reason


def test_a_chain_that_the_client_sends_leads_to_the_root(
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
def test_each_refusal_has_its_cause_and_its_alert(
    case: str,
    failure: TlsFailure,
    alert: str,
    client_auth: ClientAuth,
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    context = asking(client_auth, client_crl=list_of(case, client_ca, ada))
    pair = TlsPair(timers, context, showing(certificate_of(case, client_ca, ada, tmp_path)))
    assert alert in refused(pair).reason
    assert pair.failures == {failure: 1}


@pytest.mark.parametrize(
    ("number", "case"), [(116, "none"), (44, "revoked"), (45, "expired"), (48, "untrusted")]
)
def test_the_alerts_are_those_of_the_standard(
    number: int,
    case: str,
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    """RFC 8446 section 6, by the number that OpenSSL puts into its own error (SSL_AD_REASON_OFFSET)."""
    context = asking(client_crl=list_of(case, client_ca, ada))
    pair = TlsPair(timers, context, showing(certificate_of(case, client_ca, ada, tmp_path)))
    words = str(refused(pair))
    names = {
        116: "certificate required",
        44: "certificate revoked",
        45: "certificate expired",
        48: "unknown ca",
    }
    assert f"alert {names[number]}" in words


def test_a_list_that_does_not_name_the_client_lets_it_in(
    asking: Asking, showing: Any, client_ca: trustme.CA, identity: Identity, timers: FakeTimers
) -> None:
    context = asking(client_crl=revocation_list(client_ca, for_clients(client_ca, "eve@example.org")))
    TlsPair(timers, context, showing(identity)).agree()


# --- pins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pin_of", [key_pin, certificate_pin])
def test_a_pinned_client_is_let_in(
    pin_of: Callable[[bytes], str], asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pins = frozenset({OTHER_PIN, pin_of(identity.der)})
    TlsPair(timers, asking(), showing(identity), client_pins=pins).agree()


def test_a_client_with_another_pin_is_refused_before_a_byte_and_counted(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, asking(), showing(identity), client_pins=frozenset({OTHER_PIN}))
    pair.raw.deliver(pair.step())
    pair.hear()
    pair.raw.deliver(pair.step() + pair.sealed(b"at once"))
    assert pair.above.told == []
    assert pair.above.received == b""
    assert pair.failures == {TlsFailure.PIN_MISMATCH: 1}
    assert pair.acceptor.handshakes_completed == 0
    assert pair.acceptor.handshakes_in_progress == 0
    assert pair.client_saw_close_notify()


def test_pins_are_on_top_of_the_authority(
    asking: Asking,
    showing: Any,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    timers: FakeTimers,
) -> None:
    stranger = certificate_of("untrusted", client_ca, ada, tmp_path)
    assert stranger is not None
    pins = frozenset({key_pin(stranger.der)})
    pair = TlsPair(timers, asking(), showing(stranger), client_pins=pins)
    assert "UNKNOWN_CA" in refused(pair).reason
    assert pair.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}


def test_pins_ask_nothing_of_a_client_that_may_be_without_a_certificate(
    asking: Asking, showing: Any, timers: FakeTimers
) -> None:
    TlsPair(timers, asking("optional"), showing(None), client_pins=frozenset({OTHER_PIN})).agree()


def test_pins_may_change_while_connections_stand(
    asking: Asking, showing: Any, identity: Identity, timers: FakeTimers
) -> None:
    first = TlsPair(
        timers, asking(), showing(identity), client_pins=frozenset({key_pin(identity.der)})
    ).agree()
    first.acceptor.client_pins = frozenset({OTHER_PIN})
    second = TlsPair(timers, asking(), showing(identity), acceptor=first.acceptor)
    second.raw.deliver(second.step())
    second.hear()
    second.raw.deliver(second.step())
    assert first.phase is Phase.OPEN
    assert first.failures == {TlsFailure.PIN_MISMATCH: 1}


# --- contexts -----------------------------------------------------------------------------------------


def test_to_ask_needs_an_authority(asking: Asking) -> None:
    with pytest.raises(CertificateError, match="without their CA"):
        asking(client_ca=None)


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize(
    ("option", "missing"), [("client_ca", "no CA certificate"), ("client_crl", "no certificate rev")]
)
@pytest.mark.parametrize("content", ["", "garbage", "the other"])
def test_what_holds_something_else_is_refused_and_named(
    option: str,
    missing: str,
    content: str,
    as_file: bool,
    asking: Asking,
    client_ca: trustme.CA,
    tmp_path: Path,
) -> None:
    data = content.encode()
    if content == "the other":
        data = revocation_list(client_ca) if option == "client_ca" else client_ca.cert_pem.bytes()
    path = tmp_path / "clients.pem"
    path.write_bytes(data)
    with pytest.raises(CertificateError, match=missing) as caught:
        asking(**{option: path if as_file else data})
    assert str(path if as_file else "the PEM given") in str(caught.value)


@pytest.mark.parametrize("option", ["client_ca", "client_crl"])
def test_a_file_that_is_not_there_is_named(option: str, asking: Asking, tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match=r"gone\.pem: no .* could be read from it: No such file"):
        asking(**{option: tmp_path / "gone.pem"})


def test_no_file_of_what_was_given_as_bytes_stays(
    asking: Asking, client_ca: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    asking(client_crl=revocation_list(client_ca))
    assert list(tmp_path.iterdir()) == []


def test_certificates_of_companies_are_taken_though_they_are_not_as_rfc_5280_would_have_them(
    asking: Asking, showing: Any, tmp_path: Path, timers: FakeTimers
) -> None:
    """Basic constraints that are not critical, no key ids: what OpenSSL calls strict would refuse it."""
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
            .sign(keys[0], hashes.SHA256())
        )

    form = serialization.Encoding.PEM
    identity = Identity(tmp_path / "ada.crt", tmp_path / "ada.key")
    identity.certificate.write_bytes(issue(1).public_bytes(form))
    identity.key.touch(0o600)
    identity.key.write_bytes(
        keys[1].private_bytes(form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = asking(client_ca=issue(0).public_bytes(form))
    TlsPair(timers, context, showing(identity)).agree()
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    strict = TlsPair(timers, context, showing(identity))
    refused(strict)
    assert strict.failures == {TlsFailure.CERTIFICATE_UNTRUSTED: 1}
