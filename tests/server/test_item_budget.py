"""The share of each user in the memory of items."""

from __future__ import annotations

from zcproto.server.item_budget import ItemBudget

MEMORY = 1_200
MOST = (10, 100)


def test_each_of_two_users_holds_at_most_a_third() -> None:
    budget = ItemBudget()
    ada, bob = budget.join("ada"), budget.join("bob")
    ada.count(600, 0)
    assert not ada.is_over(MEMORY)
    bob.count(300, 0)
    assert (ada.is_over(MEMORY), bob.is_over(MEMORY)) == (True, False)
    ada.count(-200, 0)
    bob.count(100, 0)
    assert (ada.is_over(MEMORY), bob.is_over(MEMORY)) == (False, False)
    bob.count(1, 0)
    assert bob.is_over(MEMORY)


def test_window_shrinks_with_what_was_promised_and_never_below_one_item() -> None:
    budget = ItemBudget()
    ada, bob = budget.join("ada"), budget.join("bob")
    assert ada.window(MEMORY, MOST, 0) == MOST
    ada.count(0, 500)
    assert ada.window(MEMORY, MOST, 100) == (5, 50)
    assert bob.window(MEMORY, MOST, 0) == (8, 87)
    ada.count(0, 500)
    assert ada.window(MEMORY, MOST, 0) == (1, 1)


def test_share_ends_with_its_last_stream() -> None:
    budget = ItemBudget()
    share = budget.join("ada")
    assert budget.join("ada") is share
    share.leave()
    assert [*budget.shares] == ["ada"]
    share.leave()
    assert budget.shares == {}
