"""The machine that figures were measured on, and how fast it is beside the reference machine.

Bars in absolute time were set on one machine. `slowdown` times a fixed piece of work, the same kind of Python
and hashing as the measured code, and compares it with the time on that machine. A row in absolute time divides
its figure by the slowdown before it is held against its bar, and shows both.
"""

from __future__ import annotations

import os
import platform
import time
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgpack

from zcproto.load import report

PACKAGES: Final = ("zcproto", "uvloop", "cryptography", "msgpack", "pydantic", "h11")

REFERENCE_MS: Final = 8.2
"""CPU time of the fixed work on the reference machine, the one of spec/benchmarks.md."""

TRIES: Final = 15
TURNS: Final = 5_000


def machine() -> dict[str, Any]:
    """Return processor, memory, system and versions, and how busy the machine is now."""
    return {
        **report.machine(),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": [round(each, 2) for each in os.getloadavg()],
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def sentence(described: dict[str, Any]) -> str:
    """Return what `machine` returned as one line."""
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    return (
        f"{described['processor']}, {described['cpus']} cores, {described['memory_gib']:g} GiB, "
        f"{described['system']}; Python {described['python']}, {described['openssl']}, {packages}; "
        f"load average at the start {described['load_average'][0]:g}"
    )


def _processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def slowdown() -> float:
    """Return how many times slower than the reference machine this one is; 1.0 if it is not slower."""
    return max(1.0, fixed_work_ms() / REFERENCE_MS)


def fixed_work_ms() -> float:
    """Return the CPU time of the fixed work: the least of several tries, as interruptions only add to it."""
    return min(_timed_work() for _ in range(TRIES)) / 1e6


def _timed_work() -> int:
    begin = time.thread_time_ns()
    table: dict[bytes, int] = {}
    token = bytes(32)
    for turn in range(TURNS):
        token = sha256(token).digest()
        table[token] = turn
        method, params = msgpack.unpackb(msgpack.packb(["echo", {"n": turn, "data": token}]))
        assert method == "echo"
        assert params["n"] == table[params["data"]]
    return time.thread_time_ns() - begin
