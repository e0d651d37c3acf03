"""Decides which names and addresses this machine has, without network requests.

Rules: localhost and the loopback addresses are always included. Nothing here may block: no resolver is used
(`getfqdn` and `getaddrinfo` can hang for a minute on a broken one), only the kernel. Link-local addresses are left
out because they need a scope, which a certificate cannot express. Names that are invalid in a certificate are left
out too, because the operator did not ask for them.

Must not know: certificates, configuration.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address

from zcproto.certs.names import check_name
from zcproto.errors import CertificateError

LOOPBACK = ("127.0.0.1", "::1")

# Offsets in sockaddr_in and sockaddr_in6; the same on Linux, macOS and the BSDs.
_IPV4 = slice(4, 8)
_IPV6 = slice(8, 24)
_SOCKADDR_IN = 16
_SOCKADDR_IN6 = 28


class _Interface(ctypes.Structure):
    """The first fields of `struct ifaddrs`, the same on Linux, macOS and the BSDs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]


def found_names() -> tuple[str, ...]:
    """Return localhost, the host's names, the loopback addresses and the addresses of its interfaces."""
    hostname = socket.gethostname()
    candidates = ["localhost", hostname, hostname.partition(".")[0], *LOOPBACK]
    candidates += [str(address) for address in interface_addresses() if not address.is_link_local]
    names: dict[str, None] = {}
    for candidate in candidates:
        try:
            names[check_name(candidate)] = None
        except CertificateError:
            continue  # a host may be called `my_host`, which must not prevent a start
    return tuple(names)


def interface_addresses() -> list[IPv4Address | IPv6Address]:
    """Return the addresses of this machine's interfaces; none if the C library has no such function."""
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        getifaddrs, freeifaddrs = libc.getifaddrs, libc.freeifaddrs
    except (AttributeError, OSError, TypeError):
        return []  # the loopback addresses and the configured names remain
    head = ctypes.POINTER(_Interface)()
    if getifaddrs(ctypes.byref(head)) != 0:
        return []
    try:
        return list(_walk(head))
    finally:
        freeifaddrs(head)


def _walk(head: ctypes._Pointer[_Interface]) -> Iterator[IPv4Address | IPv6Address]:
    entry = head
    while entry:
        pointer = entry.contents.address
        if pointer:
            family = _family(ctypes.string_at(pointer, 2), sys.platform)
            if family == socket.AF_INET:
                yield IPv4Address(ctypes.string_at(pointer, _SOCKADDR_IN)[_IPV4])
            elif family == socket.AF_INET6:
                yield IPv6Address(ctypes.string_at(pointer, _SOCKADDR_IN6)[_IPV6])
        entry = entry.contents.next


def _family(start: bytes, platform: str) -> int:
    """Return the family in the first two bytes of a sockaddr. On the BSDs the first byte is a length."""
    if platform == "linux":
        return int.from_bytes(start, sys.byteorder)
    return start[1]
