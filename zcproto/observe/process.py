"""What the system says of this process, by the names that Prometheus's own libraries give it.

prometheus_client has a collector for this. It lists all file descriptors to count them, which holds up a loop with
10,000 connections for 10 ms at each scrape; as of Linux 6.2 the folder of descriptors says how many it has.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from zcproto.observe import metric_table as table
from zcproto.observe.metrics import Reading

PROC: Final = Path("/proc")

_START_FIELD: Final = 19
"""Of those that follow the name in /proc/PID/stat (proc(5) counts from 1, and the name is the second)."""


class ProcessMetrics:
    """A source of metrics. Made once; it reads nothing where the system has no /proc like Linux's."""

    def __init__(self, proc: Path = PROC) -> None:
        self._self = proc / "self"
        self._page = resource.getpagesize()
        self._started_at = _started_at(proc)

    def __call__(self) -> Iterator[Reading]:
        yield table.CPU.at(used_cpu_s())
        yield table.MAX_FDS.at(_number(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
        if self._started_at is None:
            return
        yield table.STARTED.at(self._started_at)
        virtual, resident = (self._self / "statm").read_bytes().split()[:2]
        yield table.VIRTUAL.at(int(virtual) * self._page)
        yield table.RESIDENT.at(int(resident) * self._page)
        yield table.OPEN_FDS.at(open_descriptors(self._self / "fd"))


def used_cpu_s() -> float:
    """Seconds of processor time that this process has used."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def resident_bytes() -> int:
    """Memory of this process that is in RAM, in bytes; the largest so far where /proc is missing."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_descriptors(folder: Path) -> int:
    """How many descriptors a process has, by its folder of them."""
    return os.stat(folder).st_size or len(os.listdir(folder))


def _number(limit: int) -> float:
    return float("inf") if limit == resource.RLIM_INFINITY else limit


def _started_at(proc: Path) -> float | None:
    """Seconds since the Unix epoch; None where the system does not say."""
    try:
        booted = next(
            int(line.split()[1])
            for line in (proc / "stat").read_text().splitlines()
            if line.startswith("btime ")
        )
        ticks = int((proc / "self" / "stat").read_text().rpartition(")")[2].split()[_START_FIELD])
    except (OSError, StopIteration):
        return None
    return booted + ticks / os.sysconf("SC_CLK_TCK")
