"""Test a whole server whose certificates come from a CA, which checks its names by real connections."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509

from bench.server_process import free_port
from tests.admin.test_operations import done, post
from tests.certs.acme.fake_ca import DIRECTORY, FakeCa
from tests.server.conftest import Serve
from tests.server.helpers import TIMEOUT, ServerThread, eventually
from zcproto.alerts import AlertKind
from zcproto.certs.acme import orders
from zcproto.common.https import Response
from zcproto.tls.context import client_context

NAME = "a.example"
SETTINGS: dict[str, Any] = {
    "certificates__mode": "acme",
    "certificates__names": [NAME],
    "acme__directory": DIRECTORY,
    "acme__terms_agreed": True,
}

ServeAcme = Callable[..., ServerThread]


@pytest.fixture
def ca(monkeypatch: pytest.MonkeyPatch) -> FakeCa:
    made = FakeCa(lambda: datetime.now(UTC))

    async def fetch(context: ssl.SSLContext, *request: Any) -> Response:
        assert context.verify_mode is ssl.CERT_REQUIRED
        return await made.fetch(*request)

    monkeypatch.setattr(orders, "_fetch", fetch)
    return made


@pytest.fixture
def serve_acme(serve: Serve, ca: FakeCa) -> ServeAcme:
    def start(**settings: Any) -> ServerThread:
        ca.down = "not yet"
        server = serve(**(SETTINGS | settings))
        ca.check = checking(server)
        ca.down = ""
        return server

    return start


def checking(server: ServerThread) -> Callable[[str, str, str, str], str]:
    """Return what a CA does to check a name."""

    def check(kind: str, name: str, token: str, text: str) -> str:
        if kind == "http-01":
            http_server = server.server.parts.http
            port = http_server.redirect._sockets[0].getsockname()[1]
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
            connection.request("GET", f"/.well-known/acme-challenge/{token}", headers={"Host": name})
            answer = connection.getresponse()
            return "" if (answer.status, answer.read()) == (200, text.encode()) else "another text"
        certificate, rest = validate(server, name)
        extension = next(
            each for each in certificate.extensions if each.oid.dotted_string == "1.3.6.1.5.5.7.1.31"
        )
        assert isinstance(extension.value, x509.UnrecognizedExtension)
        digest = hashlib.sha256(text.encode()).digest()
        return "" if extension.value.value == b"\x04\x20" + digest and not rest else "another digest"

    return check


def validate(server: ServerThread, name: str) -> tuple[x509.Certificate, bytes]:
    """Return the certificate that a CA gets, and what it receives after the handshake."""
    context = client_context(verify=False, protocols=["acme-tls/1"])
    with server.tcp() as raw, context.wrap_socket(raw, server_hostname=name) as tls:
        der = tls.getpeercert(binary_form=True)
        assert der is not None
        return x509.load_der_x509_certificate(der), tls.recv(100)


def renew(server: ServerThread) -> dict[str, Any]:
    return done(server, "certificates/renew", {})


def issuer(server: ServerThread) -> str:
    """Return who has issued the certificate that a client gets."""
    context = client_context(verify=False)
    with server.tcp() as raw, context.wrap_socket(raw, server_hostname=NAME) as tls:
        der = tls.getpeercert(binary_form=True)
        tls.recv(1)
    assert der is not None
    return x509.load_der_x509_certificate(der).issuer.rfc4514_string()


@contextlib.contextmanager
def staying(server: ServerThread) -> Iterator[ssl.SSLSocket]:
    """A connection that must not notice anything."""
    context = client_context(ca_file=server.home / "certs" / "ca.crt")
    with server.tcp() as raw, context.wrap_socket(raw, server_hostname="localhost") as tls:
        tls.recv(65_536)  # WELCOME
        yield tls
        tls.settimeout(0.05)
        with pytest.raises(TimeoutError):
            tls.recv(1)  # neither closed nor sent anything


@pytest.mark.parametrize("challenge", ["tls-alpn-01", "http-01"])
def test_certificate_is_ordered_and_served(serve_acme: ServeAcme, ca: FakeCa, challenge: str) -> None:
    settings: dict[str, Any] = {"acme__challenge": challenge}
    if challenge == "http-01":
        settings["http__redirect_port"] = free_port()
    server = serve_acme(**settings)
    assert issuer(server).startswith("CN=zcproto own CA")
    pins = server.server.pins
    with staying(server):
        answer = renew(server)
        assert issuer(server) == "CN=Fake CA"
        assert server.server.pins == pins
        (certificate,) = answer["certificates"]
        assert certificate["names"] == [NAME]
        assert not certificate["new_key"]
        renew(server)
    listed = server.in_loop(server.server.parts.certificates.status)
    assert [one.source.value for one in listed] == ["acme", "authority"]
    assert server.server.ca_file is None
    if challenge == "tls-alpn-01":
        with pytest.raises(ssl.SSLError):  # no challenge is open
            validate(server, NAME)


def test_ca_is_asked_without_a_request(serve: Serve, ca: FakeCa) -> None:
    server = serve(**SETTINGS)
    eventually(lambda: issuer(server) == "CN=Fake CA")


def test_failed_order_is_reported_and_raises_an_alert(serve_acme: ServeAcme, ca: FakeCa) -> None:
    server = serve_acme()
    ca.check = lambda kind, name, token, text: "connection refused"
    answer = post(server, "certificates/renew", {})
    assert answer.status != 200
    assert "connection refused; the CA must reach server.port" in str(answer.body)
    alerts = server.server.parts.alerts
    server.until(lambda: AlertKind.CERTIFICATE_RENEWAL.value in str(alerts.report()["open"]))
    ca.check = checking(server)
    renew(server)
    server.until(lambda: alerts.report()["open"] == [])


def test_mode_can_be_changed_by_a_reload(serve: Serve, ca: FakeCa) -> None:
    server = serve(certificates__names=[NAME])
    ca.check = checking(server)
    with pytest.raises(ssl.SSLError):
        validate(server, NAME)
    server.reload(**SETTINGS)
    renew(server)
    assert issuer(server) == "CN=Fake CA"
    server.reload(certificates__mode="own")
    assert issuer(server).startswith("CN=zcproto own CA")
    answer = post(server, "certificates/renew", {})
    assert answer.status == 200


def test_server_ends_at_once_while_it_waits_for_the_ca(serve_acme: ServeAcme, ca: FakeCa) -> None:
    server = serve_acme(certificates__watch_interval="100ms")
    ca.polls_until_checked = 10_000
    source = server.server.parts.certificates.checker.acme
    server.in_loop(lambda: source.order_now({"ecdsa"}))
    eventually(lambda: ca.orders)
    server.drain()
    source.wait(TIMEOUT)
    assert source.visits.take_result() is None
    assert not source.visits.is_running
    assert ca.orders[0]["status"] == "pending"


def test_other_paths_of_the_port_without_tls_stay_as_they_are(serve_acme: ServeAcme) -> None:
    server = serve_acme(acme__challenge="http-01", http__redirect_port=free_port())
    http_side = server.server.parts.http
    port = http_side.redirect._sockets[0].getsockname()[1]
    for path, status in (("/.well-known/acme-challenge/unknown", 308), ("/", 308)):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
        connection.request("GET", path, headers={"Host": NAME})
        assert connection.getresponse().status == status
        connection.close()
