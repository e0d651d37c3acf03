"""Test the two halves of the credit of a stream."""

from __future__ import annotations

import pytest

from zcproto.connection.credit import ItemQueue
from zcproto.errors import Code, ProtocolError


def test_credit_follows_what_was_taken_and_not_what_is_stored() -> None:
    items = ItemQueue((4, 10_000))
    assert items.next_grant() == (4, 10_000)
    assert items.next_grant() is None
    for _ in range(4):
        items.receive(b"x")
    items.take()
    assert items.next_grant() is None
    items.take()
    assert items.next_grant() == (6, 10_130)
    assert (items.held, items.held_bytes) == (2, 130)


def test_peer_without_credit_is_granted_once_all_is_taken() -> None:
    items = ItemQueue((10, 1))
    assert items.next_grant() == (10, 1)
    items.receive(bytes(500))
    with pytest.raises(ProtocolError) as caught:
        items.receive(b"")
    assert caught.value.code is Code.PROTOCOL_ERROR
    items.take()
    assert items.next_grant() == (11, 565)


def test_nothing_is_granted_after_the_end() -> None:
    items = ItemQueue((4, 1_000))
    items.next_grant()
    assert items.still_allowed == 4
    items.end()
    assert (items.next_grant(), items.still_allowed) == (None, 0)
    with pytest.raises(ProtocolError):
        items.end()


def test_late_items_are_bounded_by_bytes_too() -> None:
    assert ItemQueue((4, 1), (10, 65)).still_allowed == 2
    assert ItemQueue((4, 1), (10, 0)).still_allowed == 0


def test_promised_bytes_are_granted_or_held_until_the_end() -> None:
    items = ItemQueue((4, 1_000))
    assert items.promised_bytes == 0
    items.next_grant()
    assert items.promised_bytes == 1_000
    items.receive(bytes(2_000))
    assert items.promised_bytes == items.held_bytes == 2_064
    items.take()
    items.next_grant()
    items.receive(bytes(100))
    assert (items.promised_bytes, items.held_bytes) == (1_000, 164)
    items.end()
    assert items.promised_bytes == 164
