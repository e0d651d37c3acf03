"""Mutate inputs with a seeded random generator, for platforms without atheris."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_SPECIAL = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0\0\0\0",
    b"\xff\xff\xff\xff",
    b"\x16\x03\x01",
    b"\r\n",
    b" ",
)


def mutations(corpus: Sequence[bytes], max_size: int, seed: int) -> Iterator[bytes]:
    """Yield mutated inputs endlessly."""
    rng = random.Random(seed)
    known = list(corpus) or [b""]
    while True:
        data = bytearray(rng.choice(known))
        for _ in range(rng.choice((1, 1, 2, 3, 5))):
            _mutate(data, known, rng)
        yield bytes(data[:max_size])


def _mutate(data: bytearray, known: Sequence[bytes], rng: random.Random) -> None:
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
    match rng.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.randrange(256)
        case 2 if at < len(data):
            data[at] = (data[at] + rng.choice((-1, 1))) % 256
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end] * rng.choice((1, 2, 20))
        case 5:
            data[at:end] = rng.choice(_SPECIAL)
        case 6:
            other = rng.choice(known)
            start = rng.randrange(len(other) + 1)
            data[at:] = other[start:]
        case _:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
