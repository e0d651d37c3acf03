"""Test the hash indexes: lookup, growth and shrinking."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import digest, digests, longest_chain
from zcproto.sessions.index import END, MIN_BUCKETS, LinearHash
from zcproto.sessions.slab import CHUNK, Slab


def plain(least: int = MIN_BUCKETS) -> tuple[Slab, LinearHash]:
    slab = Slab(8 * CHUNK, 12, link=8)
    return slab, LinearHash(slab, hash_=0, next_=4, least=least)


def enter(slab: Slab, index: LinearHash, slot: int, hash_: int) -> None:
    slab.column("I", 0)[slot], slab.column("i", 4)[slot] = hash_, END
    index.enter(slot)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1000, 4097])
def test_index_finds_exactly_its_entries(count: int) -> None:
    slab, index = digests()
    slots = {digest(number): slab.allocate() for number in range(count)}
    for value, slot in slots.items():
        index.put(slot, value)
    assert index.count == count
    assert all(index.find(value) == slot for value, slot in slots.items())
    assert all(index[slot] == value for value, slot in slots.items())
    assert all(index.find(digest(number)) == END for number in range(count, count + 50))


@pytest.mark.parametrize("count", [9, 100, 1000, 4097])
def test_index_shrinks_to_initial_size(count: int) -> None:
    slab, index = digests()
    slots = [slab.allocate() for _ in range(count)]
    for number, slot in enumerate(slots):
        index.put(slot, digest(number))
    for number, slot in enumerate(slots):
        index.remove(slot)
        assert index.find(digest(number)) == END
        assert index.find(digest(count - 1)) == (slots[-1] if number < count - 1 else END)
    assert (index.count, index.buckets) == (0, 8)


def test_index_has_one_to_two_buckets_per_entry() -> None:
    slab, index = digests()
    slots = []
    for number in range(3000):
        slots.append(slab.allocate())
        index.put(slots[-1], digest(number))
        assert index.count <= index.buckets <= max(8, 2 * index.count)
    for slot in slots:
        index.remove(slot)
        assert index.count <= index.buckets <= max(8, 2 * index.count)


def test_insert_splits_at_most_one_bucket_and_removal_joins_two() -> None:
    slab, index = digests()
    slots = [slab.allocate() for _ in range(2000)]
    for number, slot in enumerate(slots):
        before = index.buckets
        index.put(slot, digest(number))
        assert 0 <= index.buckets - before <= 1
    for slot in slots:
        before = index.buckets
        index.remove(slot)
        assert 0 <= before - index.buckets <= 2


def test_presized_index_does_not_split_or_join() -> None:
    slab, index = plain(least=2048)
    slots = [slab.allocate() for _ in range(3000)]
    for slot in slots:
        enter(slab, index, slot, slot * 7)
        assert index.buckets == max(2048, index.count)
    assert all(list(index.chain(slot * 7)) == [slot] for slot in slots)
    for slot in slots:
        index.remove(slot)
        assert 2048 <= index.buckets <= max(2048, 2 * index.count)
    assert (index.count, index.buckets) == (0, 2048)


def test_chains_stay_short() -> None:
    slab, index = digests()
    for number in range(5000):
        index.put(slab.allocate(), digest(number))
    assert longest_chain(index) <= 12


def test_unused_bucket_heads_are_returned() -> None:
    slab, index = digests()
    slots = [slab.allocate() for _ in range(5000)]
    for number, slot in enumerate(slots):
        index.put(slot, digest(number))
    assert any(index._heads[4096:5000])
    for slot in slots:
        index.remove(slot)
    assert not any(index._heads[4096:5000])


@pytest.mark.parametrize("width", [16, 32])
def test_digests_differing_in_last_bit_are_distinguished(width: int) -> None:
    slab, index = digests(width)
    value = digest(1, width)
    near = value[:-1] + bytes([value[-1] ^ 1])
    first, second = slab.allocate(), slab.allocate()
    index.put(first, value)
    assert index.find(near) == END
    index.put(second, near)
    assert (index.find(value), index.find(near)) == (first, second)


def test_several_slots_may_share_a_hash() -> None:
    slab, index = plain()
    slots = [slab.allocate() for _ in range(20)]
    for slot in slots:
        enter(slab, index, slot, 0xDEADBEEF)
    enter(slab, index, slab.allocate(), 0xDEADBEEF ^ 0x80000000)  # the same bucket
    assert sorted(index.chain(0xDEADBEEF)) == slots
    for slot in slots[::2]:
        index.remove(slot)
    assert sorted(index.chain(0xDEADBEEF)) == slots[1::2]


@pytest.mark.parametrize("value", [b"", b"abc", digest(1)[:16], digest(1) + b"\0"])
def test_bytes_of_another_length_are_not_found(value: bytes) -> None:
    slab, index = digests()
    index.put(slab.allocate(), digest(1))
    assert index.find(value) == END
