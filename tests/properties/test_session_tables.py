"""Test the tables of sessions against dicts and sets, and token texts for any input."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sessions.helpers import digest, digests, longest_chain, used_slots
from zcproto.sessions import TOKEN_SIZE, token_from_text, token_text
from zcproto.sessions.index import END, StringTable
from zcproto.sessions.slab import CHUNK, Slab
from zcproto.sessions.token import id_from_text, id_text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=200))
def test_index_behaves_like_dict(steps: list[tuple[bool, int]]) -> None:
    slab, index = digests()
    model: dict[int, int] = {}
    for enter, number in steps:
        if enter and number not in model:
            model[number] = slab.allocate()
            index.put(model[number], digest(number))
        elif not enter and number in model:
            index.remove(model[number])
            slab.free_slot(model.pop(number))
        assert index.count == len(model)
        for each in range(41):
            assert index.find(digest(each)) == model.get(each, END)


@pytest.mark.parametrize("seed", range(6))
def test_index_behaves_like_dict_while_growing_and_shrinking(seed: int) -> None:
    chance = random.Random(seed)
    slab, index = digests()
    model: dict[int, int] = {}
    number = 0
    for target in (900, 30, 2500, 0, 300):
        while len(model) != target:
            if len(model) < target:
                number += 1
                model[number] = slab.allocate()
                index.put(model[number], digest(number))
            else:
                gone = chance.choice(list(model)[:20])
                index.remove(model[gone])
                slab.free_slot(model.pop(gone))
        assert all(index.find(digest(each)) == slot for each, slot in model.items())
        longest_chain(index)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.text(max_size=30))))
def test_string_table_behaves_like_counter(steps: list[tuple[bool, str]]) -> None:
    table = StringTable(CHUNK, 23)
    uses: dict[str, int] = {}
    for take, text in steps:
        if take:
            assert table[table.acquire(text)] == text
            uses[text] = uses.get(text, 0) + 1
        elif uses.get(text):
            table.release(table.find(text))
            uses[text] -= 1
        number = table.find(text)
        assert (table.uses[number] if number != END else 0) == uses.get(text, 0)
    assert len(table) == sum(count > 0 for count in uses.values())


@pytest.mark.parametrize("seed", range(8))
def test_slab_never_allocates_a_slot_twice(seed: int) -> None:
    chance = random.Random(seed)
    slab = Slab(16 * CHUNK, 16, link=4)
    used: set[int] = set()
    for target in (3000, 10, 5000, 0, 2000):
        while len(used) != target:
            if len(used) < target or chance.random() < 0.1:
                slot = slab.allocate()
                assert slot not in used
                assert slot < slab.size
                used.add(slot)
            else:
                slot = chance.choice(tuple(used)) if chance.random() < 0.01 else next(iter(used))
                used.remove(slot)
                slab.free_slot(slot)
            assert used_slots(slab) == len(used)


@given(st.binary(min_size=TOKEN_SIZE, max_size=TOKEN_SIZE))
def test_any_token_round_trips_as_text(token: bytes) -> None:
    assert token_from_text(token_text(token)) == token


@given(st.text(max_size=60))
def test_any_text_gives_none_or_its_canonical_token(text: str) -> None:
    token = token_from_text(text)
    assert token is None or token_text(token) == text
    session_id = id_from_text(text)
    assert session_id is None or id_text(session_id) == text
