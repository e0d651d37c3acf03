"""Test refusing every token, forgetting in slices and listing of ended sessions."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import WALL, RegistryHarness
from zcproto.errors import Code
from zcproto.sessions import OpenedSession
from zcproto.sessions.token import id_from_text, id_text


def test_refuse_all_refuses_every_token(harness: RegistryHarness, opened: OpenedSession) -> None:
    before = harness.registry.generation
    harness.registry.refuse_all()
    assert harness.registry.closed
    assert harness.registry.generation > before  # callers that cached the session must check again
    assert harness.code(opened.token) is Code.UNAVAILABLE
    assert harness.code(b"x" * 32) is Code.UNAVAILABLE
    assert harness.ended == []
    harness.registry.stop_refusing()
    assert not harness.registry.closed
    assert harness.good(opened.token).id == opened.session.id
    assert harness.code(b"x" * 32) is Code.UNAUTHENTICATED


def test_distrusted_registry_refuses_every_token(harness: RegistryHarness) -> None:
    opened = harness.open()
    registry, before = harness.registry, harness.registry.generation
    registry.trusted_until = WALL + 1
    assert not isinstance(registry.check(opened.token, WALL), Code)
    for token in (opened.token, b"x" * 32):
        assert registry.check(token, WALL + 1) is Code.UNAVAILABLE
    registry.distrust()
    assert registry.generation > before
    assert registry.check(opened.token, WALL) is Code.UNAVAILABLE
    registry.trusted_until = WALL + 2
    assert not isinstance(registry.check(opened.token, WALL), Code)


def test_session_revoked_while_refusing_stays_revoked(
    harness: RegistryHarness, opened: OpenedSession
) -> None:
    harness.registry.refuse_all()
    assert harness.registry.revoke(opened.session.id, user=None, reason="lost")
    harness.registry.stop_refusing()
    assert harness.code(opened.token) is Code.TOKEN_REVOKED
    assert harness.ended == [(opened.session.id, Code.TOKEN_REVOKED, "lost")]


def test_session_restored_while_refusing_is_valid_afterwards(harness: RegistryHarness) -> None:
    harness.registry.refuse_all()
    opened = harness.open()
    assert harness.code(opened.token) is Code.UNAVAILABLE
    harness.registry.stop_refusing()
    harness.good(opened.token)


@pytest.mark.parametrize("max_slots", [1, 7, 10_000])
def test_forget_unless_works_in_slices(max_slots: int) -> None:
    harness = RegistryHarness(per_user=1000)
    opened = [harness.open(f"user{number % 3}") for number in range(50)]
    harness.registry.revoke(opened[0].session.id, user=None, reason="")
    announced = len(harness.ended)
    kept = {id_from_text(each.session.id) for each in opened[::10]}
    start, slices, left = 0, 0, len(harness.registry)
    while slices == 0 or start:
        start, slices = harness.registry.forget_unless(kept.__contains__, start, max_slots), slices + 1
        assert left - len(harness.registry) <= max_slots
        left = len(harness.registry)
    assert (slices == 1) == (max_slots == 10_000)
    codes = [
        None if not isinstance(code, Code) else code
        for code in (harness.registry.check(each.token, WALL) for each in opened)
    ]
    assert codes == [
        Code.TOKEN_REVOKED if n == 0 else None if n % 10 == 0 else Code.UNAUTHENTICATED for n in range(50)
    ]
    assert len(harness.ended) == announced
    assert harness.registry.tombstones == 1


def test_ended_since_lists_revoked_and_replaced_sessions() -> None:
    harness = RegistryHarness(per_user=1, when_full="evict_oldest")
    replaced, old, new, lives = (
        harness.open("ada"),
        harness.open("old"),
        harness.open("new"),
        harness.open("lives"),
    )
    harness.open("ada")
    harness.refresh(lives.refresh_token, WALL + 10)  # its old token has a tombstone, the session lives
    harness.registry.info(old.session.id, WALL + 4)
    harness.registry.revoke(old.session.id, user=None, reason="")
    harness.registry.info(lives.session.id, WALL + 5)
    harness.registry.revoke(new.session.id, user=None, reason="")
    for since, expected in (
        (WALL, [replaced, old, new]),
        (WALL + 4, [old, new]),
        (WALL + 5, [new]),
        (WALL + 6, []),
    ):
        found = harness.registry.ended_since(since)
        assert [id_text(ended.id) for ended in found] == [each.session.id for each in expected]
    assert RegistryHarness().registry.ended_since(0) == []


def test_slices_of_empty_table_finish_at_once() -> None:
    assert RegistryHarness().registry.forget_unless(lambda session_id: False, 0, 10) == 0
