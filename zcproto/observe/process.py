"""Read metrics of this process and its interpreter, under the names of Prometheus's own libraries.

prometheus_client's collector lists all file descriptors to count them, which blocks a loop with 10,000 connections
for 10 ms per scrape. Since Linux 6.2 the size of the descriptor folder is their number.
"""

from __future__ import annotations

import gc
import mmap
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

from zcproto.common.clock import used_cpu_s
from zcproto.observe.metrics import Reading

try:
    import resource
except ImportError:  # Windows
    HAS_USAGE = False
else:
    HAS_USAGE = True

PROC: Final = Path("/proc")

_START_FIELD: Final = 19
"""Index among the fields after the name in /proc/PID/stat (proc(5) counts from 1; the name is the second)."""


def process_readings(proc: Path = PROC) -> Iterator[Reading]:
    """Yield the metrics of this process; only some of them without a Linux-like /proc."""
    version = platform.python_version_tuple()
    yield "python_info", 1, platform.python_version(), platform.python_implementation(), *version
    for generation, counts in enumerate(gc.get_stats()):
        yield "python_gc_collections_total", counts["collections"], str(generation)
        yield "python_gc_objects_collected_total", counts["collected"], str(generation)
        yield "python_gc_objects_uncollectable_total", counts["uncollectable"], str(generation)
    yield "process_cpu_seconds_total", used_cpu_s()
    if HAS_USAGE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        yield "process_max_fds", float("inf") if limit == resource.RLIM_INFINITY else limit
    started_at = _started_at(proc)
    if started_at is None:
        return
    yield "process_start_time_seconds", started_at
    virtual, resident = (proc / "self" / "statm").read_bytes().split()[:2]
    yield "process_virtual_memory_bytes", int(virtual) * mmap.PAGESIZE
    yield "process_resident_memory_bytes", int(resident) * mmap.PAGESIZE
    yield "process_open_fds", open_descriptors(proc / "self" / "fd")


def resident_bytes() -> int:
    """Return the resident memory of this process in bytes; without /proc its maximum so far, 0 on Windows."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        if not HAS_USAGE:
            return 0
        unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kilobytes elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def open_descriptors(folder: Path) -> int:
    """Return the number of open descriptors in a process's descriptor folder."""
    return os.stat(folder).st_size or len(os.listdir(folder))


@cache
def _started_at(proc: Path) -> float | None:
    """Return the start time in seconds since the Unix epoch, or None without /proc."""
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
