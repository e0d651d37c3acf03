"""Bind sessions to an existing user, and optionally to the network and client that opened them.

Decides whether a token may be used from an address, and a refresh token by a client.

Rules:
- Network and client are off by default: clients move between networks, and a client string is easy to copy.
- The users of an application's own schemes are its own: they are not looked up.
- User and address are checked when a connection first uses a token, and at every refresh. Removing a user ends the
  sessions known to a running server; this check covers sessions that outlived a server or come from another one.
- A session carries a digest of the key and the roles that opened it, its origin. Replacing them ends the sessions
  that servers and stores know; this check covers those that an older copy of a store brings back.
- The client string is sent only when a session is opened or refreshed, and is checked there.
- A refusal looks the same as for an unknown token. The session stays: otherwise a stolen token could end it.

It must not know: connections, how sessions are stored.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from zcproto.errors import Unauthenticated
from zcproto.sessions.record import SessionRecord
from zcproto.sessions.session import EXTERNAL

OFF: Final = "off"
EXACT: Final = "exact"

_IPV4_BITS: Final = 32
_IPV6_SITE: Final = 64
"""The smallest prefix assigned to an IPv6 site; one as short as in IPv4 would cover a whole provider."""


class SessionBinding:
    """The binding of all sessions. `address` is "off", "exact" or a prefix length.

    `is_user` returns True if a user may open sessions; None if users cannot be looked up. `origin_of` returns the
    origin of a session that a user opens now, bound to a key or to none; `is_origin` whether that of an older one
    still applies. `refused_users`, `refused_addresses` and `refused_clients` are counters.
    """

    def __init__(self, address: str = OFF, client: bool = False) -> None:
        self._address = address
        self._client = client
        self.is_user: Callable[[str], bool] | None = None
        self.origin_of: Callable[[str, str], bytes] = lambda user, key: b""
        self.is_origin: Callable[[str, str, bytes], bool] = lambda user, key, origin: True
        self.refused_users = 0
        self.refused_addresses = 0
        self.refused_clients = 0

    def reconfigure(self, address: str, client: bool) -> None:
        """Apply new settings. Connections already using a session are not checked again."""
        self._address = address
        self._client = client

    @property
    def is_enabled(self) -> bool:
        """Return True if a valid token may still be refused."""
        return self._address != OFF or self.is_user is not None

    def admits(self, record: SessionRecord, address: str) -> bool:
        """Return True if a session may be used from an address."""
        if (
            self.is_user is not None
            and not record.flags & EXTERNAL
            and not (self.is_user(record.user) and self._has_origin(record))
        ):
            self.refused_users += 1
            return False
        opened_at = record.address
        if self._address == OFF or address == opened_at:
            return True
        bits = None if self._address == EXACT else int(self._address)
        if network(opened_at, bits) == network(address, bits):
            return True
        self.refused_addresses += 1
        return False

    def _has_origin(self, record: SessionRecord) -> bool:
        return not record.origin or self.is_origin(record.user, record.key, record.origin)

    def check_refresh(self, record: SessionRecord | None, client: str, address: str) -> None:
        """Refuse a refresh from another network or client, without spending the refresh token.

        Raises Unauthenticated, as for an unknown refresh token.
        """
        if record is None:
            return
        if self._client and client != record.client:
            self.refused_clients += 1
        elif self.admits(record, address):
            return
        raise Unauthenticated("unknown refresh token; open a session")


@lru_cache(maxsize=1024)
def network(address: str, bits: int | None) -> str:
    """Return the network of an address; the address itself without `bits` or if it is not an IP address.

    Up to 32 bits apply to IPv4, and IPv6 addresses use their site prefix. More bits apply to IPv6, and IPv4
    addresses are kept whole.
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
        ip = ip.ipv4_mapped
    if bits is None:
        return str(ip)
    if isinstance(ip, ipaddress.IPv4Address):
        return str(ipaddress.IPv4Network((int(ip), min(bits, _IPV4_BITS)), strict=False))
    return str(ipaddress.IPv6Network((int(ip), bits if bits > _IPV4_BITS else _IPV6_SITE), strict=False))
