"""Allocate fixed-size records in packed memory that never moves.

Decides where records live, which slot is used next, and when memory is returned to the system. A session takes 152
bytes here; Python objects would take several times that.

Rules:
- Memory for the maximum number of records is reserved once, as an anonymous private mapping; only written pages use
  memory. A slab therefore grows without a copy that would block the event loop, and without fragmenting the heap.
- A field is a column, `column[slot]`: a strided view over the records. Fields used together are adjacent, because a
  check of one of 100,000 random tokens mostly waits for memory.
- Fields of a new slot keep their old values; the next user writes them all.
- The lowest chunk of 1,024 slots with a free slot is used first, so chunks at the end become empty over time and
  are returned. One empty chunk is kept to avoid growing and shrinking at a boundary.

It must not know: the content of the records.
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

SMALL: Final = 1 << 20
"""Bytes up to which memory is not mapped: that would take longer than all else of a small table."""

SMALL_CHUNK: Final = 64
"""Slots of a small table that are prepared at once."""

Format = Literal["B", "i", "I", "Q"]


class Memory:
    """Reserved memory. Unwritten bytes are 0."""

    def __init__(self, size: int) -> None:
        self._map: mmap.mmap | None = None
        if size <= SMALL:
            self.view = memoryview(bytearray(size))
            return
        # Private, so that a forked process gets its own copy.
        self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if _NO_HUGE_PAGES is not None:
            # Huge pages (2 MiB) would inflate every small table. A kernel without them raises.
            with suppress(OSError):
                self._map.madvise(_NO_HUGE_PAGES)
        self.view = memoryview(self._map)

    def discard(self, start: int, end: int) -> None:
        """Return the whole pages from `start` on to the system; nothing from `end` on is in use."""
        page = mmap.PAGESIZE
        first, last = -(start // -page) * page, min(-(end // -page) * page, len(self.view))
        if _DISCARD is not None and self._map is not None and first < last:
            self._map.madvise(_DISCARD, first, last - first)


class Slab:
    """Allocate slots 0 to `capacity` - 1, each with a record of `record_size` bytes.

    `link` is the offset of an "i" field that the slab writes while the slot is free.
    """

    def __init__(self, capacity: int, record_size: int, link: int) -> None:
        self._chunk = chunk = CHUNK if capacity * record_size > SMALL else SMALL_CHUNK
        self.capacity = -(capacity // -chunk) * chunk
        self.record_size = record_size
        self._memory = Memory(self.capacity * record_size)
        self.bytes = self._memory.view
        self._link = self.column("i", link)
        self._free_heads = array("i", [0])  # per chunk: its first free slot
        self._free = array("i", [0])  # per chunk: number of free slots; 0 until the first chunk is prepared
        self._lowest = 0  # no chunk below this has a free slot
        self.size = 0

    def column(self, format_: Format, offset: int) -> memoryview:
        """Return the field at `offset` of all records. Offset and record size are multiples of its size."""
        cells = self._memory.view.cast(format_)
        return cells[offset // cells.itemsize :: self.record_size // cells.itemsize]

    def allocate(self) -> int:
        """Return a free slot. The caller keeps the number in use below `capacity`."""
        chunk, free, heads = self._lowest, self._free, self._free_heads
        if not (left := free[chunk]):
            chunk = self._next_chunk()
            left = free[chunk]
        slot = heads[chunk]
        heads[chunk] = self._link[slot]
        free[chunk] = left - 1
        return slot

    def free_slot(self, slot: int) -> None:
        """Free a slot in use."""
        chunk = slot // self._chunk
        self._link[slot] = self._free_heads[chunk]
        self._free_heads[chunk] = slot
        self._free[chunk] += 1
        self._lowest = min(self._lowest, chunk)
        if self._free[chunk] == self._chunk:
            self.trim()

    def trim(self) -> None:
        """Return empty chunks at the end, except one, to the system; at most eight a call to bound its time."""
        free = self._free
        for _ in range(_TRIM):
            if len(free) < 2 or free[-1] < self._chunk or free[-2] < self._chunk:
                return
            end = self.size * self.record_size
            self._memory.discard(end - self._chunk * self.record_size, end)
            free.pop()
            self._free_heads.pop()
            self.size -= self._chunk

    def _next_chunk(self) -> int:
        """Return the lowest chunk with a free slot; prepare another one if all are full."""
        for chunk in range(self._lowest + 1, len(self._free)):
            if self._free[chunk]:
                self._lowest = chunk
                return chunk
        return self._grow()

    def _grow(self) -> int:
        first, end = self.size, self.size + self._chunk
        assert end <= self.capacity
        self._link[first:end] = memoryview(array("i", range(first + 1, end + 1)))
        chunk = self._lowest = first // self._chunk
        self._free_heads[chunk:], self._free[chunk:] = array("i", [first]), array("i", [self._chunk])
        self.size = end
        return chunk
