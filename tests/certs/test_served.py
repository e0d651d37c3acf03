"""The certificates as a TLS 1.3 client sees them."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.certs.support import ensure
from tests.limits import TIMEOUT
from zcproto.certs import authority
from zcproto.certs.pair import CertificatePair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("served") / "certs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authority, "KEY_TYPE", "rsa-2048")
        ensure(directory, now=datetime.now(UTC), names=["zcp.example.com", "*.b.example", "192.0.2.7"])
    return directory


@pytest.fixture(scope="module")
def pairs(folder: Path) -> list[CertificatePair]:
    return ensure(folder, now=datetime.now(UTC), names=[])


def server_context(pairs: Sequence[CertificatePair]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    for pair in pairs:
        context.load_cert_chain(pair.certificate, pair.key)
    return context


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> ssl.SSLObject:
    """The client's end after a handshake in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client_end = client.wrap_bio(to_client, to_server, server_hostname=name)
    server_end = server.wrap_bio(to_server, to_client, server_side=True)
    open_ends = [client_end, server_end]
    for _ in range(10):
        for end in list(open_ends):
            try:
                end.do_handshake()
                open_ends.remove(end)
            except ssl.SSLWantReadError:
                continue
        if not open_ends:
            return client_end
    raise AssertionError("the handshake never ends")


@pytest.mark.parametrize("name", ["zcp.example.com", "www.b.example", "192.0.2.7", "127.0.0.1", "localhost"])
@pytest.mark.parametrize("types", [["rsa-2048"], ["ecdsa-p256"], ["rsa-2048", "ecdsa-p256"]])
def test_client_that_trusts_the_authority_connects_by_every_name(
    folder: Path, pairs: list[CertificatePair], types: list[str], name: str
) -> None:
    served = [pair for pair in pairs if pair.key_type in types]
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    end = handshake(server_context(served), client, name)
    assert end.version() == "TLSv1.3"
    leaf = end.getpeercert(binary_form=True)
    assert leaf in [ssl.PEM_cert_to_DER_cert(pair.certificate.read_text()) for pair in served]


def test_client_refuses_another_name_and_another_authority(
    folder: Path, pairs: list[CertificatePair], tmp_path: Path
) -> None:
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        handshake(server_context(pairs), client, "c.example")
    ensure(tmp_path / "certs", key_types=["ecdsa-p256"])
    stranger = ssl.create_default_context(cafile=tmp_path / "certs" / "ca.crt")
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        handshake(server_context(pairs), stranger, "localhost")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl command to be the client")
@pytest.mark.parametrize(
    ("algorithms", "key_type"),
    [
        ("rsa_pss_rsae_sha256:rsa_pkcs1_sha256", "rsa-2048"),
        ("ecdsa_secp256r1_sha256:rsa_pkcs1_sha256", "ecdsa-p256"),
    ],
)
def test_clients_of_either_key_family_are_served_on_one_port(
    folder: Path, pairs: list[CertificatePair], algorithms: str, key_type: str
) -> None:
    """The client of RSA only cannot verify a chain with any other signature in it (RFC 8446 section 4.4.2.2)."""
    context = server_context(pairs)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)

        def serve_one() -> None:
            connection, _ = listener.accept()
            with context.wrap_socket(connection, server_side=True) as served:
                served.recv(1)

        thread = threading.Thread(target=serve_one)
        thread.start()
        command: list[Any] = ["openssl", "s_client", "-connect", f"127.0.0.1:{listener.getsockname()[1]}"]
        command += ["-CAfile", folder / "ca.crt", "-verify_return_error", "-verify_hostname", "localhost"]
        command += ["-tls1_3", "-sigalgs", algorithms]
        done = subprocess.run(command, input=b"Q\n", capture_output=True, check=False, timeout=TIMEOUT)
        thread.join(TIMEOUT)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Verify return code: 0 (ok)" in done.stdout
    (served_pair,) = (pair for pair in pairs if pair.key_type == key_type)
    assert served_pair.certificate.read_text() in done.stdout.decode()
