"""Intern strings with reference counts.

User names, client names and addresses become small numbers in a session record. A string is freed with its last
use, so strings chosen by peers do not accumulate.

Rules:
- The last string searched is cached: a login looks up its user twice, and most clients are of one product.
- A string of up to `inline` bytes of UTF-8 is stored in its record, half the size of an object and a dict entry;
  longer ones are separate objects.

It must not know: the meaning of the strings.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from zcproto.sessions.index import END, MIN_BUCKETS, LinearHash
from zcproto.sessions.slab import Slab

UNKNOWN: Final = -1

_NEXT, _HASH, _USES, _MARK, _TEXT = 0, 4, 8, 12, 16
_HEAD: Final = "=iIii"
_HASH_MASK: Final = 0xFFFF_FFFF


class StringTable:
    """Map strings to numbers and count the uses of each.

    `marks` is a number per string for the owner, UNKNOWN at first. `least` is the minimum number of buckets of the
    index.
    """

    def __init__(self, capacity: int, inline: int, least: int = MIN_BUCKETS) -> None:
        assert inline % 4 == 3  # with the length byte, records align to 4 bytes
        self._inline = inline
        self._record_size = _TEXT + 1 + inline
        self._text = Struct(f"{inline + 1}p")
        self._record = Struct(f"{_HEAD}{inline + 1}p")
        self.slab = Slab(capacity, self._record_size, link=_USES)
        self._index = LinearHash(self.slab, hash_=_HASH, next_=_NEXT, least=least)
        self._bytes = self.slab.bytes
        self._long: dict[int, bytes] = {}
        self._last_text: str | None = None
        self._last_value = b""
        self._last = UNKNOWN
        self.uses = self.slab.column("i", _USES)
        self.marks = self.slab.column("i", _MARK)

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, number: int) -> str:
        return self._value(number).decode("utf-8", "surrogatepass")

    def find(self, text: str) -> int:
        """Return the number of a string in use, or UNKNOWN."""
        if text != self._last_text:
            self._last_text, self._last = text, UNKNOWN
            value = self._last_value = text.encode("utf-8", "surrogatepass")
            for number in self._index.chain(hash(value) & _HASH_MASK):
                if self._value(number) == value:
                    self._last = number
        return self._last

    def acquire(self, text: str) -> int:
        """Return the number of a string and add one use."""
        number = self.find(text)
        if number != UNKNOWN:
            self.uses[number] += 1
            return number
        value = self._last_value
        number = self._last = self.slab.allocate()
        if len(value) > self._inline:
            self._long[number] = value
        start = number * self._record_size
        self._record.pack_into(self._bytes, start, END, hash(value) & _HASH_MASK, 1, UNKNOWN, value)
        self._index.enter(number)
        return number

    def release(self, number: int) -> None:
        """Remove one use; free the string with the last one."""
        self.uses[number] -= 1
        if not self.uses[number]:
            if number == self._last:
                self._last_text, self._last = None, UNKNOWN
            self._index.remove(number)
            self._long.pop(number, None)
            self.slab.free_slot(number)

    def _value(self, number: int) -> bytes:
        if self._long and number in self._long:
            return self._long[number]
        text: bytes = self._text.unpack_from(self._bytes, number * self._record_size + _TEXT)[0]
        return text
