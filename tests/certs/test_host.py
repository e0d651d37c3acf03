from __future__ import annotations

import ctypes
import itertools
import socket
import sys
from ipaddress import IPv4Address, IPv6Address, ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from zcproto.certs import host
from zcproto.certs.names import check_name


@pytest.fixture(autouse=True)
def _no_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any question to a resolver fails the test: it may take a minute where the network is broken."""

    def ask(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the resolver was asked")

    for name in ("getaddrinfo", "getfqdn", "gethostbyname", "gethostbyname_ex", "gethostbyaddr"):
        monkeypatch.setattr(socket, name, ask)


def test_localhost_loopback_and_host_name_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "Box.Example.NET")
    names = host.found_names()
    assert names[:5] == ("localhost", "box.example.net", "box", "127.0.0.1", "::1")
    assert len(names) == len(set(names))


def test_every_found_name_is_valid_in_a_certificate() -> None:
    assert all(check_name(name) == name for name in host.found_names())


def test_host_name_invalid_in_a_certificate_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "my_host")
    monkeypatch.setattr(host, "interface_addresses", list)
    assert host.found_names() == ("localhost", "127.0.0.1", "::1")


def test_link_local_addresses_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [ip_address(text) for text in ("169.254.3.4", "fe80::1", "192.0.2.7", "2001:db8::7")]
    monkeypatch.setattr(socket, "gethostname", lambda: "box")
    monkeypatch.setattr(host, "interface_addresses", lambda: found)
    assert host.found_names() == ("localhost", "box", "127.0.0.1", "::1", "192.0.2.7", "2001:db8::7")


def test_interface_addresses_can_be_bound() -> None:
    addresses = host.interface_addresses()
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
    assert host.interface_addresses() == [IPv4Address("192.0.2.7"), IPv6Address("2001:db8::7")]
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
    assert host.found_names() == ("localhost", "box", "127.0.0.1", "::1")
