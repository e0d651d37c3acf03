"""What tokens cost: memory of 100,000 live ones, a check of one, and the cleaning away of expired ones.

    python -m bench.micro.token_check [--tokens 100000] [--checks 1000000] [--json FILE]

- Memory is the resident memory of this process (/proc/self/statm) with the tokens open, above the same
  with an empty registry; each token has its refresh token, five to a user. The tokens themselves, which
  only clients have, are kept in memory that was there before.
- Each check is timed alone, in random order, and all of it three times over in the same order. The figure is
  the p99.9 of the checks, each with the median of its three times: a machine interrupts about one check in a
  thousand for longer than any check takes, but not the same one twice. The p99.9 of the single times stands
  beside it, and that of a loop that only hashes for as long: what the machine itself does.
- Cleaning is measured for both: tokens that lapse (their session can be refreshed), and sessions that end
  and leave. A slice is what holds the event loop; its time is that of this thread on the processor, the median
  of three registries that are cleaned in the same slices, for the same reason.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import time
from array import array
from hashlib import sha256
from pathlib import Path
from typing import Final, NamedTuple

from zcproto.common.clock import system_clock, system_entropy
from zcproto.errors import Code
from zcproto.sessions import TOKEN_SIZE, Session, SessionRegistry, SessionSettings

PASSES: Final = 3
PER_USER: Final = 5
CLEAN_SLOTS: Final = 2000
NS_PER_US: Final = 1000
NS_PER_MS: Final = 1_000_000
HASHES: Final = 6  # take about as long as a check

MAX_MEMORY_MB: Final = 30.0
MAX_CHECK_US: Final = 10.0
MIN_CLEAN_RATE: Final = 100_000.0
MAX_SLICE_MS: Final = 5.0


class Figure(NamedTuple):
    """One line of the table. Without a bar it only informs."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value >= self.bar if self.at_least else self.value < self.bar


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.micro.token_check", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="live tokens")
    parser.add_argument("--checks", type=int, default=1_000_000, help="checks that are timed")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args(arguments)
    if options.tokens < 1 or options.checks < 1:
        parser.error("at least one token and one check are needed")
    figures = measure(options.tokens, options.checks)
    return conclude(figures, options.json)


def measure(tokens: int, checks: int) -> list[Figure]:
    kept = bytearray(
        os.urandom(tokens * TOKEN_SIZE)
    )  # written, so that it is resident before the count begins
    wall = system_clock.wall()
    registry = SessionRegistry(SessionSettings(), system_entropy)
    before = resident_bytes()
    longest_open = fill(registry, tokens, wall, kept)
    memory = (resident_bytes() - before) / 1e6
    passes = time_checks(registry, kept, tokens, checks, wall)
    noise = sorted(time_hashes(checks))
    del registry
    lapsing_rate, lapsing_slice = time_cleaning(SessionSettings(), tokens, wall, kept)
    ending_rate, ending_slice = time_cleaning(SessionSettings(refresh=False), tokens, wall, kept)
    medians = sorted(map(statistics.median_low, zip(*passes, strict=True)))
    single = sorted(latency for each in passes for latency in each)
    return [
        Figure("live tokens", tokens, ""),
        Figure("memory above the empty registry", memory, "MB", MAX_MEMORY_MB),
        Figure("memory a token", memory * 1e6 / tokens, "B"),
        Figure("longest opening of a session", longest_open / NS_PER_US, "us"),
        Figure("check, p50", quantile(medians, 0.5), "us"),
        Figure("check, p99", quantile(medians, 0.99), "us"),
        Figure("check, p99.9", quantile(medians, 0.999), "us", MAX_CHECK_US),
        Figure("check, longest", medians[-1] / NS_PER_US, "us"),
        Figure("single times, p99.9", quantile(single, 0.999), "us"),
        Figure("single times, longest", single[-1] / NS_PER_US, "us"),
        Figure("the machine alone, p50", quantile(noise, 0.5), "us"),
        Figure("the machine alone, p99.9", quantile(noise, 0.999), "us"),
        Figure("tokens lapsed a second", lapsing_rate, "", MIN_CLEAN_RATE, at_least=True),
        Figure("longest slice, lapsing", lapsing_slice, "ms", MAX_SLICE_MS),
        Figure("sessions ended a second", ending_rate, "", MIN_CLEAN_RATE, at_least=True),
        Figure("longest slice, ending", ending_slice, "ms", MAX_SLICE_MS),
    ]


def fill(registry: SessionRegistry, tokens: int, wall: int, kept: bytearray) -> int:
    """Open so many sessions and keep their tokens; the longest opening in nanoseconds."""
    longest = 0
    for number in range(tokens):
        user = f"user-{number // PER_USER}"
        begin = time.thread_time_ns()
        opened = registry.open(user, operator=False, client="bench/1", address="127.0.0.1", wall=wall)
        longest = max(longest, time.thread_time_ns() - begin)
        kept[number * TOKEN_SIZE : (number + 1) * TOKEN_SIZE] = opened.token
    return longest


def time_checks(
    registry: SessionRegistry, kept: bytearray, tokens: int, checks: int, wall: int
) -> list[array[int]]:
    """Nanoseconds of each check, of all passes."""
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
    """Nanoseconds of each turn of a loop that waits for no memory."""
    latencies = array("Q", [0]) * times
    now = time.perf_counter_ns
    for position in range(times):
        begin = now()
        for _ in range(HASHES):
            sha256(b"0123456789abcdef0123456789abcdef").digest()
        latencies[position] = now() - begin
    return latencies


def time_cleaning(settings: SessionSettings, tokens: int, wall: int, kept: bytearray) -> tuple[float, float]:
    """Clean whole tables of these sessions; tokens a second, and the longest slice in milliseconds."""
    passes = []
    for _ in range(PASSES):
        registry = SessionRegistry(settings, system_entropy)
        fill(registry, tokens, wall, kept)
        passes.append(clean(registry, wall + settings.lifetime_ms))
    slices = list(map(statistics.median_low, zip(*passes, strict=True)))
    return tokens / (sum(slices) / 1e9), max(slices) / NS_PER_MS


def clean(registry: SessionRegistry, wall: int) -> list[int]:
    """Clean the whole table; the nanoseconds of each slice."""
    slices = []
    while len(registry):
        begin = time.thread_time_ns()
        registry.clean(wall, CLEAN_SLOTS)
        slices.append(time.thread_time_ns() - begin)
    return slices


def quantile(ordered: list[int], share: float) -> float:
    """A quantile of sorted nanoseconds, in microseconds."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] / NS_PER_US


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def conclude(figures: list[Figure], json_file: Path | None) -> int:
    """Show the figures, write them to a file if one is named, and give the exit code that they deserve."""
    show(figures)
    if json_file:
        rows = [{**figure._asdict(), "holds": figure.holds} for figure in figures]
        json_file.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(figure.holds for figure in figures) else 1


def show(figures: list[Figure]) -> None:
    width = max(len(figure.name) for figure in figures)
    print(f"{'':{width}}  {'figure':>12}     {'bar':>12}")
    for figure in figures:
        bar, verdict = "", ""
        if figure.bar is not None:
            bar = f"{'>=' if figure.at_least else '<'} {figure.bar:,g}"
            verdict = "pass" if figure.holds else "FAIL"
        print(f"{figure.name:{width}}  {figure.value:>12,.1f} {figure.unit:2}  {bar:>12}  {verdict}".rstrip())


if __name__ == "__main__":
    raise SystemExit(main())
