"""Fixtures: managed certificates as issued by default, and servers that serve them to clients of other stacks."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.interop.support import Programs
from tests.server.helpers import TIMEOUT, ServerThread, client_context
from zcproto.certs import managed
from zcproto.certs.managed import ManagedSettings
from zcproto.config.model import CertificatesConfig

NAMES = ("zcp.example.com", "192.0.2.7", "2001:db8::7")
"""Configured names; the names of the machine are added by default."""

ALONE = "alone"
CERTIFICATES = {
    "rsa-4096": "server.crt",
    "ecdsa-p256": "server-ecdsa.crt",
    f"ecdsa-p256 {ALONE}": f"{ALONE}/server-ecdsa.crt",
}
"""Certificate files by key type: the default ones, and an ECDSA one alone, whose authority has an ECDSA key too."""


def ca_of(certificate: Path) -> Path:
    """Return the certificate of the authority that issued this one."""
    return certificate.with_name("ca.crt")


def issue(folder: Path, key_types: Sequence[str]) -> Path:
    """Issue managed certificates with the default lifetimes into a folder."""
    defaults = CertificatesConfig()
    managed.ensure(
        folder,
        ManagedSettings(
            names=NAMES,
            key_types=key_types,
            lifetime=timedelta(seconds=defaults.lifetime),
            renew_before=timedelta(seconds=defaults.renew_before),
            renew_key=defaults.renew_key,
        ),
        datetime.now(UTC),
    )
    return folder


@pytest.fixture(scope="package")
def managed_certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with certificates of both key types and their authority, issued once as RSA-4096 is slow."""
    folder = issue(tmp_path_factory.mktemp("interop") / "certs", CertificatesConfig().key_types)
    issue(folder / ALONE, ["ecdsa-p256"])
    return folder


@pytest.fixture(scope="package")
def other_ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the certificate of another authority."""
    return issue(tmp_path_factory.mktemp("other_ca") / "certs", ["ecdsa-p256"]) / "ca.crt"


Serve = Callable[[str], int]


@pytest.fixture(scope="module")
def serve(managed_certs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Return a function that gives the port of a server with a certificate of one key type."""
    ports: dict[str, int] = {}
    with ExitStack() as stack:

        def port_of(key_type: str) -> int:
            if key_type not in ports:
                home = tmp_path_factory.mktemp("served") / "home"
                path = managed_certs / CERTIFICATES[key_type]
                server = ServerThread(home, path.parent, certificates__key_types=[key_type.partition(" ")[0]])
                port = stack.enter_context(server).port
                assert served_certificate(port, ca_of(path)) == path.read_text()
                ports[key_type] = port
            return ports[key_type]

        yield port_of


def served_certificate(port: int, ca_file: Path) -> str:
    """Return the certificate that a port serves, as PEM."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw,
        client_context(ca_file).wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


@pytest.fixture(scope="package")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Return the clients of the folder `programs`, each built on first use."""
    return Programs(tmp_path_factory.mktemp("programs"))
