"""Addresses of servers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zcproto.client.endpoints import Address, is_ip, parse_address
from zcproto.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost", "localhost", 7443),
        ("localhost:1", "localhost", 1),
        ("Example.ORG.:65535", "example.org", 65_535),
        ("a_b.example-1.org", "a_b.example-1.org", 7443),
        ("192.0.2.1", "192.0.2.1", 7443),
        ("192.0.2.1:80", "192.0.2.1", 80),
        ("::1", "::1", 7443),
        ("2001:DB8::1", "2001:db8::1", 7443),
        ("[::1]", "::1", 7443),
        ("[::1]:7444", "::1", 7444),
        ("[fe80::1%eth0]:7444", "fe80::1%eth0", 7444),
        ("bücher.example:1", "xn--bcher-kva.example", 1),
    ],
)
def test_host_and_port_are_parsed_in_all_forms(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7443",
        "localhost:",
        "localhost:0",
        "localhost:65536",
        "localhost:-1",
        "localhost:+1",
        "localhost: 1",
        "localhost:x",
        "localhost:\u0661",
        "localhost:1:2",
        "localhost:000001",
        "[::1",
        "[::1]7443",
        "[::1]:",
        "[localhost]:1",
        "[192.0.2.1]:1",
        "::1:x:7443",
        "1.2.3",
        "256.1.1.1",
        "a..b",
        ".a",
        "a b",
        "a/b",
        "user@host",
        "zcp://host",
        "a" * 64,
        ("a" * 60 + ".") * 5,
        "\ud800",
        "a\nb",
        "a\x00b",
    ],
)
def test_invalid_address_is_refused_with_the_correct_form(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_address(text)
    (fault,) = caught.value.faults
    assert fault.isprintable()


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("localhost:1:2", r"write HOST:PORT, or \[ADDRESS\]:PORT for IPv6"),
        ("::1:7443", r"write \[::1\]:7443 for a port, or \[::1:7443\] for an address"),
        ("[localhost]:1", r"write an IPv6 address with a port as \[::1\]:7443"),
        ("a/b", "not a host name or address; write HOST:PORT"),
        ("localhost:x", "the port must be a number from 1 to 65535"),
    ],
)
def test_each_fault_of_an_address_has_its_own_message(text: str, form: str) -> None:
    with pytest.raises(ConfigError, match=form):
        parse_address(text)


@given(st.text(max_size=40))
def test_any_text_is_parsed_or_raises_config_error(text: str) -> None:
    try:
        address = parse_address(text)
    except ConfigError:
        return
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(("text", "expected"), [("a.example", False), ("192.0.2.1", True), ("[::1]:5", True)])
def test_ip_addresses_are_distinguished_from_names(text: str, expected: bool) -> None:
    assert is_ip(parse_address(text).host) is expected


def test_ipv6_address_is_formatted_in_brackets() -> None:
    assert str(Address("::1", 5)) == "[::1]:5"
    assert str(Address("a.example", 5)) == "a.example:5"
