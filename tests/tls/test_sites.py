"""Test the selection of contexts by server name."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from tests.conftest import ServerPair
from tests.helpers import FakeTimers
from tests.tls.support import TlsPair
from zcproto.tls.context import SiteContexts, client_context, server_context
from zcproto.tls.transport import TlsPhase


def bare() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)


DEFAULT, EXACT, WILD, DEEP = (bare() for _ in range(4))
SITES = SiteContexts(
    DEFAULT, {"a.example": EXACT, "*.example": WILD, "*.b.example": DEEP, "sub.b.example": EXACT}
)


@pytest.mark.parametrize(
    ("name", "context"),
    [
        (None, DEFAULT),
        ("a.example", EXACT),
        ("c.example", WILD),
        ("b.example", WILD),  # *.b.example matches only names below it
        ("x.b.example", DEEP),
        ("sub.b.example", EXACT),  # exact before wildcard
        ("y.sub.b.example", DEFAULT),  # a star matches one label
        ("x.y.b.example", DEFAULT),
        ("example", DEFAULT),
        ("a.example.org", DEFAULT),
        ("xa.example.com", DEFAULT),
        ("localhost", DEFAULT),
        ("*.example", WILD),
        ("", DEFAULT),
    ],
)
def test_exact_name_precedes_wildcard_and_default(name: str | None, context: ssl.SSLContext) -> None:
    assert SITES.choose(name) is context


def test_without_names_default_serves_all() -> None:
    sites = SiteContexts(DEFAULT)
    assert sites.choose("a.example") is sites.choose("x.y.z") is sites.choose(None) is DEFAULT


def test_sites_copy_their_arguments() -> None:
    given = {"a.example": EXACT}
    sites = SiteContexts(DEFAULT, given)
    given["a.example"] = WILD
    given["b.example"] = WILD
    assert sites.choose("a.example") is EXACT
    assert sites.choose("b.example") is DEFAULT


# --- real handshakes ---------------------------------------------------------------------------------

Serving = Callable[..., ssl.SSLContext]


@pytest.fixture(scope="module")
def serving(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """Return a server context for these names."""

    def make(*names: str) -> ssl.SSLContext:
        folder = tmp_path_factory.mktemp("site")
        issued = ca.issue_cert(*names, key_type=trustme.KeyType.ECDSA)
        pair = ServerPair(folder / "site.pem", folder / "site.key")
        issued.cert_chain_pems[0].write_to_path(pair.certificate)
        issued.private_key_pem.write_to_path(pair.key)
        return server_context([pair], ["zcp/1"])

    return make


@pytest.fixture(scope="module")
def sites(serving: Serving) -> SiteContexts:
    return SiteContexts(
        serving("localhost", "127.0.0.1"),
        {"a.example": serving("a.example"), "*.b.example": serving("*.b.example")},
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "a.example", "A.EXAMPLE", "x.b.example"])
def test_sni_selects_site_certificate(
    host: str, sites: SiteContexts, client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    TlsPair(timers, sites, client_tls, host=host).agree()


@pytest.mark.parametrize("host", ["other.example", "b.example", "x.y.b.example"])
def test_unknown_sni_gets_default_certificate(host: str, sites: SiteContexts, timers: FakeTimers) -> None:
    pair = TlsPair(timers, sites, client_context(verify=False), host=host).agree()
    plain = TlsPair(timers, sites, client_context(verify=False)).agree()
    assert pair.client.getpeercert(True) == plain.client.getpeercert(True)


def test_replaced_sites_apply_to_later_handshakes(
    sites: SiteContexts, serving: Serving, timers: FakeTimers, ca_file: Path
) -> None:
    client = client_context(ca_file=ca_file)
    old = TlsPair(timers, sites, client, host="a.example").agree()
    cut = TlsPair(timers, sites, client, host="a.example", acceptor=old.acceptor)
    hello = cut.step()
    cut.raw.deliver(hello[:100])
    other = SiteContexts(sites.default, {"a.example": serving("a.example")})
    old.acceptor.contexts = other
    cut.raw.deliver(hello[100:])
    cut.hear()
    cut.raw.deliver(cut.step())
    new = TlsPair(timers, sites, client, host="a.example", acceptor=old.acceptor).agree()
    leaf = new.client.getpeercert(True)
    assert cut.client.getpeercert(True) == leaf
    assert old.client.getpeercert(True) != leaf
    assert cut.phase is old.phase is TlsPhase.OPEN
    old.say(b"still here")
    assert old.protocol.received == b"still here"


def test_server_name_is_released_after_handshake(sites: SiteContexts, timers: FakeTimers) -> None:
    pair = TlsPair(timers, sites, client_context(verify=False), host="a.example").agree()
    assert not hasattr(pair.server, "_hello")
