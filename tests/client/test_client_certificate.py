"""Client certificates over loopback: presented, refused with a reason, renewed while running."""

from __future__ import annotations

import asyncio
import logging
import os
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import trustme

from tests.client.conftest import Blocking, ConnectTo
from tests.server.conftest import Serve
from tests.server.helpers import ServerThread
from tests.tls.identities import (
    DAY,
    Identity,
    client_trust,
    for_clients,
    for_servers_only,
    locked,
    revocation_list,
    write_identity,
)
from zcproto import auth
from zcproto.app.authentication import CallableAuthenticator
from zcproto.client.client import connect
from zcproto.client.dial import LoopResources, Trust
from zcproto.client.options import ConnectOptions
from zcproto.errors import CertificateError, ConfigError, ConnectionClosed, TlsError
from zcproto.tls.context import SiteContexts, server_context


@pytest.fixture(scope="module")
def client_ca() -> trustme.CA:
    return trustme.CA(organization_name="clients", key_type=trustme.KeyType.ECDSA)


@pytest.fixture(scope="module")
def ada(client_ca: trustme.CA) -> trustme.LeafCert:
    return for_clients(client_ca)


@pytest.fixture
def identity(ada: trustme.LeafCert, tmp_path: Path) -> Identity:
    return write_identity(tmp_path, ada)


Asking = Callable[..., ServerThread]


@pytest.fixture
def asking(serve: Serve, client_ca: trustme.CA) -> Asking:
    """Return a factory of servers that request client certificates."""

    def start(**options: Any) -> ServerThread:
        server = serve()
        ask(server, **{"ca": client_ca.cert_pem.bytes(), **options})
        return server

    return start


def ask(server: ServerThread, **options: Any) -> None:
    """Make a running server request certificates."""
    certs = server.home / "certs"
    pair = certs / "server-ecdsa.crt", certs / "server-ecdsa.key"
    server.server.parts.acceptor.contexts = SiteContexts(
        server_context([pair], ["zcp/1"], clients=client_trust(server.home, **options))
    )


def failures(server: ServerThread) -> dict[str, int]:
    found: dict[str, int] = server.stats["tls_failures"]
    return found


# --- presented ----------------------------------------------------------------------------------------


async def test_client_certificate_is_accepted(
    asking: Asking, connect_to: ConnectTo, identity: Identity
) -> None:
    server = asking()
    async with connect_to(
        server, certificate=identity.certificate, certificate_key=str(identity.key)
    ) as client:
        assert await client.call("echo", x=1) == {"x": 1}

        def shown() -> bytes | None:
            (connection,) = server.server.state.connections
            return connection.peer_certificate()

        assert server.in_loop(shown) == identity.der
    assert failures(server) == {}


def test_blocking_client_accepts_a_certificate(
    asking: Asking, identity: Identity, blocking: Blocking
) -> None:
    server = asking()
    with blocking(
        server,
        certificate=str(identity.certificate),
        certificate_key=locked(identity.key, b"hunter2"),
        certificate_passphrase=lambda: "hunter2",
    ) as client:
        assert client.call("echo", x=1) == {"x": 1}


async def test_certificate_is_not_sent_unless_requested(
    serve: Serve, connect_to: ConnectTo, identity: Identity
) -> None:
    async with connect_to(serve(), certificate=identity.certificate, certificate_key=identity.key) as client:
        assert await client.call("echo", x=1) == {"x": 1}


async def test_certificate_is_sent_to_a_pinned_server(
    asking: Asking, connect_to: ConnectTo, identity: Identity
) -> None:
    server = asking()
    trust: dict[str, Any] = {"pins": server.server.pins, "ca_file": None}
    async with connect_to(
        server, certificate=identity.certificate, certificate_key=identity.key, **trust
    ) as client:
        assert await client.call("echo", x=1) == {"x": 1}


async def test_certificate_is_not_sent_to_a_server_with_wrong_pin(
    asking: Asking, connect_to: ConnectTo, identity: Identity
) -> None:
    server = asking()
    pins = [f"sha256/{letter * 43}=" for letter in "AE"]
    with pytest.raises(TlsError) as caught:
        await connect_to(server, pins=pins, certificate=identity.certificate, certificate_key=identity.key)
    assert caught.value.failure == "pin_mismatch"
    server.until(lambda: server.server.parts.acceptor.handshakes_in_progress == 0)
    assert failures(server) == {"disconnected": 1}


@pytest.mark.parametrize("user", [None, "ada"])
async def test_certificate_opens_the_session_without_a_key(
    serve: Serve, connect_to: ConnectTo, client_ca: trustme.CA, identity: Identity, user: str | None
) -> None:
    request: list[dict[str, Any]] = []

    def identify(**fields: Any) -> auth.Identity:
        request.append(fields)
        return auth.Identity("ada")

    server = serve(authenticators=[CallableAuthenticator("tls", identify)])
    ask(server, ca=client_ca.cert_pem.bytes())
    shown: dict[str, Any] = {
        "key": None,
        "certificate": identity.certificate,
        "certificate_key": identity.key,
    }
    async with connect_to(server, user, **shown) as client:
        assert client.session is not None
    assert [params.get("user") for params in request] == [user]
    async with connect_to(server, user, **shown, session=False) as client:
        assert client.session is None


# --- refused ------------------------------------------------------------------------------------------


def shown_in(case: str, client_ca: trustme.CA, ada: trustme.LeafCert, folder: Path) -> dict[str, Any]:
    """Return the certificate options of a case."""
    now = datetime.now(UTC)
    match case:
        case "none":
            return {}
        case "purpose":
            identity = for_servers_only(client_ca, folder)
        case "untrusted":
            stranger = trustme.CA(key_type=trustme.KeyType.ECDSA)
            identity = write_identity(folder, for_clients(stranger), "shown")
        case "expired":
            identity = write_identity(folder, for_clients(client_ca, not_after=now - DAY), "shown")
        case "not yet valid":
            identity = write_identity(folder, for_clients(client_ca, not_before=now + DAY), "shown")
        case _:
            identity = write_identity(folder, ada, "shown")
    return {"certificate": identity.certificate, "certificate_key": identity.key}


@pytest.mark.parametrize(
    ("case", "failure", "words", "counted"),
    [
        ("none", "certificate_required", "pass it as `certificate`", "certificate_required"),
        ("untrusted", "peer_rejected_certificate", "does not trust the CA", "certificate_untrusted"),
        ("expired", "peer_rejected_certificate", "expired; renew it", "certificate_expired"),
        ("not yet valid", "peer_rejected_certificate", "not valid yet", "certificate_expired"),
        ("purpose", "peer_rejected_certificate", "extended key usage clientAuth", "certificate_untrusted"),
        ("revoked", "peer_rejected_certificate", "is revoked; get a new one", "certificate_revoked"),
    ],
)
async def test_refused_certificate_raises_cause_and_cure(
    case: str,
    failure: str,
    words: str,
    counted: str,
    asking: Asking,
    connect_to: ConnectTo,
    client_ca: trustme.CA,
    ada: trustme.LeafCert,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("zcproto.tls.transport.LINGER_TIME", 3600.0)
    server = asking(crl=revocation_list(client_ca, *([ada] if case == "revoked" else [])))
    with pytest.raises(TlsError) as caught:
        # The refusal is raised at once: waiting for the lingering close or the timeout would hang this test.
        await connect_to(server, **shown_in(case, client_ca, ada, tmp_path))
    assert caught.value.failure == failure
    assert words in caught.value.detail
    assert failures(server) == {counted: 1}
    assert server.stats["connections_opened"] == 0


def test_refused_certificate_raises_in_blocking_client(asking: Asking, blocking: Blocking) -> None:
    server = asking()
    client = blocking(server, None)
    with pytest.raises(TlsError, match="certificate_required"):
        client.open()


async def test_revoked_certificate_raises_on_the_next_connection(
    asking: Asking, connect_to: ConnectTo, client_ca: trustme.CA, ada: trustme.LeafCert, identity: Identity
) -> None:
    server = asking()
    async with connect_to(server, certificate=identity.certificate, certificate_key=identity.key) as client:
        ask(server, ca=client_ca.cert_pem.bytes(), crl=revocation_list(client_ca, ada))
        assert await client.call("echo", x=1) == {"x": 1}  # existing connections continue
        link = client._connections.current
        assert link is not None
        link.abort()
        await link.closed
        with pytest.raises(TlsError, match="is revoked"):
            await client.call("echo", x=2)


async def test_close_before_welcome_hints_at_the_certificate(
    asking: Asking, connect_to: ConnectTo, identity: Identity
) -> None:
    """OpenSSL cannot send an alert after the handshake."""
    server = asking()
    server.server.parts.acceptor.client_pins = frozenset({"sha256/" + "A" * 43 + "="})
    with pytest.raises(ConnectionClosed, match="it may have refused the client certificate"):
        await connect_to(server, certificate=identity.certificate, certificate_key=identity.key)
    assert failures(server) == {"pin_mismatch": 1}


# --- files --------------------------------------------------------------------------------------------


async def test_unusable_certificate_files_are_named_before_connecting(
    asking: Asking, connect_to: ConnectTo, identity: Identity, tmp_path: Path
) -> None:
    server = asking()
    await asyncio.to_thread(identity.key.chmod, 0o644)
    with pytest.raises(CertificateError, match=r"client\.key.*chmod 600"):
        await connect_to(server, certificate=identity.certificate, certificate_key=identity.key)
    with pytest.raises(CertificateError, match=r"gone\.crt"):
        await connect_to(server, certificate=tmp_path / "gone.crt")
    await asyncio.to_thread(identity.key.chmod, 0o600)
    shut = await asyncio.to_thread(locked, identity.key, b"hunter2")
    with pytest.raises(CertificateError, match="its passphrase is missing"):
        await connect_to(server, certificate=identity.certificate, certificate_key=shut)
    assert server.stats["handshakes_completed"] == 0


@pytest.mark.parametrize(
    "options", [{"certificate_key": "client.key"}, {"certificate_passphrase": "hunter2"}]
)
def test_key_without_certificate_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="certificate is missing; give its file"):
        connect("localhost", **options)


def trust_in(identity: Identity, **options: Any) -> Trust:
    return Trust(
        ConnectOptions(
            **{
                "verify": False,
                "certificate": identity.certificate,
                "certificate_key": identity.key,
                **options,
            }
        )
    )


@pytest.fixture
def resources() -> LoopResources:
    loop = asyncio.new_event_loop()
    try:
        return LoopResources(loop)
    finally:
        loop.close()


def test_clients_with_the_same_certificate_share_a_context(
    resources: LoopResources, identity: Identity
) -> None:
    first = trust_in(identity).context(resources.contexts)
    assert trust_in(identity).context(resources.contexts) is first
    others: list[dict[str, Any]] = [
        {"certificate": None, "certificate_key": None},
        {"certificate_passphrase": "x"},
    ]
    assert all(trust_in(identity, **other).context(resources.contexts) is not first for other in others)


def test_wrong_passphrase_does_not_use_a_cached_context(resources: LoopResources, identity: Identity) -> None:
    shut = identity._replace(key=locked(identity.key, b"hunter2"))
    trust_in(shut, certificate_passphrase=b"hunter2").context(resources.contexts)
    with pytest.raises(CertificateError, match="passphrase is wrong"):
        trust_in(shut, certificate_passphrase=b"hunter3").context(resources.contexts)


def test_renewed_certificate_replaces_the_cached_context(
    resources: LoopResources, identity: Identity, client_ca: trustme.CA, tmp_path: Path
) -> None:
    trust = trust_in(identity)
    old = trust.context(resources.contexts)
    times = identity.certificate.stat()
    renewed = write_identity(tmp_path, for_clients(client_ca), "renewed")
    os.utime(
        renewed.certificate, ns=(times.st_atime_ns, times.st_mtime_ns)
    )  # like a file system with coarse times
    renewed.key.replace(identity.key)
    renewed.certificate.replace(identity.certificate)
    new = trust.context(resources.contexts)
    assert new is not old
    assert trust.context(resources.contexts) is new
    assert len(resources.contexts) == 1


def test_mismatched_files_during_renewal_keep_the_previous_certificate(
    resources: LoopResources,
    identity: Identity,
    client_ca: trustme.CA,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trust = trust_in(identity)
    old = trust.context(resources.contexts)
    renewed = write_identity(tmp_path, for_clients(client_ca), "renewed")
    renewed.key.replace(identity.key)
    with caplog.at_level(logging.WARNING, "zcproto.client"):
        assert trust.context(resources.contexts) is old
    assert "KEY_VALUES_MISMATCH; still presenting" in caplog.text
    renewed.certificate.replace(identity.certificate)
    assert trust.context(resources.contexts) is not old


def test_changed_ca_file_never_uses_the_previous_context(
    resources: LoopResources, identity: Identity, ca_file: Path, tmp_path: Path
) -> None:
    authority = tmp_path / "ca.crt"
    authority.write_bytes(ca_file.read_bytes())
    trust = trust_in(identity, ca_file=authority, verify=True)
    assert trust.context(resources.contexts).verify_mode is ssl.CERT_REQUIRED
    authority.write_text("no certificate any more")
    with pytest.raises(CertificateError, match=r"ca\.crt"):
        trust.context(resources.contexts)


async def test_renewed_certificate_is_used_on_reconnect(
    asking: Asking, connect_to: ConnectTo, identity: Identity, client_ca: trustme.CA, tmp_path: Path
) -> None:
    server = asking()

    def shown() -> bytes | None:
        (connection,) = server.server.state.connections
        return connection.peer_certificate()

    async with connect_to(server, certificate=identity.certificate, certificate_key=identity.key) as client:
        assert await client.call("echo", x=1) == {"x": 1}
        assert server.in_loop(shown) == identity.der
        old = identity.der
        await asyncio.to_thread(write_identity, tmp_path, for_clients(client_ca))
        link = client._connections.current
        assert link is not None
        link.close("for the test")
        await link.closed
        assert await client.call("echo", x=2) == {"x": 2}
        server.until(lambda: len(server.server.state.connections) == 1)
        assert server.in_loop(shown) == identity.der != old
