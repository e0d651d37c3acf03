"""Hold the connections whose handshake has not ended, and share what is limited between networks.

    accepted -> silent -> ready (complete ClientHello, no slot free) -> slot (handshake runs) -> open

Silent and ready connections take places. Places and slots are limited.

Rules:
- A network gets at most as many places as it leaves free: half of them if it is alone, a third each beside one
  other, and so on. Others always find a free place, and no place is reserved in vain. The same holds for slots.
- If a network, or all together, take all places, their oldest silent connection is dropped for the new one. A
  client needs one round trip for its ClientHello, so only flooders stay silent long enough to be the oldest.
- Slots go to the networks in turn, oldest connection first.

It must not know: why a connection is silent (no PROXY header, half a ClientHello), the cost of a handshake.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any, Final, Generic, Protocol, TypeVar

# The stages of a connection. Plain numbers: members of an enumeration are slow to look up.
ENDED: Final = 0
SILENT: Final = 1
READY: Final = 2
SLOT: Final = 3


class PendingConnection(Protocol):
    """A connection of `PendingHandshakes`, which sets `network` and `stage`."""

    network: Network[Any]
    stage: int

    def drop(self) -> None:
        """Leave, and close the connection."""


C = TypeVar("C", bound=PendingConnection)


class Network(Generic[C]):
    """The pending connections of one network, oldest first, and the slots that it has taken."""

    __slots__ = ("__weakref__", "name", "ready", "silent", "slots")

    def __init__(self, name: str) -> None:
        self.name = name
        # Dictionaries keep the order and delete in constant time.
        self.silent: dict[C, None] = {}
        self.ready: dict[C, None] = {}
        self.slots = 0

    @property
    def connections(self) -> int:
        """The connections whose handshake has not ended."""
        return len(self.silent) + len(self.ready) + self.slots


class PendingHandshakes(Generic[C]):
    """All networks. Both limits may change; places and slots in use are kept."""

    __slots__ = ("_networks", "_ready", "_silent", "max_places", "max_slots", "slots", "waiting")

    def __init__(self) -> None:
        self.max_places = self.max_slots = sys.maxsize
        self.slots = 0
        """Slots in use."""
        self.waiting = 0
        """Ready connections."""
        self._silent: dict[C, None] = {}
        self._ready: dict[Network[C], None] = {}  # in turn
        self._networks: weakref.WeakValueDictionary[str, Network[C]] = weakref.WeakValueDictionary()

    @property
    def silent(self) -> int:
        return len(self._silent)

    @property
    def places(self) -> int:
        """Places in use."""
        return len(self._silent) + self.waiting

    @property
    def is_full(self) -> bool:
        """Whether all places are taken by connections that are not dropped."""
        return self.waiting >= self.max_places

    def network(self, name: str) -> Network[C]:
        """Return the network of this name: the same one while anything refers to it."""
        network = self._networks.get(name)
        if network is None:
            network = self._networks[name] = Network(name)
        return network

    def make_room(self, network: Network[C]) -> bool:
        """Drop a silent connection if one more of this network needs it. Return False if none can be dropped."""
        free = self.max_places - len(self._silent) - self.waiting
        if len(network.silent) + len(network.ready) < free:
            return True
        return self.drop_oldest() if free <= 0 else _drop_first(network.silent)

    def drop_oldest(self) -> bool:
        """Drop the oldest silent connection of all. Return False if none is silent."""
        return _drop_first(self._silent)

    def join(self, connection: C, network: Network[C]) -> None:
        """Add a silent connection of a network, after `make_room`."""
        connection.network = network
        connection.stage = SILENT
        self._silent[connection] = network.silent[connection] = None

    def become_ready(self, connection: C) -> None:
        """Queue a silent connection for a slot."""
        self._free_place(connection)
        connection.stage = READY
        self.waiting += 1
        self._ready[connection.network] = connection.network.ready[connection] = None

    def take_slot(self, connection: C) -> bool:
        """Move a silent or ready connection to a slot. Return False if its network may not have one more."""
        network = connection.network
        if network.slots >= self.max_slots - self.slots:
            return False
        self._free_place(connection)
        connection.stage = SLOT
        network.slots += 1
        self.slots += 1
        return True

    def leave(self, connection: C) -> int:
        """Release the place or slot of a connection. Return its stage until now."""
        stage = connection.stage
        if stage == SLOT:
            connection.network.slots -= 1
            self.slots -= 1
        else:
            self._free_place(connection)
        connection.stage = ENDED
        return stage

    def _free_place(self, connection: C) -> None:
        """Release the place of a connection, if it has one."""
        network = connection.network
        if connection.stage == SILENT:
            del self._silent[connection], network.silent[connection]
        elif connection.stage == READY:
            self.waiting -= 1
            del network.ready[connection]
            if not network.ready:
                del self._ready[network]

    def next_ready(self) -> C | None:
        """Return the connection that gets the next slot; None if no network may have one more."""
        for network in self._ready:
            if network.slots < self.max_slots - self.slots:
                return next(iter(network.ready))
        return None

    def end_turn(self, network: Network[C]) -> None:
        """Let the other networks have a slot first."""
        if network in self._ready:
            self._ready[network] = self._ready.pop(network)


def _drop_first(connections: dict[C, None]) -> bool:
    for connection in connections:
        connection.drop()
        return True
    return False
