"""What micro benchmarks share: durations as rows, memory, sessions in stores, and pauses of the loop."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from bench.report import Row
from zcproto.common.clock import system_clock, system_entropy
from zcproto.sessions import SessionRegistry, SessionSettings
from zcproto.sessions.record import SessionRecord, UserLimit
from zcproto.stores.base import Created, SessionStore
from zcproto.stores.sync import EXPIRE_PAUSE_S, EXPIRED_AT_ONCE

NS_PER: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}
SHARES: Final = {"p50": 0.5, "p99": 0.99, "p99.9": 0.999, "longest": 1.0}
PER_USER: Final = 5
STORE_TIMEOUT_S: Final = 900.0
"""Of stores and for their news, after which they hang: how long they take is what is measured."""

_TICK_S: Final = 0.001
_WARM_UP: Final = 5


def timed(act: Callable[[], object], times: int) -> list[int]:
    """Return the nanoseconds of each time, sorted, without the first ones, which find everything cold."""
    for _ in range(_WARM_UP):
        act()
    durations = []
    for _ in range(times):
        begin = time.perf_counter_ns()
        act()
        durations.append(time.perf_counter_ns() - begin)
    return sorted(durations)


def quantile(ordered: Sequence[int], share: float) -> int:
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def time_rows(
    key: str, label: str, ns: Sequence[int], unit: str, *names: str, below: Mapping[str, float] | None = None
) -> list[Row]:
    """Return these quantiles of durations, by their names in SHARES. `below` are their bars."""
    ordered, bars = sorted(ns), below or {}
    return [
        Row(
            f"{key}_{name.replace('.', '_')}_{unit}",
            f"{label}, {name}",
            quantile(ordered, SHARES[name]) / NS_PER[unit],
            unit,
            below=bars.get(name),
        )
        for name in names
    ]


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Pauses:
    """How much later than asked the timers of this loop are called."""

    def __init__(self) -> None:
        self._longest = 0.0
        self._ask()

    def _ask(self) -> None:
        self._due = time.perf_counter() + _TICK_S
        self._timer = asyncio.get_running_loop().call_later(_TICK_S, self._tick)

    def _tick(self) -> None:
        self._longest = max(self._longest, time.perf_counter() - self._due)
        self._ask()

    def stop(self) -> float:
        """Return the longest pause in milliseconds."""
        self._timer.cancel()
        return self._longest * 1e3


# --- sessions in stores ------------------------------------------------------------------------------------


def new_registry() -> SessionRegistry:
    return SessionRegistry(SessionSettings(), system_entropy)


class Opened(NamedTuple):
    """Sessions opened in a store."""

    rate: float
    """How many a second."""
    ns: array[int]
    """Of each opening."""


async def open_sessions(
    store: SessionStore, registry: SessionRegistry, sessions: int, at_once: int, first_user: int = 0
) -> Opened:
    """Open sessions as a server does, but for TLS and the proof of the user: so many tasks, one after the other
    each.
    """
    settings = SessionSettings()
    limit = UserLimit(settings.per_user, settings.when_full, settings.idle_timeout_ms)
    numbers, latencies = iter(range(sessions)), array("Q", [0]) * sessions

    async def work() -> None:
        for number in numbers:  # shared by all
            begin = time.perf_counter_ns()
            fields, token, refresh_token = registry.new_session(
                f"user-{first_user + number // PER_USER}",
                client="bench/1",
                address="127.0.0.1",
                wall=system_clock.wall(),
            )
            record = SessionRecord(*fields)
            assert await store.create(record, limit) == Created()
            assert registry.restore(record)
            assert registry.opened_session(record.id, token, refresh_token) is not None
            latencies[number] = time.perf_counter_ns() - begin

    begin = time.perf_counter_ns()
    await asyncio.gather(*(work() for _ in range(at_once)))
    return Opened(sessions / ((time.perf_counter_ns() - begin) / NS_PER["s"]), latencies)


class Cleaned(NamedTuple):
    """All sessions of a store removed as past their time."""

    rate: float
    """How many a second."""
    slices: list[int]
    """Nanoseconds of each slice."""
    pause_ms: float
    """The longest pause of the loop meanwhile."""


async def clean_store(store: SessionStore) -> Cleaned:
    """Remove all sessions in slices, as a server does."""
    settings = SessionSettings()
    wall = system_clock.wall() + settings.refresh_lifetime_ms + settings.lifetime_ms
    pauses, slices, removed, begin = Pauses(), list[int](), 0, time.perf_counter_ns()
    while True:
        slice_begin = time.perf_counter_ns()
        once = await store.expire(wall, settings.dead_keep_ms, EXPIRED_AT_ONCE)
        if not once:
            break
        slices.append(time.perf_counter_ns() - slice_begin)
        removed += once
        await asyncio.sleep(EXPIRE_PAUSE_S if once < EXPIRED_AT_ONCE else 0)
    rate = removed / ((time.perf_counter_ns() - begin) / NS_PER["s"])
    return Cleaned(rate, slices or [0], pauses.stop())
