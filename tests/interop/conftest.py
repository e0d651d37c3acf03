"""Own certificates as a server makes them by default, and servers that show them to clients of other stacks."""

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
from zcproto.certs import ManagedSettings, managed
from zcproto.config.model import CertificatesConfig

NAMES = ("zcp.example.com", "192.0.2.7", "2001:db8::7")
"""What is configured; the names of this machine come in beside it, as they do by default."""

CERTIFICATES = {"rsa-4096": "server.crt", "ecdsa-p256": "server-ecdsa.crt"}
"""The key types that are served by default, and their files."""


def make(folder: Path, key_types: Sequence[str]) -> Path:
    """A folder of own certificates with the lifetimes of the default configuration."""
    usual = CertificatesConfig()
    managed.ensure(
        folder,
        ManagedSettings(
            names=NAMES,
            key_types=key_types,
            lifetime=timedelta(seconds=usual.lifetime),
            renew_before=timedelta(seconds=usual.renew_before),
            renew_key=usual.renew_key,
        ),
        datetime.now(UTC),
    )
    return folder


@pytest.fixture(scope="package")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of both key types and their authority. RSA-4096 takes some seconds: made once."""
    assert set(CERTIFICATES) == set(CertificatesConfig().key_types)
    return make(tmp_path_factory.mktemp("interop") / "certs", list(CERTIFICATES))


@pytest.fixture(scope="package")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of another authority of the same kind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zcproto.certs.authority.KEY_TYPE", "rsa-2048")
        return make(tmp_path_factory.mktemp("stranger") / "certs", ["ecdsa-p256"]) / "ca.crt"


Serve = Callable[[str], int]


@pytest.fixture(scope="module")
def serve(own: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """The port of a running server that has the certificate of this key type alone; started once for each."""
    ports: dict[str, int] = {}
    with ExitStack() as stack:

        def port_of(key_type: str) -> int:
            if key_type not in ports:
                home = tmp_path_factory.mktemp("served") / "home"
                server = ServerThread(home, own, certificates__key_types=[key_type])
                port = stack.enter_context(server).port
                assert shown(port, own / "ca.crt") == (own / CERTIFICATES[key_type]).read_text()
                ports[key_type] = port
            return ports[key_type]

        yield port_of


def shown(port: int, ca_file: Path) -> str:
    """The certificate that this port shows, as PEM: a test of one key type must not be one of the other."""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as raw,
        client_context(ca_file).wrap_socket(raw, server_hostname="localhost") as connection,
    ):
        certificate = connection.getpeercert(binary_form=True)
    assert certificate is not None
    return ssl.DER_cert_to_PEM_cert(certificate)


@pytest.fixture(scope="package")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """The clients of the folder `programs`, each built when it is first wanted."""
    return Programs(tmp_path_factory.mktemp("programs"))
