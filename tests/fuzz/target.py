"""Define fuzz targets, and check one input of a target."""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from time import thread_time as cpu_time
from typing import NamedTuple, TypeVar

T = TypeVar("T")

PEER_LIMIT_S = 0.010
"""CPU limit for an input of a peer."""

FILE_LIMIT_S = 0.250
"""CPU limit for a file of the operator: it is read once, and all its faults are reported."""

FLOOD_SIZE = 16_384
"""Bytes that a peer without a session can have buffered: a frame, a ClientHello, the head of a request."""

_ATTEMPTS = 7


class Target(NamedTuple):
    """An entry point that receives bytes from outside."""

    name: str
    run: Callable[[bytes], object]
    """Pass an input to the product once; this is timed."""
    check: Callable[[bytes], None]
    """Pass an input in several ways and assert the invariants."""
    max_size: int = 4_096
    """Maximum size of a generated input."""
    limit_s: float = PEER_LIMIT_S
    repeats: bool = True
    """Also time the input repeated up to FLOOD_SIZE bytes, like a flood."""


class TooSlowError(AssertionError):
    """An input exceeds its CPU limit."""


def check_input(target: Target, data: bytes, slowdown_factor: float = 1.0) -> None:
    """Check an input and raise if it violates an invariant or its CPU limit.

    `slowdown_factor` raises the limit, for example for instrumented code.
    """
    target.check(data)
    check_time(target, data, slowdown_factor)
    if target.repeats and data:
        check_time(target, (data * (FLOOD_SIZE // len(data) + 1))[:FLOOD_SIZE], slowdown_factor)


def check_time(target: Target, data: bytes, slowdown_factor: float = 1.0) -> None:
    """Raise TooSlowError if every attempt exceeds the CPU limit.

    Single slow attempts are ignored, and the limit is scaled to the speed of the machine before the last attempts.
    """
    limit = target.limit_s * slowdown_factor
    if is_within(target, data, limit):
        return
    from bench import machine  # imports the product, which a search has to instrument first

    limit *= machine.slowdown()
    if not is_within(target, data, limit):
        raise TooSlowError(f"{target.name}: {len(data)} bytes take more than {limit * 1000:.0f} ms of CPU")


def is_within(target: Target, data: bytes, limit: float) -> bool:
    """Return whether one of several attempts takes less CPU time than the limit."""
    for _ in range(_ATTEMPTS):
        began = cpu_time()
        target.run(data)
        if cpu_time() - began < limit:
            return True
    return False


def random_for(data: bytes) -> random.Random:
    """Return a random generator seeded with the input."""
    return random.Random(zlib.crc32(data))


def divide(data: bytes, max_pieces: int = 8) -> list[bytes]:
    """Return the data in random pieces, of which some may be empty."""
    rng = random_for(data)
    cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, max_pieces)))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


def divisions(data: bytes) -> Iterator[list[bytes]]:
    """Yield divisions of the data: at random, and byte by byte if it is short."""
    yield divide(data)
    if len(data) <= 200:
        yield [data[at : at + 1] for at in range(len(data))]


class Script:
    """Read the bytes of an input as a sequence of choices; past the end all bytes are zero."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at >= len(self._data)

    def byte(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at] if at < len(self._data) else 0

    def number(self, size: int) -> int:
        return int.from_bytes(bytes(self.byte() for _ in range(size)), "big")

    def bytes(self) -> bytes:
        """Read a length byte and that many bytes."""
        size = self.byte()
        at = self._at
        self._at = at + size
        return self._data[at : at + size]

    def choose(self, options: Sequence[T]) -> T:
        return options[self.byte() % len(options)]
