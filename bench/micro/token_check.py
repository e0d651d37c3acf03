"""Tokens: memory of 100,000 live ones, a check of one, and the removal of expired ones.

Memory is the resident memory of this process with the tokens open, above the same with an empty registry; each
token has its refresh token, five to a user. The tokens themselves, which only clients have, are kept in memory
allocated before.

Each check is timed alone, in random order, and all of it three times in the same order. The figure is the p99.9
of the checks, each with the median of its three times: a machine interrupts about one check in a thousand for
longer than any check takes, but not the same one twice. The p99.9 of the single times stands beside it, and
that of a loop that only hashes for as long, which is the machine's.

Removal is measured for tokens that lapse (their session can be refreshed), and for sessions that end and leave.
A slice holds the event loop; its time is CPU time of this thread, the median of three registries that are
cleaned in the same slices, for the same reason.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from array import array
from hashlib import sha256
from typing import Final

import click

from bench.command import COUNT, measurement
from bench.micro.timing import NS_PER, PER_USER, resident_bytes, time_rows
from bench.report import Row
from zcproto.common.clock import system_clock, system_entropy
from zcproto.errors import Code
from zcproto.sessions import TOKEN_SIZE, Session, SessionRegistry, SessionSettings

PASSES: Final = 3
CLEAN_SLOTS: Final = 2000
HASHES: Final = 6
"""They take about as long as a check."""

MAX_MEMORY_MB: Final = 30.0
MAX_CHECK_US: Final = 10.0
MIN_CLEAN_RATE: Final = 100_000.0
MAX_SLICE_MS: Final = 5.0


def measure(tokens: int, checks: int) -> list[Row]:
    wall = system_clock.wall()
    kept = bytearray(
        os.urandom(tokens * TOKEN_SIZE)
    )  # written, so that it is resident before the count begins
    registry = SessionRegistry(SessionSettings(), system_entropy)
    before = resident_bytes()
    longest_open = fill(registry, tokens, wall, kept)
    memory = (resident_bytes() - before) / 1e6
    passes = time_checks(registry, kept, tokens, checks, wall)
    del registry
    lapsing = time_cleaning(SessionSettings(), tokens, wall, kept)
    ending = time_cleaning(SessionSettings(refresh=False), tokens, wall, kept)
    single = [latency for each in passes for latency in each]
    names, bars = ("p50", "p99", "p99.9", "longest"), {"p99.9": MAX_CHECK_US}
    return [
        Row("tokens", "live tokens", tokens),
        Row("memory_mb", "memory above the empty registry", memory, "MB", below=MAX_MEMORY_MB),
        Row("memory_a_token", "memory of a token", memory * 1e6 / tokens, "B"),
        *time_rows("opening", "opening of a session", [longest_open], "us", "longest"),
        *time_rows("check", "check", medians(passes), "us", *names, below=bars),
        *time_rows("single", "single times", single, "us", "p99.9", "longest"),
        *time_rows("machine", "the machine alone", time_hashes(checks), "us", "p50", "p99.9"),
        *cleaning_rows("lapsing", "tokens lapsed", tokens, lapsing),
        *cleaning_rows("ending", "sessions ended", tokens, ending),
    ]


def cleaning_rows(key: str, label: str, tokens: int, slices: list[int]) -> list[Row]:
    rate = tokens / (sum(slices) / NS_PER["s"])
    bars = {"longest": MAX_SLICE_MS}
    return [
        Row(f"{key}_rate", f"{label}, a second", rate, at_least=MIN_CLEAN_RATE),
        *time_rows(f"{key}_slice", f"{label}: slice", slices, "ms", "longest", below=bars),
    ]


def medians(passes: list[array[int]]) -> list[int]:
    """Return the median of the times of each check."""
    return list(map(statistics.median_low, zip(*passes, strict=True)))


def fill(registry: SessionRegistry, tokens: int, wall: int, kept: bytearray) -> int:
    """Open so many sessions and keep their tokens; return the longest opening in nanoseconds."""
    longest = 0
    for number in range(tokens):
        user = f"user-{number // PER_USER}"
        begin = time.thread_time_ns()
        opened = registry.open(user, client="bench/1", address="127.0.0.1", wall=wall)
        longest = max(longest, time.thread_time_ns() - begin)
        kept[number * TOKEN_SIZE : (number + 1) * TOKEN_SIZE] = opened.token
    return longest


def time_checks(
    registry: SessionRegistry, kept: bytearray, tokens: int, checks: int, wall: int
) -> list[array[int]]:
    """Return the nanoseconds of each check, of all passes."""
    order = array("I", random.Random(1).choices(range(tokens), k=checks))  # noqa: S311 - an order, no secret
    check, now = registry.check, time.perf_counter_ns
    passes = []
    for number in range(PASSES):
        latencies = array("Q", [0]) * checks
        for position, each in enumerate(order):
            token = bytes(kept[each * TOKEN_SIZE : (each + 1) * TOKEN_SIZE])
            begin = now()
            session = check(token, wall + number)
            latencies[position] = now() - begin
            assert isinstance(session, Session)
        passes.append(latencies)
    assert check(bytes(TOKEN_SIZE), wall) is Code.UNAUTHENTICATED
    return passes


def time_hashes(times: int) -> array[int]:
    """Return the nanoseconds of each turn of a loop that does not wait for memory."""
    latencies = array("Q", [0]) * times
    now = time.perf_counter_ns
    for position in range(times):
        begin = now()
        for _ in range(HASHES):
            sha256(b"0123456789abcdef0123456789abcdef").digest()
        latencies[position] = now() - begin
    return latencies


def time_cleaning(settings: SessionSettings, tokens: int, wall: int, kept: bytearray) -> list[int]:
    """Clean whole tables; return the median of the nanoseconds of each slice."""
    passes = []
    for _ in range(PASSES):
        registry = SessionRegistry(settings, system_entropy)
        fill(registry, tokens, wall, kept)
        passes.append(array("Q", clean(registry, wall + settings.lifetime_ms)))
    return medians(passes)


def clean(registry: SessionRegistry, wall: int) -> list[int]:
    """Clean the whole table; return the nanoseconds of each slice."""
    slices = []
    while len(registry):
        begin = time.thread_time_ns()
        registry.clean(wall, CLEAN_SLOTS)
        slices.append(time.thread_time_ns() - begin)
    return slices


@measurement
@click.option("--tokens", type=COUNT, default=100_000, show_default=True, help="Live tokens.")
@click.option("--checks", type=click.IntRange(1), default=1_000_000, show_default=True, help="Of tokens.")
def command(tokens: int, checks: int) -> list[Row]:
    return measure(tokens, checks)
