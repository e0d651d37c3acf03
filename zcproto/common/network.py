"""Handle addresses: the unit that limits count, sets of networks, and UNIX sockets at paths of any length."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Final

_IPV4_BITS: Final = 32
_IPV6_PREFIX: Final = 64
"""The smallest allocation of an IPv6 site. Its owner can use any address in it."""


MAX_SOCKET_PATH: Final = 107 if sys.platform == "linux" else 103
"""Bytes of a UNIX socket's path (unix(7))."""

_DESCRIPTORS: Final = Path("/proc/self/fd")


@lru_cache(maxsize=1024)
def network_of(address: str, ipv4_bits: int = _IPV4_BITS, ipv6_bits: int = _IPV6_PREFIX) -> str:
    """Return the unit that limits count: the network of an address, or any other text itself."""
    if ipv4_bits == _IPV4_BITS and ":" not in address:  # IPv4 and other text: skip the parser
        return address
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is None:
            return str(ipaddress.IPv6Network((int(ip), ipv6_bits), strict=False))
        ip = ip.ipv4_mapped
    if ipv4_bits == _IPV4_BITS:
        return str(ip)
    return str(ipaddress.IPv4Network((int(ip), ipv4_bits), strict=False))


def plain_address(address: str) -> str:
    """Return 192.0.2.1 for ::ffff:192.0.2.1, as dual-stack sockets report it; other addresses are unchanged."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


class AddressSet:
    """The addresses of some networks, each written as 10.0.0.0/8 or as one address. False if it is empty.

    Raises ValueError for an invalid network, also for one with bits set behind its prefix.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks = tuple(map(ipaddress.ip_network, networks))
        self.contains = lru_cache(maxsize=1024)(self._contains)
        """Returns whether a text is an address in one of the networks."""

    def __bool__(self) -> bool:
        return bool(self._networks)

    def _contains(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(plain_address(address).partition("%")[0])
        except ValueError:
            return False
        return any(ip in network for network in self._networks)


@contextmanager
def address_of(path: Path) -> Iterator[str]:
    """Yield the address to bind or connect to for the socket at a path. It is valid inside the body.

    A path that is too long is replaced by one through a descriptor of its folder, where the system has /proc.
    Otherwise the system reports the error. Raises OSError if the folder is missing.
    """
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH or not _DESCRIPTORS.is_dir():
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"{_DESCRIPTORS}/{folder}/{path.name}"
    finally:
        os.close(folder)
