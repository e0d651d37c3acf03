"""Which addresses count as one: those that one customer has, who could change between them at will."""

from __future__ import annotations

import ipaddress
from functools import lru_cache

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
