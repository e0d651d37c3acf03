"""The group of the key exchange, as OpenSSL negotiates it."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from tests.helpers import FakeTimers
from tests.tls.conftest import NewPair
from tests.tls.support import TlsPair
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


@pytest.mark.skipif(ssl.OPENSSL_VERSION_INFO < (3, 5), reason="OpenSSL below 3.5 has no ML-KEM")
def test_default_group_is_post_quantum(new_pair: NewPair) -> None:
    assert new_pair().agree().acceptor.groups == {"X25519MLKEM768": 1}


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
