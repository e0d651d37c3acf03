"""Which addresses count as one: those that one customer has, who could change between them at will; and lists
of networks."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from functools import lru_cache

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_IPV6_PREFIX = 64
"""What one IPv6 site is given at least: counting single addresses would limit nothing."""


@lru_cache(maxsize=1024)
def network_of(address: str) -> str:
    """What is counted for: an IPv4 address, the /64 of an IPv6 one, or any other text as it is."""
    if ":" not in address:  # IPv4 and other text, without the cost of reading it
        return address
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    assert isinstance(ip, ipaddress.IPv6Address), "an address with a colon is none of IPv4"
    if ip.ipv4_mapped is not None:
        return str(ip.ipv4_mapped)
    return str(ipaddress.ip_network((int(ip), _IPV6_PREFIX), strict=False))


def plain_address(address: str) -> str:
    """An IPv4 address that a socket for both families tells as ::ffff:192.0.2.1, as 192.0.2.1; else as it is."""
    return address[7:] if address.startswith("::ffff:") and "." in address else address


class AddressSet:
    """A list of networks, each as 10.0.0.0/8 or one address. An empty one is false, and has no address in it.

    Raises ValueError for what is no network, or has bits set behind its prefix.
    """

    __slots__ = ("_networks", "contains")

    def __init__(self, networks: Iterable[str] = ()) -> None:
        self._networks: tuple[Network, ...] = tuple(map(ipaddress.ip_network, networks))
        self.contains = lru_cache(maxsize=1024)(self._contains)
        """Whether an address is in one of them, which no other text is."""

    def __bool__(self) -> bool:
        return bool(self._networks)

    def _contains(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(plain_address(address).partition("%")[0])
        except ValueError:
            return False
        return any(ip in network for network in self._networks)
