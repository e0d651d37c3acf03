from __future__ import annotations

import ctypes
import itertools
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509

from zcproto.certs import names
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


# --- the names of this machine


@pytest.fixture(autouse=True)
def _no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question to a resolver fails the test: it may take a minute where the network is broken."""

    def ask(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the resolver was asked")

    for name in ("getaddrinfo", "getfqdn", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, ask)


def test_localhost_loopback_and_host_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.Example.NET")
    found = names.found_names()
    assert found[:5] == ("localhost", "box.example.net", "box", "127.0.0.1", "::1")
    assert len(found) == len(set(found))


def test_every_found_name_is_valid_in_a_certificate() -> None:
    assert all(check_name(name) == name for name in names.found_names())


def test_host_name_invalid_in_a_certificate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my_host")
    monkeypatch.setattr(names, "interface_addresses", list)
    assert names.found_names() == ("localhost", "127.0.0.1", "::1")


def test_link_local_addresses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [ip_address(text) for text in ("169.254.3.4", "fe80::1", "192.0.2.7", "2001:db8::7")]
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(names, "interface_addresses", lambda: found)
    assert names.found_names() == ("localhost", "box", "127.0.0.1", "::1", "192.0.2.7", "2001:db8::7")


def test_interface_addresses_can_be_bound() -> None:
    addresses = names.interface_addresses()
    assert IPv4Address("127.0.0.1") in addresses
    for address in addresses:
        if address.is_link_local:
            continue  # it cannot be bound without the number of its interface
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))


class InterfaceEntry(ctypes.Structure):
    """The first fields of `struct ifaddrs`."""

    _fields_ = (
        ("next", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("flags", ctypes.c_uint),
        ("address", ctypes.c_void_p),
    )


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_interface_entries_of_all_families_are_parsed(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(family: int, rest: bytes) -> InterfaceEntry:
        start = family.to_bytes(2, sys.byteorder) if platform == "linux" else bytes((2 + len(rest), family))
        buffers.append(ctypes.create_string_buffer(start + rest))
        return InterfaceEntry(address=ctypes.addressof(buffers[-1]))

    def getifaddrs(head: Any) -> int:
        ctypes.cast(head, ctypes.POINTER(ctypes.c_void_p))[0] = ctypes.addressof(entries[0])
        return 0

    buffers: list[Any] = []
    freed: list[Any] = []
    entries = [
        entry(socket.AF_INET, bytes(2) + IPv4Address("192.0.2.7").packed + bytes(8)),
        entry(255, bytes(26)),  # a packet socket's address
        InterfaceEntry(),  # a tunnel without an address
        entry(socket.AF_INET6, bytes(6) + IPv6Address("2001:db8::7").packed + bytes(4)),
    ]
    for before, after in itertools.pairwise(entries):
        before.next = ctypes.addressof(after)
    library = SimpleNamespace(getifaddrs=getifaddrs, freeifaddrs=freed.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda name, **options: library)
    monkeypatch.setattr(sys, "platform", platform)
    assert names.interface_addresses() == [IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7")]
    assert len(freed) == 1


def _no_library(name: object, **options: Any) -> Any:
    raise OSError("no C library")


@pytest.mark.parametrize(
    "library",
    [
        _no_library,
        lambda name, **options: SimpleNamespace(),
        lambda name, **options: SimpleNamespace(getifaddrs=lambda head: -1, freeifaddrs=None),
    ],
    ids=["no library", "no function", "an error"],
)
def test_only_loopback_is_found_without_the_system_function(
    library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", library)
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    assert names.found_names() == ("localhost", "box", "127.0.0.1", "::1")
