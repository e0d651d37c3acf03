"""Counts of one process."""

from __future__ import annotations

from zcproto.common.counts import Counts


def test_count_is_admitted_up_to_the_limit_of_its_key() -> None:
    counts = Counts()
    assert [counts.add("ada", 2) for _ in range(3)] == [True, True, False]
    assert counts.add("bob", 2)
    assert (counts["ada"], counts["bob"], counts["carol"], counts.most) == (2, 1, 0, 2)
    counts.remove("ada")
    assert counts.add("ada", 2)


def test_count_without_a_limit_is_always_admitted() -> None:
    counts = Counts()
    assert all(counts.add("ada") for _ in range(100))
    assert counts["ada"] == 100


def test_removed_counts_leave_nothing_behind() -> None:
    counts = Counts()
    counts.add("ada")
    counts.remove("ada")
    assert counts.most == 0
