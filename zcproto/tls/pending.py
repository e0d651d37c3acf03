"""Hold the connections whose handshake has not begun, and share what is limited between networks.

    accepted -> silent -> ready (complete ClientHello, no slot free) -> slot (handshake runs) -> open

Rules:
- A network gets at most as many places as it leaves free: half of them if it is alone, a third each beside one
  other, and so on. Others always find a free place, and no place is reserved in vain.
- If a network, or all together, take all places, their oldest silent connection is dropped for the new one. A
  client needs one round trip for its ClientHello, so only flooders stay silent long enough to be the oldest.
- Slots go to the networks in turn, oldest connection first.

It must not know: why a connection is silent (no PROXY header, half a ClientHello), the cost of a handshake.
"""

from __future__ import annotations

import sys
from typing import Generic, Protocol, TypeVar


class PendingConnection(Protocol):
    """A connection whose handshake has not begun. `network` stays the same from `join` to `leave`."""

    network: str

    def drop(self) -> None:
        """Leave, and close the connection."""


C = TypeVar("C", bound=PendingConnection)


class NetworkShares:
    """A number of places, shared between networks. `limit` may change; places in use are kept."""

    __slots__ = ("_by_network", "limit", "used")

    def __init__(self) -> None:
        self.limit = sys.maxsize
        self.used = 0
        self._by_network: dict[str, int] = {}

    def has_room(self, network: str) -> bool:
        return self._by_network.get(network, 0) < self.limit - self.used

    def of(self, network: str) -> int:
        """Return the places that a network uses."""
        return self._by_network.get(network, 0)

    def add(self, network: str) -> None:
        self.used += 1
        self._by_network[network] = self._by_network.get(network, 0) + 1

    def remove(self, network: str) -> None:
        self.used -= 1
        left = self._by_network[network] - 1
        if left:
            self._by_network[network] = left
        else:
            del self._by_network[network]


class PendingHandshakes(Generic[C]):
    """The silent and the ready connections; `shares` counts both."""

    __slots__ = ("_ready", "_silent", "_silent_of", "shares")

    def __init__(self) -> None:
        self.shares = NetworkShares()
        # Dictionaries keep the order and delete in constant time. All but `_silent` are by network.
        self._silent: dict[C, None] = {}
        self._silent_of: dict[str, dict[C, None]] = {}
        self._ready: dict[str, dict[C, None]] = {}

    @property
    def silent(self) -> int:
        return len(self._silent)

    @property
    def is_full(self) -> bool:
        """Whether all places are taken by connections that are not dropped."""
        return self.shares.used >= self.shares.limit and not self._silent

    def make_room(self, network: str) -> bool:
        """Drop a silent connection if one more of this network needs it. Return False if none can be dropped."""
        shares = self.shares
        if shares.has_room(network):
            return True
        if shares.used >= shares.limit:
            return self.drop_oldest()
        return _drop_first(self._silent_of.get(network))

    def drop_oldest(self) -> bool:
        """Drop the oldest silent connection of all. Return False if none is silent."""
        return _drop_first(self._silent)

    def join(self, connection: C) -> None:
        """Add a silent connection, after `make_room`."""
        self.shares.add(connection.network)
        self._silent[connection] = None
        self._silent_of.setdefault(connection.network, {})[connection] = None

    def become_ready(self, connection: C) -> None:
        """Queue a silent connection for a slot."""
        del self._silent[connection]
        _discard(self._silent_of, connection)
        self._ready.setdefault(connection.network, {})[connection] = None

    def leave(self, connection: C) -> bool:
        """Remove a connection. Return False if it is not pending."""
        if connection in self._silent:
            del self._silent[connection]
            _discard(self._silent_of, connection)
        elif connection in self._ready.get(connection.network, ()):
            _discard(self._ready, connection)
        else:
            return False
        self.shares.remove(connection.network)
        return True

    def next_ready(self, slots: NetworkShares) -> C | None:
        """Return the connection that gets the next slot; None if no network may have one more."""
        if slots.used >= slots.limit:
            return None
        # Each network passed over has at least as many slots as are free, so there are few.
        for network, connections in self._ready.items():
            if slots.has_room(network):
                return next(iter(connections))
        return None

    def end_turn(self, network: str) -> None:
        """Let the other networks have a slot first."""
        connections = self._ready.pop(network, None)
        if connections is not None:
            self._ready[network] = connections


def _discard(groups: dict[str, dict[C, None]], connection: C) -> None:
    group = groups[connection.network]
    del group[connection]
    if not group:
        del groups[connection.network]


def _drop_first(connections: dict[C, None] | None) -> bool:
    if not connections:
        return False
    next(iter(connections)).drop()
    return True
