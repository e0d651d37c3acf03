"""The cost of a token check and the memory of sessions, by their number: one point in a process of its own.

    python -m bench.curves.tokens SESSIONS CHECKS

Memory is measured in a fresh process, because an allocator that was used before reuses its memory. It prints one
JSON object: `check_us` is the median, `p99_us` the 99th percentile, `bytes` the resident memory above the empty
registry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Final, NamedTuple

from bench.micro.timing import quantile, resident_bytes
from bench.micro.token_check import fill, medians, time_checks
from bench.stage import bench_environment
from zcproto.common.clock import system_clock, system_entropy
from zcproto.errors import ZcprotoError
from zcproto.load.processes import module_command
from zcproto.sessions import TOKEN_SIZE, SessionRegistry, SessionSettings

TIMEOUT: Final = 600.0


class Point(NamedTuple):
    """A registry with so many live sessions."""

    check_us: float
    p99_us: float
    bytes: int


def measure(sessions: int, checks: int) -> Point:
    kept = bytearray(os.urandom(sessions * TOKEN_SIZE))  # resident before the count begins
    wall = system_clock.wall()
    registry = SessionRegistry(SessionSettings(), system_entropy)
    before = resident_bytes()
    fill(registry, sessions, wall, kept)
    used = resident_bytes() - before
    checked = sorted(medians(time_checks(registry, kept, sessions, checks, wall)))
    return Point(quantile(checked, 0.5) / 1000, quantile(checked, 0.99) / 1000, used)


def in_a_process(sessions: int, checks: int) -> Point:
    """Measure in a new process. Raises ZcprotoError if that fails."""
    done = subprocess.run(
        module_command("bench.curves.tokens", str(sessions), str(checks)),
        capture_output=True, text=True, timeout=TIMEOUT, env=bench_environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        raise ZcprotoError(f"bench.curves.tokens {sessions}: {done.stderr[-200:]}")
    return Point(**json.loads(done.stdout))


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), int(sys.argv[2]))._asdict()))
