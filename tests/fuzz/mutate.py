"""Inputs made of others, by chance that is the same each time: for where there is no atheris."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_REMARKABLE = (
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


def mutations(kept: Sequence[bytes], longest: int, seed: int) -> Iterator[bytes]:
    """Without an end."""
    chance = random.Random(seed)
    known = list(kept) or [b""]
    while True:
        data = bytearray(chance.choice(known))
        for _ in range(chance.choice((1, 1, 2, 3, 5))):
            _change(data, known, chance)
        yield bytes(data[:longest])


def _change(data: bytearray, known: Sequence[bytes], chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    end = min(len(data), at + chance.choice((1, 1, 2, 4, 16, 64)))
    match chance.randrange(8):
        case 0 if at < len(data):
            data[at] ^= 1 << chance.randrange(8)
        case 1 if at < len(data):
            data[at] = chance.randrange(256)
        case 2 if at < len(data):
            data[at] = (data[at] + chance.choice((-1, 1))) % 256
        case 3:
            del data[at:end]
        case 4:
            data[at:at] = data[at:end] * chance.choice((1, 2, 20))
        case 5:
            data[at:end] = chance.choice(_REMARKABLE)
        case 6:
            other = chance.choice(known)
            start = chance.randrange(len(other) + 1)
            data[at:] = other[start:]
        case _:
            data[at:at] = chance.randbytes(chance.choice((1, 2, 4, 8)))
