"""Test interned strings."""

from __future__ import annotations

import random

import pytest

from tests.sessions.helpers import used_slots
from zcproto.sessions import index
from zcproto.sessions.index import END, StringTable
from zcproto.sessions.slab import CHUNK

TEXTS = [
    "",
    "a",
    "alice",
    "x" * 22,
    "x" * 23,
    "x" * 24,
    "x" * 255,
    "x" * 256,
    "x" * 1000,
    "é" * 11,
    "é" * 12,
    "日本語の名前",
    "nul\0inside",
    "\0",
    "\ud800 alone",
    "2001:0db8:85a3:0000:0000:8a2e:0370:7334",
]


@pytest.mark.parametrize("inline", [23, 39])
@pytest.mark.parametrize("text", TEXTS)
def test_string_round_trips(text: str, inline: int) -> None:
    table = StringTable(CHUNK, inline)
    number = table.acquire(text)
    assert table[number] == text
    assert table.find(text) == number
    assert table.acquire(text) == number
    assert table.uses[number] == 2


@pytest.mark.parametrize("text", TEXTS)
def test_string_is_freed_with_last_use(text: str) -> None:
    table = StringTable(CHUNK, 23)
    number = table.acquire(text)
    table.acquire(text)
    table.release(number)
    assert table.find(text) == number
    table.release(number)
    assert table.find(text) == END
    assert (len(table), used_slots(table.slab), len(table._long)) == (0, 0, 0)


def test_reused_slot_does_not_leak_previous_string() -> None:
    table = StringTable(CHUNK, 23)
    for text in ("long " * 10, "short", "a longer but short one", ""):
        number = table.acquire(text)
        assert (number, table[number], table.uses[number]) == (0, text, 1)
        table.release(number)


def test_strings_are_distinguished() -> None:
    table = StringTable(CHUNK, 23)
    numbers = [table.acquire(text) for text in TEXTS]
    assert len(set(numbers)) == len(TEXTS) == len(table)
    assert [table[number] for number in numbers] == TEXTS


def test_strings_with_same_hash_are_distinguished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "hash", lambda value: 7, raising=False)
    table = StringTable(CHUNK, 23)
    numbers = [table.acquire(text) for text in TEXTS]
    assert [table.find(text) for text in TEXTS] == numbers
    for number in numbers[::2]:
        table.release(number)
    assert [table.find(text) for text in TEXTS[1::2]] == numbers[1::2]
    assert {table.find(text) for text in TEXTS[::2]} == {END}


def test_unknown_string_is_not_found() -> None:
    assert StringTable(CHUNK, 23).find("mallory") == END


def test_string_table_shrinks() -> None:
    table = StringTable(8 * CHUNK, 23)
    numbers = [table.acquire(f"user {number} {'x' * (number % 30)}") for number in range(5 * CHUNK)]
    random.Random(1).shuffle(numbers)
    for number in numbers:
        table.release(number)
    assert (len(table), table.slab.size) == (0, CHUNK)


def test_uncached_string_is_found() -> None:
    table = StringTable(2 * CHUNK, 23)
    first = table.acquire("a")
    table.acquire("b")
    assert table.acquire("a") == first
    table.release(first)
    table.release(first)
    assert table.find("a") == END
    table.acquire("c")
    assert table.find("a") == END
