"""Test slots, columns and returned memory of the slab."""

from __future__ import annotations

import mmap

import pytest

from tests.sessions.helpers import used_slots
from zcproto.sessions import slab as slab_module
from zcproto.sessions.slab import CHUNK, SMALL_CHUNK, Memory, Slab

PAGE = mmap.PAGESIZE


def make(capacity: int = 16 * CHUNK) -> Slab:
    return Slab(capacity, 16, link=4)


def test_slots_are_numbered_from_0() -> None:
    slab = make()
    assert [slab.allocate() for _ in range(5)] == [0, 1, 2, 3, 4]


def test_slab_grows_by_chunks() -> None:
    slab = make()
    assert slab.size == 0
    for _ in range(CHUNK):
        slab.allocate()
    assert (slab.size, used_slots(slab)) == (CHUNK, CHUNK)
    slab.allocate()
    assert (slab.size, used_slots(slab)) == (2 * CHUNK, CHUNK + 1)


@pytest.mark.parametrize(("asked", "given"), [(1, CHUNK), (CHUNK, CHUNK), (CHUNK + 1, 2 * CHUNK)])
def test_capacity_is_rounded_up_to_chunks(asked: int, given: int) -> None:
    assert make(asked).capacity == given


def test_last_freed_slot_is_used_first() -> None:
    slab = make()
    slots = [slab.allocate() for _ in range(10)]
    for slot in (slots[3], slots[7]):
        slab.free_slot(slot)
    assert slab.allocate() == slots[7]
    assert slab.allocate() == slots[3]
    assert slab.allocate() == 10


def test_lowest_chunk_with_free_slot_is_used_first() -> None:
    slab = make()
    for _ in range(3 * CHUNK):
        slab.allocate()
    slab.free_slot(2 * CHUNK + 5)
    slab.free_slot(7)
    slab.free_slot(CHUNK + 6)
    assert [slab.allocate() for _ in range(3)] == [7, CHUNK + 6, 2 * CHUNK + 5]
    slab.free_slot(2 * CHUNK + 5)
    slab.free_slot(7)
    assert [slab.allocate() for _ in range(2)] == [7, 2 * CHUNK + 5]


def test_one_empty_chunk_is_kept() -> None:
    slab = make()
    slots = [slab.allocate() for _ in range(3 * CHUNK)]
    for slot in slots[2 * CHUNK :]:
        slab.free_slot(slot)
    assert slab.size == 3 * CHUNK
    for slot in slots[CHUNK : 2 * CHUNK]:
        slab.free_slot(slot)
    assert (slab.size, used_slots(slab)) == (2 * CHUNK, CHUNK)


def test_empty_slab_keeps_one_chunk() -> None:
    slab = make()
    for slot in [slab.allocate() for _ in range(4 * CHUNK)]:
        slab.free_slot(slot)
    assert (slab.size, used_slots(slab)) == (CHUNK, 0)


def test_used_chunk_keeps_chunks_below_it() -> None:
    slab = make()
    slots = [slab.allocate() for _ in range(4 * CHUNK)]
    for slot in slots[:-1]:
        slab.free_slot(slot)
    assert slab.size == 4 * CHUNK
    slab.free_slot(slots[-1])
    assert slab.size == CHUNK


def test_trim_returns_at_most_eight_chunks() -> None:
    slab = make()
    *slots, last = [slab.allocate() for _ in range(12 * CHUNK)]
    for slot in slots:
        slab.free_slot(slot)
    assert slab.size == 12 * CHUNK
    slab.free_slot(last)
    assert slab.size == 4 * CHUNK
    slab.trim()
    assert slab.size == CHUNK
    slab.trim()
    assert slab.size == CHUNK


def test_returned_chunk_is_given_to_the_system() -> None:
    slab = make()
    slots = [slab.allocate() for _ in range(3 * CHUNK)]
    slab.bytes[:] = b"x" * len(slab.bytes)
    for slot in slots:
        slab._link[slot] = slot  # valid links again
        slab.free_slot(slot)
    size = slab.record_size
    assert slab.size == CHUNK
    assert slab.bytes[CHUNK * size : 3 * CHUNK * size].tobytes() == bytes(2 * CHUNK * size)
    assert slab.bytes[3 * CHUNK * size] == ord("x")


def test_slots_are_unique_after_shrinking() -> None:
    slab = make()
    for slot in [slab.allocate() for _ in range(5 * CHUNK)]:
        slab.free_slot(slot)
    slots = {slab.allocate() for _ in range(5 * CHUNK)}
    assert slots == set(range(5 * CHUNK))


def test_allocating_above_capacity_asserts() -> None:
    slab = make(CHUNK)
    for _ in range(CHUNK):
        slab.allocate()
    with pytest.raises(AssertionError):
        slab.allocate()


def test_column_is_a_field_of_every_record() -> None:
    slab = Slab(CHUNK, 24, link=20)
    wide, narrow, small = slab.column("Q", 8), slab.column("I", 16), slab.column("B", 3)
    for slot in range(5):
        wide[slot], narrow[slot], small[slot] = 2**63 + slot, 7 * slot, 200 + slot
    assert [wide[slot] for slot in range(5)] == [2**63 + slot for slot in range(5)]
    assert [narrow[slot] for slot in range(5)] == [0, 7, 14, 21, 28]
    assert [slab.bytes[24 * slot + 3] for slot in range(5)] == [200, 201, 202, 203, 204]


def test_returned_pages_read_as_zero() -> None:
    memory = Memory(8 * PAGE)
    memory.view[:] = b"x" * (8 * PAGE)
    memory.discard(2 * PAGE + 1, 4 * PAGE)
    assert memory.view[3 * PAGE - 1 : 3 * PAGE + 1].tobytes() == b"x\0"
    assert memory.view[4 * PAGE - 1 : 4 * PAGE + 1].tobytes() == b"\0x"


@pytest.mark.parametrize(("start", "end"), [(0, 0), (1, PAGE), (PAGE, PAGE), (8 * PAGE, 9 * PAGE)])
def test_partial_pages_are_not_discarded(start: int, end: int) -> None:
    memory = Memory(8 * PAGE)
    memory.view[:] = b"x" * (8 * PAGE)
    memory.discard(start, end)
    assert memory.view.tobytes() == b"x" * (8 * PAGE)


def test_discard_past_end_is_clipped() -> None:
    memory = Memory(2 * PAGE)
    memory.view[:] = b"x" * (2 * PAGE)
    memory.discard(PAGE, 5 * PAGE)
    assert memory.view[PAGE - 1 : PAGE + 1].tobytes() == b"x\0"


def test_memory_works_without_madvise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_NO_HUGE_PAGES", None)
    monkeypatch.setattr(slab_module, "_DISCARD", None)
    memory = Memory(2 * PAGE)
    memory.view[:] = b"x" * (2 * PAGE)
    memory.discard(0, 2 * PAGE)
    assert memory.view[0] == ord("x")


def test_kernel_without_huge_pages_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "_NO_HUGE_PAGES", 12345)  # an invalid advice: EINVAL
    assert len(Memory(PAGE).view) == PAGE


def test_small_memory_is_not_mapped_and_keeps_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "SMALL", 2 * PAGE)
    monkeypatch.setattr(slab_module.mmap, "mmap", None)
    memory = Memory(2 * PAGE)
    assert memory.view.tobytes() == bytes(2 * PAGE)
    memory.view[:] = b"x" * (2 * PAGE)
    memory.discard(0, 2 * PAGE)
    assert memory.view.tobytes() == b"x" * (2 * PAGE)


def test_small_slab_grows_in_small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slab_module, "SMALL", 16 * 2 * CHUNK)
    assert make(2 * CHUNK + 1).capacity == 3 * CHUNK
    slab = make(100)
    assert slab.capacity == 2 * SMALL_CHUNK
    slots = [slab.allocate() for _ in range(2 * SMALL_CHUNK)]
    assert slots == list(range(2 * SMALL_CHUNK))
    for slot in slots:
        slab.free_slot(slot)
    assert (used_slots(slab), slab.size) == (0, SMALL_CHUNK)
