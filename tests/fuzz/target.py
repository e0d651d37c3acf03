"""What a target of fuzzing is, and how one input is judged."""

from __future__ import annotations

import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")

PEER_LIMIT_S = 0.010
"""CPU that any input of a peer may take."""

FILE_LIMIT_S = 0.250
"""CPU that a file of the operator may take: it is read once, and all its faults are told."""

STRETCHED = 16_384
"""What a peer without a session may have in our memory: a frame, a ClientHello, the head of a request."""

_REPEATS = 7


class Target(NamedTuple):
    """Code that takes bytes from outside."""

    name: str
    take: Callable[[bytes], object]
    """What the product does with an input, once: this is what is timed."""
    check: Callable[[bytes], None]
    """Takes the input in several ways and asserts what must hold."""
    longest: int = 4_096
    """Bytes of an input that is made up."""
    limit_s: float = PEER_LIMIT_S
    stretches: bool = True
    """Whether an input is also timed over and over again, up to STRETCHED bytes, as a flood would send it."""


class TooSlowError(AssertionError):
    """An input takes more CPU than it may."""


def judge(target: Target, data: bytes, slowed: float = 1.0) -> None:
    """Raises what is wrong with how the target takes this input.

    `slowed` is how many times slower than usual everything is, as with code that notes its coverage.
    """
    target.check(data)
    check_time(target, data, slowed)
    if target.stretches and data:
        check_time(target, (data * (STRETCHED // len(data) + 1))[:STRETCHED], slowed)


def check_time(target: Target, data: bytes, slowed: float = 1.0) -> None:
    """Raises TooSlowError if an input takes too much CPU each time: a busy machine is slow now and then."""
    limit = target.limit_s * slowed
    least = limit
    for _ in range(_REPEATS):
        began = time.thread_time()
        target.take(data)
        least = min(least, time.thread_time() - began)
        if least < limit:
            return
    raise TooSlowError(f"{target.name}: {len(data)} bytes take {limit * 1000:.0f} ms and more")


def chance_of(data: bytes) -> random.Random:
    """Choices that are the same for the same input each time."""
    return random.Random(zlib.crc32(data))


def cut(data: bytes, most: int = 8) -> list[bytes]:
    """The data in pieces, some of them perhaps empty."""
    chance = chance_of(data)
    cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.randrange(1, most)))
    return [data[start:end] for start, end in itertools.pairwise([0, *cuts, len(data)])]


def ways_to_cut(data: bytes) -> Iterator[list[bytes]]:
    """Ways in which the data may arrive: at random, and byte by byte if it is short."""
    yield cut(data)
    if len(data) <= 200:
        yield [data[at : at + 1] for at in range(len(data))]


class Script:
    """Bytes, read as choices. Behind the end all is zero."""

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
        """Up to 255 bytes, behind their number."""
        size = self.byte()
        at = self._at
        self._at = at + size
        return self._data[at : at + size]

    def one_of(self, things: Sequence[T]) -> T:
        return things[self.byte() % len(things)]
