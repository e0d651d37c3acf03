"""A slab: records of one size, packed in memory that never moves; slots are handed out and taken back.

What this file decides: where records live, which slot is used next, and when memory is given back. A
session takes 144 bytes here; as Python objects it would take several times that.

Rules:
- Memory is reserved once, for as many records as there may ever be, as an anonymous private mapping. Only
  pages that were written to take up memory. So a slab grows without a copy that would stop the event
  loop, and without the holes that growing blocks leave in the allocator's heap.
- A field is a column of all its values, `column[slot]`: a view that steps over the rest of each record.
  What is needed together lies together: a check of a random one of 100,000 tokens mostly waits for
  memory.
- A slot's fields hold what its last user left there; the next user writes them all.
- The lowest chunk of 1,024 slots with a free one is used first. So chunks at the end empty themselves in
  time, and their pages go back to the system. One empty chunk is kept, so that a slab at a boundary does
  not grow and shrink all the time.

It must not know: what is in the records.
"""

from __future__ import annotations

import mmap
from array import array
from contextlib import suppress
from typing import Final, Literal

CHUNK: Final = 1024
_TRIM: Final = 8

_NO_HUGE_PAGES: Final[int | None] = getattr(mmap, "MADV_NOHUGEPAGE", None)
_DISCARD: Final[int | None] = getattr(mmap, "MADV_DONTNEED", None)

Format = Literal["B", "i", "I", "Q"]


class Memory:
    """Reserved memory. What was never written reads as 0."""

    __slots__ = ("_map", "view")

    def __init__(self, size: int) -> None:
        # Private, so that a forked process goes on with a copy of its own.
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _NO_HUGE_PAGES is not None:
            # Huge pages (2 MiB) would make every small table a large one. A kernel that has none refuses.
            with suppress(OSError):
                self._map.madvise(_NO_HUGE_PAGES)
        self.view = memoryview(self._map)

    def discard(self, start: int, end: int) -> None:
        """Give back the whole pages from `start` on; nothing from `end` on is in use."""
        page = mmap.PAGESIZE
        first, last = -(start // -page) * page, min(-(end // -page) * page, len(self._map))
        if _DISCARD is not None and first < last:
            self._map.madvise(_DISCARD, first, last - first)


class Slab:
    """Hands out slots, numbered from 0 and at most `capacity`, each with a record of `record_size` bytes.

    `link` is the offset of an "i" field that the slab may write to while the slot is free.
    """

    __slots__ = (
        "_free",
        "_free_heads",
        "_link",
        "_lowest",
        "_memory",
        "bytes",
        "capacity",
        "free",
        "record_size",
        "size",
    )

    def __init__(self, capacity: int, record_size: int, link: int) -> None:
        self.capacity = -(capacity // -CHUNK) * CHUNK
        self.record_size = record_size
        self._memory = Memory(self.capacity * record_size)
        self.bytes = self._memory.view
        self._link = self.column("i", link)
        self._free_heads = array("i")  # for each chunk: its first free slot
        self._free = array("i")  # for each chunk: how many are free
        self._lowest = 0  # no chunk below this has a free slot
        self.free = 0
        self.size = 0

    @property
    def used(self) -> int:
        return self.size - self.free

    def column(self, format_: Format, offset: int) -> memoryview:
        """The field at `offset` of all records; both are multiples of its size."""
        cells = self._memory.view.cast(format_)
        return cells[offset // cells.itemsize :: self.record_size // cells.itemsize]

    def take(self) -> int:
        """A free slot. The caller sees to it that no more than `capacity` are in use."""
        if not self.free:
            self._grow()
        chunk = self._lowest
        while not self._free[chunk]:
            chunk += 1
        self._lowest = chunk
        slot = self._free_heads[chunk]
        self._free_heads[chunk] = self._link[slot]
        self._free[chunk] -= 1
        self.free -= 1
        return slot

    def give_back(self, slot: int) -> None:
        """Free a slot that is in use."""
        chunk = slot // CHUNK
        self._link[slot] = self._free_heads[chunk]
        self._free_heads[chunk] = slot
        self._free[chunk] += 1
        self.free += 1
        self._lowest = min(self._lowest, chunk)
        if self._free[chunk] == CHUNK:
            self.trim()

    def trim(self) -> None:
        """Give back empty chunks at the end, but for one; at most eight a call, to keep it short."""
        free = self._free
        for _ in range(_TRIM):
            if len(free) < 2 or free[-1] < CHUNK or free[-2] < CHUNK:
                return
            end = self.size * self.record_size
            self._memory.discard(end - CHUNK * self.record_size, end)
            free.pop()
            self._free_heads.pop()
            self.free -= CHUNK
            self.size -= CHUNK

    def _grow(self) -> None:
        first, end = self.size, self.size + CHUNK
        assert end <= self.capacity
        self._link[first:end] = memoryview(array("i", range(first + 1, end + 1)))
        self._free_heads.append(first)
        self._free.append(CHUNK)
        self._lowest = len(self._free) - 1
        self.free += CHUNK
        self.size = end
