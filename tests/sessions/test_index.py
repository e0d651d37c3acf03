"""The hash indexes against a dict."""

from __future__ import annotations

import random
from hashlib import sha256

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zcproto.sessions.index import END, DigestIndex, LinearHash
from zcproto.sessions.slab import CHUNK, Slab


def plain() -> tuple[Slab, LinearHash]:
    slab = Slab(8 * CHUNK, 12, link=8)
    return slab, LinearHash(slab, hash_=0, next_=4)


def digests(width: int = 32) -> tuple[Slab, DigestIndex]:
    slab = Slab(8 * CHUNK, 40, link=36)
    return slab, DigestIndex(slab, offset=0, width=width, next_=32)


def digest(number: int, width: int = 32) -> bytes:
    return sha256(b"%d" % number).digest()[:width]


def longest_chain(index: LinearHash) -> int:
    lengths = []
    for bucket in range(index.buckets):
        length, slot = 0, index._heads[bucket]
        while slot != END:
            length, slot = length + 1, index._next[slot]
        lengths.append(length)
    assert sum(lengths) == index.count
    return max(lengths)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 100, 1000, 4097])
def test_everything_entered_is_found_and_nothing_else(count: int) -> None:
    slab, index = digests()
    slots = {digest(number): slab.take() for number in range(count)}
    for value, slot in slots.items():
        index.put(slot, value)
    assert index.count == count
    assert all(index.find(value) == slot for value, slot in slots.items())
    assert all(index[slot] == value for value, slot in slots.items())
    assert all(index.find(digest(number)) == END for number in range(count, count + 50))


@pytest.mark.parametrize("count", [9, 100, 1000, 4097])
def test_it_shrinks_to_where_it_began(count: int) -> None:
    slab, index = digests()
    slots = [slab.take() for _ in range(count)]
    for number, slot in enumerate(slots):
        index.put(slot, digest(number))
    for number, slot in enumerate(slots):
        index.remove(slot)
        assert index.find(digest(number)) == END
        assert index.find(digest(count - 1)) == (slots[-1] if number < count - 1 else END)
    assert (index.count, index.buckets) == (0, 8)


def test_there_are_one_to_two_buckets_an_entry() -> None:
    slab, index = digests()
    slots = []
    for number in range(3000):
        slots.append(slab.take())
        index.put(slots[-1], digest(number))
        assert index.count <= index.buckets <= max(8, 2 * index.count)
    for slot in slots:
        index.remove(slot)
        assert index.count <= index.buckets <= max(8, 2 * index.count)


def test_an_insert_splits_one_bucket_at_most_and_a_removal_joins_two() -> None:
    slab, index = digests()
    slots = [slab.take() for _ in range(2000)]
    for number, slot in enumerate(slots):
        before = index.buckets
        index.put(slot, digest(number))
        assert 0 <= index.buckets - before <= 1
    for slot in slots:
        before = index.buckets
        index.remove(slot)
        assert 0 <= before - index.buckets <= 2


def test_chains_stay_short() -> None:
    slab, index = digests()
    for number in range(5000):
        index.put(slab.take(), digest(number))
    assert longest_chain(index) <= 12


def test_heads_that_are_not_needed_any_more_go_back() -> None:
    slab, index = digests()
    slots = [slab.take() for _ in range(5000)]
    for number, slot in enumerate(slots):
        index.put(slot, digest(number))
    assert any(index._heads[4096:5000])
    for slot in slots:
        index.remove(slot)
    assert not any(index._heads[4096:5000])


@pytest.mark.parametrize("width", [16, 32])
def test_digests_that_differ_in_their_last_bit_are_told_apart(width: int) -> None:
    slab, index = digests(width)
    value = digest(1, width)
    near = value[:-1] + bytes([value[-1] ^ 1])
    first, second = slab.take(), slab.take()
    index.put(first, value)
    assert index.find(near) == END
    index.put(second, near)
    assert (index.find(value), index.find(near)) == (first, second)


def test_a_hash_may_be_that_of_several_slots() -> None:
    slab, index = plain()
    slots = [slab.take() for _ in range(20)]
    for slot in slots:
        index.add(slot, 0xDEADBEEF)
    index.add(slab.take(), 0xDEADBEEF ^ 0x80000000)  # the same bucket
    assert sorted(index.chain(0xDEADBEEF)) == slots
    for slot in slots[::2]:
        index.remove(slot)
    assert sorted(index.chain(0xDEADBEEF)) == slots[1::2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_it_is_a_dict(steps: list[tuple[bool, int]]) -> None:
    slab, index = digests()
    model: dict[int, int] = {}
    for enter, number in steps:
        if enter and number not in model:
            model[number] = slab.take()
            index.put(model[number], digest(number))
        elif not enter and number in model:
            index.remove(model[number])
            slab.give_back(model.pop(number))
        assert index.count == len(model)
        for each in range(41):
            assert index.find(digest(each)) == model.get(each, END)


@pytest.mark.parametrize("seed", range(6))
def test_it_is_a_dict_while_it_grows_and_shrinks(seed: int) -> None:
    chance = random.Random(seed)
    slab, index = digests()
    model: dict[int, int] = {}
    number = 0
    for target in (900, 30, 2500, 0, 300):
        while len(model) != target:
            if len(model) < target:
                number += 1
                model[number] = slab.take()
                index.put(model[number], digest(number))
            else:
                gone = chance.choice(list(model)[:20])
                index.remove(model[gone])
                slab.give_back(model.pop(gone))
        assert all(index.find(digest(each)) == slot for each, slot in model.items())
        longest_chain(index)
