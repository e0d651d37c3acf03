"""Tests of what is fetched of a provider: over verified TLS, bounded, and by the configured issuer only."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.alerts.receiver import Answer, Receiver, answer
from tests.auth.issuer import jwk, key_set
from tests.conftest import ServerPairs
from zcproto.auth.oidc import MAX_KEY_SET, KeysFailed, Provider
from zcproto.common.https import verifying_context


class Site:
    """A provider at a port of this machine."""

    def __init__(self, certificate: tuple[Path, Path], ca_file: Path) -> None:
        self.receiver = Receiver(certificate)
        self.issuer = self.receiver.url.partition("/hook")[0] + "/staff"
        self.provider = Provider(self.issuer, verifying_context(ca_file, ""), 10.0)

    def metadata(self, **changes: Any) -> bytes:
        found = {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys", **changes}
        return answer(200, body=json.dumps(found).encode())

    def answers(self, *answers: Answer) -> None:
        self.receiver.answers[:] = answers

    @property
    def asked(self) -> list[str]:
        return [each.line.split()[1] for each in self.receiver.received]


KEYS = answer(200, body=key_set(jwk("RS256"), jwk("ES256", "two")))


@pytest.fixture
def certificate(server_pairs: ServerPairs) -> tuple[Path, Path]:
    return server_pairs.ecdsa.certificate, server_pairs.ecdsa.key


@pytest.fixture
def site(certificate: tuple[Path, Path], ca_file: Path) -> Iterator[Site]:
    found = Site(certificate, ca_file)
    with found.receiver:
        yield found


async def test_keys_are_where_the_metadata_says(site: Site) -> None:
    site.answers(site.metadata(), KEYS, KEYS)
    assert [key.kid for key in await site.provider.keys()] == ["one", "two"]
    assert len(await site.provider.keys()) == 2
    assert site.asked == ["/staff/.well-known/openid-configuration", "/staff/keys", "/staff/keys"]
    assert site.receiver.received[0].headers["accept"] == "application/json"


async def test_metadata_is_read_again_after_a_failure(site: Site) -> None:
    failures = [answer(500), answer(200, body=b"{}")]
    for failure in failures:
        site.answers(site.metadata(), failure, site.metadata(jwks_uri=f"{site.issuer}/moved"), KEYS)
        site.receiver.received.clear()
        with pytest.raises(KeysFailed):
            await site.provider.keys()
        assert await site.provider.keys()
        assert site.asked[2:] == ["/staff/.well-known/openid-configuration", "/staff/moved"]
        site.provider = Provider(site.issuer, site.provider._context, 10.0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"issuer": "https://evil.example"}, "by another issuer"),
        ({"issuer": None}, "by another issuer"),
        ({"jwks_uri": "http://localhost/keys"}, "no usable jwks_uri"),
        ({"jwks_uri": "file:///etc/passwd"}, "no usable jwks_uri"),
        ({"jwks_uri": "https://user@localhost/keys"}, "no usable jwks_uri"),
        ({"jwks_uri": "https://localhost:99999/keys"}, "no usable jwks_uri"),
        ({"jwks_uri": "https://localhost/a b"}, "no usable jwks_uri"),
        ({"jwks_uri": "https://localhost/" + "x" * 2048}, "no usable jwks_uri"),
        ({"jwks_uri": "https:///keys"}, "no usable jwks_uri"),
        ({"jwks_uri": 5}, "no usable jwks_uri"),
    ],
)
async def test_metadata_that_cannot_be_trusted_is_refused(
    site: Site, changes: dict[str, Any], reason: str
) -> None:
    site.answers(site.metadata(**changes))
    with pytest.raises(KeysFailed, match=reason):
        await site.provider.keys()


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (answer(404), "localhost answered 404$"),
        (answer(302, "Location: https://evil.example/"), "answered 302: redirects are not followed"),
        (answer(200, body=b"[]"), "the metadata cannot be used: not an object"),
        (answer(200, body=b'{"issuer": "a", "issuer": "b"}'), "a name is repeated"),
        (answer(200, body=b" " * 200_000), "is longer than 131072 bytes"),
        (b"nonsense\r\n\r\n", "did not answer by HTTP"),
        (b"", "did not answer by HTTP"),
    ],
)
async def test_metadata_that_cannot_be_read_is_refused(site: Site, response: bytes, reason: str) -> None:
    site.answers(response)
    with pytest.raises(KeysFailed, match=reason):
        await site.provider.keys()


async def test_large_or_chunked_key_set_is_bounded(site: Site) -> None:
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * (MAX_KEY_SET // 4096 + 1)
    site.answers(site.metadata(), endless)
    with pytest.raises(KeysFailed, match=f"is longer than {MAX_KEY_SET} bytes"):
        await site.provider.keys()


async def test_key_set_without_usable_keys_is_refused(site: Site) -> None:
    site.answers(site.metadata(), answer(200, body=key_set({"kty": "oct", "k": "AAAA"})))
    with pytest.raises(KeysFailed, match="the key set cannot be used: it has no key"):
        await site.provider.keys()


async def test_provider_with_another_certificate_is_refused(site: Site) -> None:
    site.provider = Provider(site.issuer, ssl.create_default_context(), 10.0)
    with pytest.raises(KeysFailed, match="the certificate of localhost is not trusted"):
        await site.provider.keys()
    assert site.asked == []


async def test_form_is_posted(site: Site) -> None:
    site.answers(answer(400, body=b"{}"))
    response = await site.provider.post(f"{site.issuer}/token", b"a=1&b=2")
    assert (response.status, response.body) == (400, b"{}")
    (request,) = site.receiver.received
    assert (request.line.split()[0], request.body) == ("POST", b"a=1&b=2")
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"


async def test_issuer_without_tls_may_have_keys_without_tls() -> None:
    with Receiver(None) as receiver:
        issuer = receiver.url.partition("/hook")[0]
        metadata = {"issuer": issuer, "jwks_uri": f"{issuer}/keys"}
        receiver.answers[:] = [answer(200, body=json.dumps(metadata).encode()), KEYS]
        assert await Provider(issuer, ssl.create_default_context(), 10.0).keys()
