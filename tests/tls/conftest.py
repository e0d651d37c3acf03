from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import ServerPairs
from tests.helpers import FakeTimers
from tests.tls.support import TlsPair
from zcproto.tls.context import client_context, server_context


@pytest.fixture(scope="session")
def server_tls(server_pairs: ServerPairs) -> ssl.SSLContext:
    """A server context with one certificate per key type."""
    return server_context(server_pairs, ["zcp/1", "http/1.1"])


@pytest.fixture(scope="session")
def client_tls(ca_file: Path) -> ssl.SSLContext:
    return client_context(ca_file=ca_file)


NewPair = Callable[..., TlsPair]


@pytest.fixture
def new_pair(timers: FakeTimers, server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> NewPair:
    """Return a factory of TCP connections before the first byte."""
    return partial(TlsPair, timers, server_tls, client_tls)


@pytest.fixture
def tls_pair(new_pair: NewPair) -> TlsPair:
    """A TCP connection before the first byte."""
    return new_pair()


@pytest.fixture
def agreed(tls_pair: TlsPair) -> TlsPair:
    """A connection after the handshake."""
    return tls_pair.agree()
