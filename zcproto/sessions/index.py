"""Find slots by hash: those of sessions by digests, and those of strings, which count their uses.

A dict would double its memory and block the event loop for the whole rehash each time it grows. This is linear
hashing (Litwin 1980) with chains: an insert splits at most one bucket, a removal joins at most two, and an entry
costs 12 to 16 bytes.

User names, client names and addresses become small numbers in a session record. A string is freed with its last
use, so strings chosen by peers do not accumulate.

Rules:
- With n buckets, `mask` is the smallest 2**k - 1 with n <= 2**k. A hash belongs to bucket `hash & mask` or, if that
  bucket does not exist yet, to `hash & (mask >> 1)`, from which it will split off.
- There are one to two buckets per entry, but never fewer than initially, so an index sized for some thousands of
  entries does not split buckets for them.
- The last string searched is cached: a login looks up its user twice, and most clients are of one product.
- A string of up to `inline` bytes of UTF-8 is stored in its record, half the size of an object and a dict entry;
  longer ones are separate objects.
- Hashes are SHA-256 of secrets made by the server or Python's keyed string hash, so a peer cannot target a chain.

It must not know: what digests and strings mean.
"""

from __future__ import annotations

from array import array
from hmac import compare_digest
from struct import Struct
from typing import Final

from zcproto.sessions.slab import Memory, Slab

END: Final = -1
MIN_BUCKETS: Final = 8
_HEAD_SIZE: Final = array("i").itemsize
_HEADS_DISCARDED: Final = 4096

_NEXT, _HASH, _USES, _MARK, _TEXT = 0, 4, 8, 12, 16
_HEAD: Final = "=iIii"
_HASH_MASK: Final = 0xFFFF_FFFF

_hash_of = Struct("=I").unpack_from
"""Returns a tuple with the hash of a digest, its first four bytes. Half the cost of `int.from_bytes`."""


class LinearHash:
    """Index slots of a slab by 32-bit hashes. Several slots may have the same hash.

    `hash_` and `next_` are the offsets of an "I" and an "i" field in the slab's records. `least` is the minimum
    number of buckets, four bytes each: a power of two, at most the slab's capacity.
    """

    def __init__(self, slab: Slab, *, hash_: int, next_: int, least: int = MIN_BUCKETS) -> None:
        assert least.bit_count() == 1
        assert least <= slab.capacity
        self._hashes = slab.column("I", hash_)
        self._next = slab.column("i", next_)
        self._memory = Memory(slab.capacity * _HEAD_SIZE)
        self._heads = self._memory.view.cast("i")
        self._heads[:least] = memoryview(array("i", [END]) * least)
        self._least = least
        self._mask = least - 1
        self.buckets = least
        self.count = 0

    def _bucket(self, hash_: int) -> int:
        bucket = hash_ & self._mask
        return bucket if bucket < self.buckets else bucket & (self._mask >> 1)

    def chain(self, hash_: int) -> list[int]:
        """Return the slots with this hash."""
        bucket = hash_ & self._mask  # `_bucket` inlined here and below: every login comes here
        if bucket >= self.buckets:
            bucket &= self._mask >> 1
        slots, slot = [], self._heads[bucket]
        while slot != END:
            if self._hashes[slot] == hash_:
                slots.append(slot)
            slot = self._next[slot]
        return slots

    def enter(self, slot: int) -> int:
        """Add a slot, which is not in the index, whose record holds its hash, and END as its link.

        Return another entry that was in its bucket, or END.
        """
        bucket = self._hashes[slot] & self._mask
        if bucket >= self.buckets:
            bucket &= self._mask >> 1
        heads = self._heads
        following: int = heads[bucket]
        if following != END:
            self._next[slot] = following
        heads[bucket] = slot
        count = self.count = self.count + 1
        if count > self.buckets:
            self._split()
        return following

    def remove(self, slot: int) -> None:
        """Remove a slot that is in the index."""
        following = self._next
        bucket = self._bucket(self._hashes[slot])
        other = self._heads[bucket]
        if other == slot:
            self._heads[bucket] = following[slot]
        else:
            while following[other] != slot:
                other = following[other]
            following[other] = following[slot]
        self.count -= 1
        while 2 * self.count < self.buckets > self._least:
            self._join()

    def _split(self) -> None:
        """Add a bucket and move its entries there from the bucket that held them."""
        heads, following, hashes = self._heads, self._next, self._hashes
        new = self.buckets
        if new > self._mask:
            self._mask = 2 * self._mask + 1
        mask = self._mask
        old = new & (mask >> 1)
        slot, kept, moved = heads[old], END, END
        while slot != END:
            after = following[slot]
            if hashes[slot] & mask == new:
                following[slot] = moved
                moved = slot
            else:
                following[slot] = kept
                kept = slot
            slot = after
        heads[old] = kept
        heads[new] = moved
        self.buckets = new + 1

    def _join(self) -> None:
        """Remove the last bucket and return its entries to the bucket that it split off from."""
        heads, following = self._heads, self._next
        last = self.buckets - 1
        old = last & (self._mask >> 1)
        slot = heads[last]
        if slot != END:
            tail = slot
            while following[tail] != END:
                tail = following[tail]
            following[tail] = heads[old]
            heads[old] = slot
        self.buckets = last
        if last == (self._mask >> 1) + 1:
            self._mask >>= 1
        if last % _HEADS_DISCARDED == 0:
            self._memory.discard(last * _HEAD_SIZE, (last + _HEADS_DISCARDED) * _HEAD_SIZE)


class DigestIndex(LinearHash):
    """Index slots of a slab by a digest field at `offset`, whose first four bytes are the hash."""

    def __init__(self, slab: Slab, *, offset: int, width: int, next_: int, least: int = MIN_BUCKETS) -> None:
        super().__init__(slab, hash_=offset, next_=next_, least=least)
        self._bytes = slab.bytes
        self._record_size = slab.record_size
        self._offset = offset
        self._width = width

    def __getitem__(self, slot: int) -> bytes:
        start = slot * self._record_size + self._offset
        return self._bytes[start : start + self._width].tobytes()

    def find(self, digest: bytes) -> int:
        """Return the slot of a digest, or END. Accepts any bytes. The final comparison runs in constant time."""
        # On the path of every token check, so `chain` is inlined.
        if len(digest) != self._width:
            return END
        hash_: int = _hash_of(digest)[0]
        hashes = self._hashes
        bucket = hash_ & self._mask
        if bucket >= self.buckets:
            bucket &= self._mask >> 1
        slot = self._heads[bucket]
        while slot != END:
            if hashes[slot] == hash_:
                start = slot * self._record_size + self._offset
                if compare_digest(self._bytes[start : start + self._width], digest):
                    return slot
            slot = self._next[slot]
        return END

    def repeats(self, slot: int) -> bool:
        """Return True if another slot has the same digest."""
        digest = self[slot]
        return any(other != slot and self[other] == digest for other in self.chain(self._hashes[slot]))

    def put(self, slot: int, digest: bytes) -> None:
        """Write a digest to a slot and add the slot, which is not in the index."""
        start = slot * self._record_size + self._offset
        self._bytes[start : start + self._width] = digest
        self._next[slot] = END
        self.enter(slot)


class StringTable:
    """Map strings to numbers and count the uses of each.

    `marks` is a number per string for the owner, END at first. `least` is the minimum number of buckets of the
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
        self._long: dict[int, str] = {}
        self._last_text: str | None = None
        self._last_value = b""
        self._last = END
        self.uses = self.slab.column("i", _USES)
        self.marks = self.slab.column("i", _MARK)

    def __len__(self) -> int:
        return self._index.count

    def __getitem__(self, number: int) -> str:
        if self._long and number in self._long:
            return self._long[number]
        text: bytes = self._text.unpack_from(self._bytes, number * self._record_size + _TEXT)[0]
        return text.decode("utf-8", "surrogatepass")

    def find(self, text: str) -> int:
        """Return the number of a string in use, or END."""
        if text != self._last_text:
            self._last_text, self._last = text, END
            value = self._last_value = text.encode("utf-8", "surrogatepass")
            for number in self._index.chain(hash(value) & _HASH_MASK):
                if self[number] == text:
                    self._last = number
        return self._last

    def acquire(self, text: str) -> int:
        """Return the number of a string and add one use."""
        number = self._last if text == self._last_text else self.find(text)
        if number != END:
            self.uses[number] += 1
            return number
        value = self._last_value
        number = self._last = self.slab.allocate()
        if len(value) > self._inline:
            self._long[number] = text
        start = number * self._record_size
        self._record.pack_into(self._bytes, start, END, hash(value) & _HASH_MASK, 1, END, value)
        self._index.enter(number)
        return number

    def release(self, number: int) -> None:
        """Remove one use; free the string with the last one."""
        self.uses[number] -= 1
        if not self.uses[number]:
            if number == self._last:
                self._last_text, self._last = None, END
            self._index.remove(number)
            self._long.pop(number, None)
            self.slab.free_slot(number)
