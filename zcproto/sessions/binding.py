"""What sessions need beside their tokens: a user who is still one, the network and the client of their opening.

What this file decides: whether a token may be used from an address, and a refresh token by a client.

Rules:
- Network and client are off by default: clients move between networks, and a client string is anybody's to copy.
- User and address are looked at when a connection uses a token for the first time, and whenever a session is
  refreshed. Sessions of a user who is removed while a server runs end by themselves; this is for those that
  outlived a server, or come from another.
- A client says what it is when it opens or refreshes a session, and nowhere else: there it is looked at.
- Who is refused learns what somebody with an unknown token learns. The session lives on: ending it would let
  whoever found a token end it, too.

It must not know: connections, how sessions are kept.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from zcproto.errors import Unauthenticated
from zcproto.sessions.record import SessionRecord

OFF: Final = "off"
EXACT: Final = "exact"

_IPV4_BITS: Final = 32
_IPV6_SITE: Final = 64
"""What one IPv6 site is given at least: a prefix as short as those of IPv4 would be a whole provider's."""


class Binding:
    """The binding of all sessions. `address` is "off", "exact" or the length of a prefix.

    `is_user` says whether somebody may open sessions now; None if nobody can tell. `refused_users`,
    `refused_addresses` and `refused_clients` count.
    """

    def __init__(self, address: str = OFF, client: bool = False) -> None:
        self._address = address
        self._client = client
        self.is_user: Callable[[str], bool] | None = None
        self.refused_users = 0
        self.refused_addresses = 0
        self.refused_clients = 0

    def reconfigure(self, address: str, client: bool) -> None:
        """Go by other settings. Connections that use a session already are not asked again."""
        self._address = address
        self._client = client

    @property
    def asks(self) -> bool:
        """Whether a token alone may not be enough."""
        return self._address != OFF or self.is_user is not None

    def admits(self, user: str, opened_at: str, address: str) -> bool:
        """Whether a user's session that was opened at one address may be used from another."""
        if self.is_user is not None and not self.is_user(user):
            self.refused_users += 1
            return False
        if self._address == OFF or address == opened_at:
            return True
        bits = None if self._address == EXACT else int(self._address)
        if network(opened_at, bits) == network(address, bits):
            return True
        self.refused_addresses += 1
        return False

    def check_refresh(self, record: SessionRecord | None, client: str, address: str) -> None:
        """Refuse to refresh a session from elsewhere, or for another client. Nothing is spent by that.

        Raises Unauthenticated, as for a refresh token that is not known.
        """
        if record is None:
            return
        if self._client and client != record.client:
            self.refused_clients += 1
        elif self.admits(record.user, record.address, address):
            return
        raise Unauthenticated("the refresh token is not known; open a session")


@lru_cache(maxsize=1024)
def network(address: str, bits: int | None) -> str:
    """The network that an address is in; itself without `bits`, and where it is no address.

    Up to 32 bits are of an IPv4 address, and an IPv6 one goes by its site. More are of an IPv6 address, and an
    IPv4 one stands for itself.
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
