from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from cryptography import x509

from zcproto.certs.names import MAX_NAMES, check_name, check_names, general_names
from zcproto.errors import CertificateError

LONG_LABEL = "a" * 63
LONGEST_NAME = ".".join([LONG_LABEL] * 3 + ["a" * 61])  # 253 characters


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("localhost", "localhost"),
        ("Zcp.EXAMPLE.com", "zcp.example.com"),
        ("example.com.", "example.com"),
        ("*.example.com", "*.example.com"),
        ("a-b--c.example", "a-b--c.example"),
        ("1and1.example", "1and1.example"),
        ("7.example", "7.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example", "xn--bcher-kva.example"),
        ("*.bücher.example", "*.xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        (LONG_LABEL, LONG_LABEL),
        (LONGEST_NAME, LONGEST_NAME),
        (LONGEST_NAME + ".", LONGEST_NAME),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "::1"),
        ("2001:DB8:0:0::0001", "2001:db8::1"),
        ("fe80::1", "fe80::1"),
    ],
)
def test_valid_name_is_normalized(given: str, kept: str) -> None:
    assert check_name(given) == kept


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".example.com",
        "a..example",
        "example.com..",
        "-a.example",
        "a-.example",
        "under_score.example",
        "two words",
        "new\nline",
        "nul\0.example",
        "a" * 64,
        "a" + LONGEST_NAME,
        "a" * 100_000,
        "ü" * 100_000,
        "*",
        "*.",
        "*.com",
        "w*.example.com",
        "www.*.example.com",
        "*.*.example.com",
        "straße.example",  # IDNA 2003 and 2008 give different A-labels
        "ü" * 64 + ".example",
        "\ud800.example",
        "example。com",  # an ideographic full stop would silently become a dot
        "1.2.3",
        "256.1.1.1",
        "1.2.3.4.5",
        "host.0x7f",
        "127.0.0.1:7443",
        "[::1]",
        "fe80::1%eth0",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "10.0.0.0/8",
        "https://example.com",
        "user@example.com",
    ],
)
def test_invalid_name_is_refused_and_quoted(name: str) -> None:
    with pytest.raises(CertificateError) as caught:
        check_name(name)
    message = str(caught.value)
    assert message.startswith(repr(name[:253])[:-1])
    assert "is not a valid name for a certificate: " in message
    assert len(message) < 3000
    assert "\n" not in message


def test_names_keep_their_order_without_duplicates() -> None:
    assert check_names(["b.example", "a.example", "B.example.", "::1", "0::1"]) == (
        "b.example",
        "a.example",
        "::1",
    )


def test_a_hundred_names_are_accepted_and_one_more_is_refused() -> None:
    names = [f"n{number}.example" for number in range(MAX_NAMES)]
    assert len(check_names(names)) == MAX_NAMES
    assert len(check_names(names * 2)) == MAX_NAMES
    with pytest.raises(CertificateError, match="at most 100 names"):
        check_names([*names, "one.more.example"])


def test_addresses_become_address_entries_and_other_names_dns_entries() -> None:
    assert general_names(["a.example", "192.0.2.7", "*.b.example", "2001:db8::1"]) == [
        x509.DNSName("a.example"),
        x509.IPAddress(IPv4Address("192.0.2.7")),
        x509.DNSName("*.b.example"),
        x509.IPAddress(IPv6Address("2001:db8::1")),
    ]
