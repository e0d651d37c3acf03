"""Which process of a server this is (the only one, the coordinator, a worker), and how many workers there are."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from zcproto.config import Config

COORDINATOR: Final = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The place of a process among those of its server.

    `workers` is their number; 1 means that there is only this process. `number` is that of a worker, from 1 on, or
    COORDINATOR.
    """

    number: int = 1
    workers: int = 1
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
    def is_single(self) -> bool:
        return self.workers == 1

    @property
    def is_coordinator(self) -> bool:
        return self.workers > 1 and self.number == COORDINATOR

    @property
    def is_worker(self) -> bool:
        """Whether a coordinator does for this process what must be done once."""
        return self.workers > 1 and self.number != COORDINATOR

    @property
    def name(self) -> str:
        """The name of the process in its log lines; empty if it is the only one."""
        if self.is_single:
            return ""
        return "coordinator" if self.is_coordinator else str(self.number)


ONLY_PROCESS: Final = Place()

_CPU_LIMIT: Final = Path("/sys/fs/cgroup/cpu.max")
"""The share of a container: the microseconds of CPU time in each period, or "max", and the period."""


def worker_count(config: Config) -> int:
    """Return the number of workers of a configuration."""
    return usable_cores() if config.server.workers is None else config.server.workers


def usable_cores(cpu_limit: Path = _CPU_LIMIT) -> int:
    """Return the number of cores that this process may use, by its affinity and the limit of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        share, period = cpu_limit.read_text().split()
        return max(1, min(cores, round(int(share) / int(period))))
    except (OSError, ValueError, ZeroDivisionError):  # no container, or no limit
        return cores
