"""Which process of a server with workers this is: the coordinator, or a worker."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Final

COORDINATOR: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of a process among those of its server.

    `workers` is the number of workers, `number` that of this one, from 1 on, or COORDINATOR.
    """

    number: int
    workers: int
    restarts: int = 0
    """How many processes of this number have ended before."""
    started_at: int = 0
    """When the supervisor started, in milliseconds since the Unix epoch."""
    addresses: tuple[tuple[str, int], ...] = ()
    """Host and port of every listening socket of the workers, for the coordinator."""
    control: socket.socket | None = None
    """The listening control socket, for the coordinator."""
    link: socket.socket | None = None
    """The listening socket for the workers, for the coordinator."""

    @property
    def is_worker(self) -> bool:
        """Whether a coordinator does for this process what must be done once."""
        return self.number != COORDINATOR

    @property
    def name(self) -> str:
        """The name of the process in its log lines."""
        return str(self.number) if self.is_worker else "coordinator"
