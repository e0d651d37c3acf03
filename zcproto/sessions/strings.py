"""Strings kept once, however many sessions have them.

What this file decides: user names, client names and addresses become small numbers in a session's record.
Each string is counted, and given up with its last use, so that strings chosen by peers do not pile up.

Rules:
- The string found last is remembered: a login asks for its user twice, and most clients are of one product.
- A string of up to `inline` bytes of UTF-8 lies in its record, which takes half of what an object and a
  place in a dict would; the few longer ones are objects beside it.

It must not know: what the strings mean.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from zcproto.sessions.index import MIN_BUCKETS, LinearHash
from zcproto.sessions.slab import Slab

UNKNOWN: Final = -1

_NEXT, _HASH, _USES, _MARK, _TEXT = 0, 4, 8, 12, 16
_HASH_MASK: Final = 0xFFFF_FFFF


class StringTable:
    """Numbers for strings, with a count of uses each.

    `marks` is a field for the owner: a number for each string, which it sets when `uses` becomes 1. `least` is
    for the index.
    """

    __slots__ = (
        "_bytes",
        "_index",
        "_inline",
        "_last",
        "_last_text",
        "_long",
        "_record_size",
        "_text",
        "marks",
        "slab",
        "uses",
    )

    def __init__(self, capacity: int, inline: int, least: int = MIN_BUCKETS) -> None:
        assert inline % 4 == 3  # with the byte for the length, the record is of whole cells
        self._inline = inline
        self._record_size = _TEXT + 1 + inline
        self._text = Struct(f"{_TEXT}x{inline + 1}p")
        self.slab = Slab(capacity, self._record_size, link=_USES)
        self._index = LinearHash(self.slab, hash_=_HASH, next_=_NEXT, least=least)
        self._bytes = self.slab.bytes
        self._long: dict[int, bytes] = {}
        self._last_text: str | None = None
        self._last = UNKNOWN
        self.uses = self.slab.column("i", _USES)
        self.marks = self.slab.column("i", _MARK)

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, number: int) -> str:
        return self._value(number).decode("utf-8", "surrogatepass")

    def find(self, text: str) -> int:
        """The number of a string that is in use, or -1."""
        if text == self._last_text:
            return self._last
        number = self._find(text.encode("utf-8", "surrogatepass"))
        if number != UNKNOWN:
            self._last_text, self._last = text, number
        return number

    def take(self, text: str) -> int:
        """The number of a string, with one more use of it."""
        if text == self._last_text:
            self.uses[self._last] += 1
            return self._last
        value = text.encode("utf-8", "surrogatepass")
        number = self._find(value)
        if number == UNKNOWN:
            number = self.slab.take()
            self.uses[number] = 0
            if len(value) > self._inline:
                self._long[number] = value
            else:
                start = number * self._record_size + _TEXT
                self._bytes[start] = len(value)
                self._bytes[start + 1 : start + 1 + len(value)] = value
            self._index.add(number, hash(value) & _HASH_MASK)
        self.uses[number] += 1
        self._last_text, self._last = text, number
        return number

    def give_back(self, number: int) -> None:
        """One use less; the string is forgotten with the last one."""
        self.uses[number] -= 1
        if not self.uses[number]:
            if number == self._last:
                self._last_text, self._last = None, UNKNOWN
            self._index.remove(number)
            self._long.pop(number, None)
            self.slab.give_back(number)

    def _find(self, value: bytes) -> int:
        for number in self._index.chain(hash(value) & _HASH_MASK):
            if self._value(number) == value:
                return number
        return UNKNOWN

    def _value(self, number: int) -> bytes:
        if self._long and number in self._long:
            return self._long[number]
        text: bytes = self._text.unpack_from(self._bytes, number * self._record_size)[0]
        return text
