"""Tests of sessions opened by a client certificate over real TLS."""

from __future__ import annotations

import hashlib
import itertools
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.auth.helpers import directory
from tests.server import helpers
from tests.server.helpers import KEY, Client, ClosedError, Frame, ServerThread, eventually, identify
from zcproto.app.app import App, default_app
from zcproto.app.authentication import CallableAuthenticator
from zcproto.app.context import Context
from zcproto.auth import UserFile
from zcproto.auth.schemes import CertificateAuthenticator
from zcproto.certs import client_ca
from zcproto.certs.client_user import user_of
from zcproto.client.blocking import BlockingClient, connect_blocking
from zcproto.common.roles import OPERATORS
from zcproto.errors import Unauthenticated
from zcproto.tls.context import ClientTrust, SiteContexts, server_context

DAY = timedelta(days=1)
SAN_OID = x509.ObjectIdentifier("2.5.29.17")
UNAUTHENTICATED = 16
PEM = serialization.Encoding.PEM
numbers = itertools.count()


class ClientIdentity(NamedTuple):
    """The files of a certificate and its key."""

    certificate: Path
    key: Path


def application() -> App:
    app = default_app()

    @app.method("shown")
    def shown(context: Context) -> bytes | None:
        """Return the digest of the client's certificate."""
        data = context.peer_certificate()
        return None if data is None else hashlib.sha256(data).digest()

    return app


class CertificateServer:
    """A server that requests client certificates, with the users ada and root."""

    def __init__(self, home: Path, certs: Path, kind: str = "dns", **options: Any) -> None:
        home.mkdir(mode=0o700)
        users = UserFile(home / "users.toml")
        users.add("ada"), users.add("root", roles=OPERATORS)
        self.users = users
        self.refused: list[str] = []
        self.server = ServerThread(
            home,
            certs,
            application(),
            authenticators=[
                CallableAuthenticator("api_key", identify),
                CertificateAuthenticator(
                    directory(users),
                    lambda certificate: user_of(certificate, kind, self.now()),
                    on_refused=lambda reason, address: self.refused.append(reason),
                ),
            ],
            **options,
        )
        self.certs = home / "certs"
        self.ca, self.crl = client_ca.ensure_authority(self.certs, datetime.now(UTC))

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.server.clock.wall() / 1000, UTC)

    def reload_trust(self, ca: Path | None = None, *, client_auth: Any = "optional") -> None:
        """Load the authority and the CRL from their files."""
        pair = self.certs / "server-ecdsa.crt", self.certs / "server-ecdsa.key"
        context = server_context(
            [pair],
            ["zcp/1"],
            clients=ClientTrust(ca or self.ca, None if ca else self.crl, client_auth == "required"),
        )
        acceptor = self.server.server.parts.acceptor

        def put() -> None:
            acceptor.contexts = SiteContexts(context)

        self.server.in_loop(put)

    def issue(self, name: str, now: datetime | None = None, **options: Any) -> ClientIdentity:
        issued = client_ca.issue_client(
            self.certs, name, lifetime=90 * DAY, now=now or datetime.now(UTC), **options
        )
        assert issued.key is not None
        return ClientIdentity(issued.certificate, issued.key)

    def client(self, shown: ClientIdentity | None = None) -> Client:
        """Connect with a client certificate, or without one."""
        ca_file = self.certs / "ca.crt"
        if shown is None:
            return Client(self.server.port, ca_file)
        context = helpers.client_context(ca_file)
        context.load_cert_chain(*shown)
        name = ca_file.with_name(f"context-{next(numbers)}")
        helpers.contexts[name] = context  # the client's cache of contexts
        try:
            return Client(self.server.port, name)
        finally:
            del helpers.contexts[name]

    def open(self, shown: ClientIdentity | None, **fields: Any) -> Client:
        """Connect and open a session by the certificate."""
        client = self.client(shown)
        client.opened = client.call("session.open", {"scheme": "tls", **fields})
        client.token = client.opened["token"]
        return client

    def library(self, shown: ClientIdentity, **options: Any) -> BlockingClient:
        """Return the client of the library."""
        return connect_blocking(
            f"localhost:{self.server.port}",
            ca_file=self.certs / "ca.crt",
            certificate=shown.certificate,
            certificate_key=shown.key,
            home=self.certs.parent,
            **options,
        )

    def turned_away(self, shown: ClientIdentity | None, **fields: Any) -> Frame:
        """Return the answer to a refused login."""
        with self.client(shown) as client:
            frame = client.refused("session.open", {"scheme": "tls", **fields})
            assert client.is_open()
            return frame

    def handshake_refused(self, shown: ClientIdentity | None) -> str:
        """Return the name of the alert for a handshake refused because of the certificate."""
        with pytest.raises(ssl.SSLError) as caught:
            self.client(shown)
        return str(caught.value.reason)


@pytest.fixture
def harness(tmp_path: Path, certs: Path) -> Iterator[CertificateServer]:
    harness = CertificateServer(tmp_path / "home", certs)
    with harness.server:
        harness.reload_trust()
        yield harness


# --- let in ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"user": "ada"}, {"client": "zc/1"}])
def test_client_certificate_opens_a_session_of_its_user(
    harness: CertificateServer, fields: dict[str, str]
) -> None:
    with harness.open(harness.issue("ada"), **fields) as client:
        assert client.opened["user"] == "ada"
        client.echo()
        info = client.call("session.info")
        assert (info["user"], info["client"]) == ("ada", fields.get("client", ""))
        assert client.refused("server.stats").code == 7
    assert harness.refused == []


def test_operator_by_certificate_comes_from_the_users_file(harness: CertificateServer) -> None:
    with harness.open(harness.issue("root")) as client:
        assert client.call("server.stats")["sessions"] == 1


def test_certificate_from_a_signing_request_opens_a_session(
    harness: CertificateServer, tmp_path: Path
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    issued = client_ca.issue_client(
        harness.certs, "ada", lifetime=DAY, now=datetime.now(UTC), csr=request.public_bytes(PEM)
    )
    with harness.open(ClientIdentity(issued.certificate, write_key(tmp_path / "device.key", key))) as client:
        client.echo()


def test_context_has_the_client_certificate(harness: CertificateServer) -> None:
    shown = harness.issue("ada")
    with harness.open(shown) as client:
        der = ssl.PEM_cert_to_DER_cert(shown.certificate.read_text())
        assert client.call("shown") == hashlib.sha256(der).digest()
        with harness.client() as other:
            other.open_session("bob")
            assert other.call("shown") is None


def test_session_is_bound_to_the_certificate_key(harness: CertificateServer, tmp_path: Path) -> None:
    keys = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("first", "second")}

    def issue(key: str) -> ClientIdentity:
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        csr = builder.sign(keys[key], hashes.SHA256()).public_bytes(PEM)
        issued = client_ca.issue_client(
            harness.certs, "ada", lifetime=DAY, now=datetime.now(UTC), csr=csr, renew=True
        )
        path = tmp_path / f"{key}-{next(numbers)}.crt"
        path.write_bytes(issued.certificate.read_bytes())
        return ClientIdentity(path, write_key(tmp_path / f"{key}-{next(numbers)}.key", keys[key]))

    with harness.open(issue("first")) as client:
        assert client.opened["bound"] is True
        assert client.call("session.info")["bound"] is True
        client.echo()
        with harness.client(issue("first")) as renewed:  # another certificate, the same key
            renewed.token = client.token
            renewed.echo()
        for shown in (None, issue("second")):
            with harness.client(shown) as other:
                for method in ("echo", "session.info", "session.attach", "session.close", "server.info"):
                    frame = other.refused(method, {"signature": bytes(64)}, token=client.token)
                    assert (frame.code, frame.details) == (UNAUTHENTICATED, {"certificate": True})
                assert "certificate" in frame.message
        client.echo()


def test_refreshed_session_stays_bound_to_the_certificate(harness: CertificateServer) -> None:
    shown = harness.issue("ada")
    with harness.open(shown) as client, harness.client() as thief, harness.client(shown) as renewed:
        params = {"refresh_token": client.opened["refresh_token"]}
        frame = thief.refused("session.refresh", params)
        assert (frame.code, frame.details) == (UNAUTHENTICATED, {"certificate": True})
        client.echo()  # the refresh token is not spent
        refreshed = renewed.call("session.refresh", params)
        assert refreshed["bound"] is True
        renewed.token = refreshed["token"]
        renewed.echo()
        assert thief.refused("echo", token=refreshed["token"]).details == {"certificate": True}
        # A spent one used by another client ends the session.
        assert thief.refused("session.refresh", {**params, "client": "thief/1"}).code == 69  # TOKEN_REVOKED
        assert renewed.refused("echo").code == 69


def test_certificate_bound_session_cannot_be_attached(harness: CertificateServer) -> None:
    with harness.open(harness.issue("ada")) as client:
        frame = client.refused("session.attach", {"signature": bytes(64)})
        assert frame.code == 9  # FAILED_PRECONDITION


def test_client_with_certificate_may_use_an_api_key(harness: CertificateServer) -> None:
    with harness.client(harness.issue("ada")) as client:
        client.open_session("bob")
        assert client.opened["user"] == "bob"


@pytest.mark.parametrize(
    ("options", "user"), [({}, "ada"), ({"user": "ada"}, "ada"), ({"user": "bob", "key": KEY}, "bob")]
)
def test_client_library_opens_session_by_certificate(
    harness: CertificateServer, options: dict[str, str], user: str
) -> None:
    with harness.library(harness.issue("ada"), **options) as client:
        assert client.session.user == user
        assert client.call("echo", word="hello") == {"word": "hello"}
        assert client.call("shown") is not None


def test_client_library_reports_certificate_of_another_user(harness: CertificateServer) -> None:
    with pytest.raises(Unauthenticated), harness.library(harness.issue("ada"), user="root"):
        pass


# --- turned away -----------------------------------------------------------------------------------------


def test_certificate_refusals_share_one_answer_and_log_the_cause(harness: CertificateServer) -> None:
    frames = [
        harness.turned_away(None),
        harness.turned_away(None, user="ada"),
        harness.turned_away(harness.issue("stranger")),
        harness.turned_away(harness.issue("ada"), user="root"),
        harness.turned_away(harness.issue("ada", renew=True), user="stranger"),
    ]
    assert {frame.code for frame in frames} == {UNAUTHENTICATED}
    assert len({frame.body for frame in frames}) == 1
    assert harness.refused == [
        "the client sent no certificate",
        "the client sent no certificate",
        "the client's certificate names 'stranger', who is not a user here",
        "the client's certificate names 'ada', but the client expects another user",
        "the client's certificate names 'ada', but the client expects another user",
    ]


def test_client_without_certificate_may_call_public_methods(harness: CertificateServer) -> None:
    with harness.client() as client:
        assert client.call("server.info")["versions"] == [1]
        assert client.refused("echo").code == UNAUTHENTICATED


def test_removed_user_cannot_log_in_by_certificate(harness: CertificateServer) -> None:
    shown = harness.issue("ada")
    with harness.open(shown):
        pass
    harness.users.path.write_text("")
    assert harness.turned_away(shown).code == UNAUTHENTICATED
    harness.users.load()
    harness.users.add("ada")
    with harness.open(shown) as client:
        client.echo()


@pytest.mark.parametrize(
    "fields", [{"key": KEY}, {"device": "d"}, {"user": ""}, {"user": 5}, {"user": b"ada"}]
)
def test_extra_fields_of_a_certificate_login_are_refused(
    harness: CertificateServer, fields: dict[str, Any]
) -> None:
    with harness.client(harness.issue("ada")) as client:
        assert client.refused("session.open", {"scheme": "tls", **fields}).code == 3


@pytest.mark.usefixtures("long_login_delay")
def test_logins_without_certificate_are_throttled_separately(tmp_path: Path, certs: Path) -> None:
    harness = CertificateServer(tmp_path / "home", certs, limits__login_failures=2)
    with harness.server:
        harness.reload_trust()
        shown = harness.issue("ada")
        with harness.open(shown):
            pass
        assert [harness.turned_away(None).code for _ in range(3)] == [UNAUTHENTICATED, UNAUTHENTICATED, 8]
        with harness.open(shown) as client:
            client.echo()


# --- revoked and expired ---------------------------------------------------------------------------------


def test_revoked_client_certificate_is_refused_by_crl(harness: CertificateServer) -> None:
    ada, root = harness.issue("ada"), harness.issue("root")
    with harness.open(ada) as before:
        client_ca.revoke_client(harness.certs, name="ada", now=datetime.now(UTC), reason="keyCompromise")
        harness.reload_trust()
        assert harness.handshake_refused(ada) == "SSLV3_ALERT_CERTIFICATE_REVOKED"
        before.echo()  # existing connections continue until their session is revoked
        before.call("session.revoke", {"all": True})
    with harness.open(root) as client:
        client.echo()
    with harness.open(harness.issue("ada")) as client:  # a new certificate with a new key
        client.echo()


def test_expired_client_certificate_is_refused(harness: CertificateServer) -> None:
    shown = harness.issue("ada", datetime.now(UTC) - 91 * DAY)
    harness.reload_trust()
    assert harness.handshake_refused(shown) == "SSLV3_ALERT_CERTIFICATE_EXPIRED"


def test_certificate_expiring_while_connected_opens_no_session(harness: CertificateServer) -> None:
    with harness.client(harness.issue("ada")) as client:
        client.call("session.open", {"scheme": "tls"})
        harness.server.clock.ahead_ms = 91 * 86_400_000
        frame = client.frame(
            helpers.REQUEST,
            helpers.msgpack.packb(["session.open", {"scheme": "tls"}]),
            timestamp=harness.server.clock.wall(),
        )
        client.send(frame)
        assert client.answer().code == UNAUTHENTICATED
    assert "expired" in harness.refused[-1]


def test_expired_crl_refuses_client_certificates(harness: CertificateServer) -> None:
    """The CRL is therefore signed a year ahead."""
    shown = harness.issue("ada")
    long_ago = datetime.now(UTC) - 366 * DAY
    harness.crl.unlink()
    client_ca.refresh_crl(harness.certs, long_ago)
    harness.reload_trust()
    assert "ALERT" in harness.handshake_refused(shown)
    client_ca.refresh_crl(harness.certs, datetime.now(UTC))
    harness.reload_trust()
    with harness.open(shown) as client:
        client.echo()


def test_server_certificate_is_refused_as_client(harness: CertificateServer) -> None:
    leaked = ClientIdentity(harness.certs / "server-ecdsa.crt", harness.certs / "server-ecdsa.key")
    assert harness.handshake_refused(leaked) == "TLSV1_ALERT_UNKNOWN_CA"


def test_required_client_certificate_refuses_others(harness: CertificateServer) -> None:
    harness.reload_trust(client_auth="required")
    assert harness.handshake_refused(None) == "TLSV13_ALERT_CERTIFICATE_REQUIRED"
    with harness.open(harness.issue("ada")) as client:
        client.echo()


# --- certificates of another authority -------------------------------------------------------------------


class FakeAuthority:
    """An authority that signs certificates with arbitrary names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        authority = trustme.CA(key_type=trustme.KeyType.ECDSA)
        self.path = folder / "clients.pem"
        authority.cert_pem.write_to_path(self.path)
        self._certificate = x509.load_pem_x509_certificate(authority.cert_pem.bytes())
        key = serialization.load_pem_private_key(authority.private_key_pem.bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key

    def __call__(self, *names: x509.ExtensionType) -> ClientIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "ada")]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        )
        for name in names:
            builder = builder.add_extension(name, critical=False)
        path = self.folder / f"{next(numbers)}.crt"
        path.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(PEM))
        return ClientIdentity(path, write_key(path.with_suffix(".key"), key))


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> Path:
    path.touch(0o600)
    form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path.write_bytes(key.private_bytes(PEM, form, encryption))
    return path


def san(*entries: x509.GeneralName) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(entries)


def raw_dns(*values: bytes) -> x509.UnrecognizedExtension:
    """Return DNS names of arbitrary bytes, as a careless authority might sign them."""
    entries = b"".join(bytes([0x82, len(value)]) + value for value in values)
    return x509.UnrecognizedExtension(SAN_OID, bytes([0x30, len(entries)]) + entries)


Open = Callable[[str], tuple[CertificateServer, FakeAuthority]]


@pytest.fixture
def foreign(tmp_path: Path, certs: Path) -> Iterator[Open]:
    """Start a server that trusts another authority and uses one name type."""
    gates: list[CertificateServer] = []

    def start(kind: str) -> tuple[CertificateServer, FakeAuthority]:
        harness = CertificateServer(tmp_path / "home", certs, kind)
        gates.append(harness)
        harness.server.start()
        maker = FakeAuthority(tmp_path)
        harness.reload_trust(maker.path)
        return harness, maker

    yield start
    for harness in gates:
        harness.server.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("kind", "entry", "user"),
    [
        ("dns", x509.DNSName("agent-7.example"), "agent-7.example"),
        ("email", x509.RFC822Name("Ada@Example.org"), "Ada@example.org"),
        ("uri", x509.UniformResourceIdentifier("spiffe://example.org/ada"), "spiffe://example.org/ada"),
    ],
)
def test_configured_name_type_gives_the_user(
    foreign: Open, kind: str, entry: x509.GeneralName, user: str
) -> None:
    harness, maker = foreign(kind)
    harness.users.add(user)
    others = [x509.DNSName("root"), x509.RFC822Name("root@a.b"), x509.UniformResourceIdentifier("urn:root:1")]
    mixed = [entry, *(other for other in others if type(other) is not type(entry))]
    for entries in ([entry], mixed):
        with harness.open(maker(san(*entries))) as client:
            assert client.opened["user"] == user


def test_other_name_types_give_no_user(foreign: Open) -> None:
    harness, maker = foreign("dns")
    harness.users.add("ada@example.org")
    hostile = [
        (),  # the subject is ada
        (san(x509.RFC822Name("ada@example.org")),),
        (san(x509.UniformResourceIdentifier("urn:user:ada")),),
        (san(x509.DNSName("ada"), x509.DNSName("root")),),
        (san(x509.DNSName("ada"), x509.DNSName("ada")),),
        (san(x509.DNSName("*")),),
        (raw_dns(b""),),
        (raw_dns(b"ada\0"),),
        (raw_dns(b"ada\0.example.org"),),
        (raw_dns(b" ada"),),
        (raw_dns(b"ada\r\nroot"),),
        (raw_dns("\u0430da".encode()),),
        (raw_dns(b"ada", b"root"),),
    ]
    answers = {harness.turned_away(maker(*names)).body for names in hostile}
    assert len(answers) == 1
    assert len(harness.refused) == len(hostile)
    assert all(reason.isprintable() and "root" not in reason for reason in harness.refused)


def test_unparsable_client_certificate_is_refused(foreign: Open) -> None:
    harness, maker = foreign("dns")
    for garbage in (b"", b"\x30", b"\x04\x00", b"\xff" * 40):
        shown = maker(x509.UnrecognizedExtension(SAN_OID, garbage))  # OpenSSL refuses it
        assert "ALERT" in harness.handshake_refused(shown)
    with pytest.raises(ClosedError):  # OpenSSL accepts it
        harness.open(maker(raw_dns(b"\xff\xfe\xfd")))
    with harness.open(maker(san(x509.DNSName("ada")))) as client:
        client.echo()
    eventually(lambda: harness.server.leftovers()["connections"] == 0)
