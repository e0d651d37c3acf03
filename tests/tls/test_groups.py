"""The group of the key exchange, as OpenSSL negotiates it."""

from __future__ import annotations

import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ServerPairs
from tests.docs.messages import ROOT
from tests.helpers import FakeTimers
from tests.limits import TIMEOUT
from tests.tls.conftest import NewPair
from tests.tls.support import TlsPair
from zcproto.tls.client_hello import AlertDescription, alert_record
from zcproto.tls.context import client_context
from zcproto.tls.groups import NAMES, group_name, group_of


@pytest.mark.parametrize("name", ["prime256v1", "secp384r1", "X25519"])
def test_negotiated_group_is_counted(
    server_tls: ssl.SSLContext, ca_file: Path, timers: FakeTimers, name: str
) -> None:
    client_tls = client_context(ca_file=ca_file)
    client_tls.set_ecdh_curve(name)
    pair = TlsPair(timers, server_tls, client_tls).agree()
    expected = {"prime256v1": "secp256r1", "X25519": "x25519"}.get(name, name)
    assert pair.acceptor.groups == {expected: 1}


needs_ml_kem = pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3, 5), reason="OpenSSL below 3.5 has no ML-KEM")


@needs_ml_kem
def test_default_group_is_post_quantum(new_pair: NewPair) -> None:
    assert new_pair().agree().acceptor.groups == {"X25519MLKEM768": 1}


ANSWERS = """
import contextlib, ssl, sys
from pathlib import Path
from zcproto.tls.client_hello import AlertDescription, alert_record
from zcproto.tls.context import server_context

context = server_context([tuple(map(Path, sys.argv[1:]))], ["zcp/1"])
for hello in sys.stdin:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_side=True)
    incoming.write(bytes.fromhex(hello))
    with contextlib.suppress(ssl.SSLError):
        tls.do_handshake()
    print(outgoing.read().hex())
"""
"""Prints what a server answers to each ClientHello."""


@needs_ml_kem
def test_configuration_of_openssl_can_require_post_quantum_groups(
    timers: FakeTimers,
    server_pairs: ServerPairs,
    server_tls: ssl.SSLContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The configuration is that of docs/security.md."""
    found = re.search(r"```ini\n(openssl_conf .*?)```", (ROOT / "docs/security.md").read_text(), re.DOTALL)
    assert found is not None
    (tmp_path / "openssl.cnf").write_text(found[1])
    monkeypatch.setenv("OPENSSL_CONF", str(tmp_path / "openssl.cnf"))
    classical = client_context(verify=False)
    classical.set_ecdh_curve("X25519")
    hellos = [TlsPair(timers, server_tls, each).step() for each in (client_context(verify=False), classical)]
    answers = subprocess.run(
        [sys.executable, "-c", ANSWERS, *server_pairs.ecdsa],
        input="\n".join(hello.hex() for hello in hellos),
        capture_output=True,
        text=True,
        check=True,
        timeout=TIMEOUT,
        cwd=ROOT,
    ).stdout.split()
    assert group_name(group_of(bytes.fromhex(answers[0]))) == "X25519MLKEM768"
    assert bytes.fromhex(answers[1]) == alert_record(AlertDescription.HANDSHAKE_FAILURE)


def hello(*extensions: bytes) -> bytes:
    body = (
        bytes(2 + 32)
        + bytes([1, 0])
        + bytes(3)
        + len(b"".join(extensions)).to_bytes(2)
        + b"".join(extensions)
    )
    message = bytes([2]) + len(body).to_bytes(3) + body
    return bytes([22, 3, 3]) + len(message).to_bytes(2) + message + bytes([20, 3, 3, 0, 1, 1])


VERSIONS = bytes([0, 43, 0, 2, 3, 4])


@pytest.mark.parametrize(
    ("data", "group"),
    [
        (hello(VERSIONS, bytes([0, 51, 0, 2, 0, 29])), 29),  # HelloRetryRequest
        (hello(VERSIONS), 0),
        (bytes([21, 3, 3, 0, 2, 2, 40]), 0),
        (bytes([22, 3, 3, 0, 5, 4, 0, 0, 1, 0]), 0),
    ],
    ids=["hello retry request", "without a key share", "alert", "another message"],
)
def test_group_is_read_from_a_hello_only(data: bytes, group: int) -> None:
    assert group_of(data) == group


def test_group_without_a_name_has_its_number() -> None:
    assert [group_name(0x11EC), group_name(0x0100)] == [NAMES[0x11EC], "0x0100"]
