"""Which context serves which name, and that connections take it when their handshake begins."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from tests.conftest import ServerPair
from tests.helpers import FakeTimers
from tests.tls.support import TlsPair
from zcproto.errors import CertificateError
from zcproto.tls.context import client_context, server_context
from zcproto.tls.sites import SiteContexts
from zcproto.tls.transport import Phase


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
        ("b.example", WILD),  # *.b.example is for what is below it
        ("x.b.example", DEEP),
        ("sub.b.example", EXACT),  # exact before wildcard
        ("y.sub.b.example", DEFAULT),  # a star is one label
        ("x.y.b.example", DEFAULT),
        ("example", DEFAULT),
        ("a.example.org", DEFAULT),
        ("xa.example.com", DEFAULT),
        ("localhost", DEFAULT),
        ("*.example", WILD),
        ("", DEFAULT),
    ],
)
def test_exact_comes_before_wildcard_before_default(name: str | None, context: ssl.SSLContext) -> None:
    assert SITES.choose(name) is context


def test_without_names_all_get_the_default() -> None:
    sites = SiteContexts(DEFAULT)
    assert sites.choose("a.example") is sites.choose("x.y.z") is sites.choose(None) is DEFAULT
    assert sites.names == ()


def test_names_are_compared_without_case_and_last_dot() -> None:
    sites = SiteContexts(DEFAULT, {"A.Example.": EXACT, "*.B.Example.": WILD})
    assert sites.choose("a.example") is EXACT
    assert sites.choose("c.b.example") is WILD
    assert sites.names == ("a.example", "*.b.example")


@pytest.mark.parametrize(
    "name", ["", ".", "*", "*.", "a.*.example", "*a.example", "*.*.example", "a..b", ".a"]
)
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(CertificateError, match="invalid site name"):
        SiteContexts(DEFAULT, {name: EXACT})


@pytest.mark.parametrize("twice", [("a.example", "A.example"), ("*.example", "*.example.")])
def test_a_name_belongs_to_one_site(twice: tuple[str, str]) -> None:
    with pytest.raises(CertificateError, match="two sites have the name"):
        SiteContexts(DEFAULT, dict.fromkeys(twice, EXACT))


def test_what_was_given_may_change_and_the_sites_do_not() -> None:
    given = {"a.example": EXACT}
    sites = SiteContexts(DEFAULT, given)
    given["a.example"] = WILD
    given["b.example"] = WILD
    assert sites.choose("a.example") is EXACT
    assert sites.choose("b.example") is DEFAULT


# --- by real handshakes ---------------------------------------------------------------------------------

Serving = Callable[..., ssl.SSLContext]


@pytest.fixture(scope="module")
def serving(ca: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """A server's context for these names."""

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
def test_a_client_that_checks_names_is_served_by_the_site_of_its_name(
    host: str, sites: SiteContexts, client_tls: ssl.SSLContext, timers: FakeTimers
) -> None:
    TlsPair(timers, sites, client_tls, host=host).agree()


@pytest.mark.parametrize("host", ["other.example", "b.example", "x.y.b.example"])
def test_a_name_that_no_site_has_gets_the_defaults_certificate(
    host: str, sites: SiteContexts, timers: FakeTimers
) -> None:
    pair = TlsPair(timers, sites, client_context(verify=False), host=host).agree()
    plain = TlsPair(timers, sites, client_context(verify=False)).agree()
    assert pair.client.getpeercert(True) == plain.client.getpeercert(True)


def test_other_sites_are_for_connections_whose_handshake_begins_after_them(
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
    assert cut.phase is old.phase is Phase.OPEN
    old.say(b"still here")
    assert old.above.received == b"still here"


def test_the_name_is_not_kept_longer_than_it_is_needed(sites: SiteContexts, timers: FakeTimers) -> None:
    pair = TlsPair(timers, sites, client_context(verify=False), host="a.example").agree()
    assert pair.server._hello is None
