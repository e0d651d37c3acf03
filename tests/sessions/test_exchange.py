"""Sessions that come from a store and go there: restored, forgotten, ended, refreshed elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sessions.helpers import DAY, HOUR, MINUTE, SECOND, WALL, Desk
from zcproto.errors import Code, ResourceExhausted, TokenExpired, TokenRevoked, Unauthenticated
from zcproto.sessions import SessionRegistry
from zcproto.sessions.exchange import EVICTION_SAMPLE
from zcproto.sessions.record import EndedRecord, SessionRecord
from zcproto.sessions.session import NewSession
from zcproto.sessions.token import digest_of


def new(desk: Desk, user: str = "alice", wall: int = WALL, *, key: str = "") -> NewSession:
    return desk.registry.new_session(
        user, operator=False, client="zc/1", address="192.0.2.1", wall=wall, key=key
    )


def taken_in(desk: Desk, user: str = "alice", wall: int = WALL, *, key: str = "") -> NewSession:
    session = new(desk, user, wall, key=key)
    assert desk.registry.restore(session.record)
    return session


def moved(desk: Desk, **settings: object) -> Desk:
    """Another process with the same sessions."""
    other = Desk(**settings)
    other.entropy.calls = 1_000_000
    table = desk.registry._table
    for slot in range(table.slab.size):
        if desk.registry._is_kept(slot):
            record = desk.registry.record(table.ids[slot])
            assert record is not None
            assert other.registry.restore(record)
    return other


# --- restoring -----------------------------------------------------------------------------------------------


def test_a_new_session_is_good_once_it_was_restored() -> None:
    desk = Desk()
    session = new(desk)
    assert desk.code(session.token) is Code.UNAUTHENTICATED
    assert desk.registry.opened_session(session) is None
    assert desk.registry.restore(session.record)
    opened = desk.registry.opened_session(session)
    assert opened is not None
    assert (opened.token, opened.refresh_token) == (session.token, session.refresh_token)
    assert opened.session.id == desk.good(session.token).id
    assert (len(desk.registry), desk.registry.opened) == (1, 1)


@pytest.mark.parametrize("key", ["", "device:phone", "tls:" + 64 * "a"])
def test_what_is_restored_is_what_was_kept(key: str) -> None:
    desk = Desk()
    desk.registry.open("bob", operator=True, client="x/2", address="::1", wall=WALL, key=key)
    other = moved(desk)
    (info,) = other.registry.list("bob", WALL)
    assert [info] == desk.registry.list("bob", WALL)
    assert (info.operator, info.bound) == (True, bool(key))


def test_a_session_without_refresh_has_no_refresh_token() -> None:
    desk = Desk(refresh=False)
    session = taken_in(desk)
    assert session.refresh_token is None
    assert session.record.refresh_expires_at == 0
    assert session.token.hex() not in repr(session)


def test_restoring_once_more_updates() -> None:
    desk = Desk()
    session = taken_in(desk)
    assert desk.registry.restore(replace(session.record, expires_at=WALL + HOUR, last_used_at=WALL + 5))
    assert len(desk.registry) == 1
    assert desk.good(session.token).expires_at == WALL + HOUR
    assert desk.registry.restore(replace(session.record, expires_at=WALL + 2 * HOUR, last_used_at=WALL))
    (info,) = desk.registry.list("alice", WALL + 6)
    assert (info.expires_at, info.last_used_at) == (WALL + 2 * HOUR, WALL + 5)


def test_a_shorter_life_makes_every_connection_look_again() -> None:
    desk = Desk()
    session = taken_in(desk)
    before = desk.registry.generation
    desk.registry.restore(replace(session.record, expires_at=WALL + 1))
    assert desk.registry.generation > before


def test_another_token_of_a_known_session_takes_the_place_of_the_old_one() -> None:
    desk = Desk()
    session = taken_in(desk)
    elsewhere = replace(session.record, token_digest=digest_of(b"elsewhere"))
    assert desk.registry.restore(elsewhere)
    assert desk.code(session.token) is Code.UNAUTHENTICATED
    assert desk.good(b"elsewhere").user == "alice"
    assert len(desk.registry) == 1


def test_what_ended_here_is_not_brought_back() -> None:
    desk = Desk()
    session = taken_in(desk)
    desk.registry.revoke_user("alice", "test")
    assert not desk.registry.restore(session.record)
    assert not desk.registry.restore(replace(session.record, token_digest=digest_of(b"another")))
    assert desk.code(session.token) is Code.TOKEN_REVOKED


def test_a_spent_token_is_not_brought_back() -> None:
    desk = Desk()
    first = desk.open()
    record = desk.registry.record_of(digest_of(first.token))
    assert isinstance(record, SessionRecord)
    desk.refresh(first.refresh_token)
    assert not desk.registry.restore(record)
    assert desk.code(first.token) is Code.TOKEN_REVOKED


def test_a_lapsed_session_is_restored_as_one() -> None:
    desk = Desk()
    session = new(desk)
    assert desk.registry.restore(replace(session.record, expires_at=WALL - 1))
    assert desk.code(session.token) is Code.TOKEN_EXPIRED
    assert desk.refresh(session.refresh_token).session.user == "alice"


# --- room ----------------------------------------------------------------------------------------------------


def test_a_full_table_takes_no_more() -> None:
    desk = Desk(max_sessions=1)
    taken_in(desk)
    assert not desk.registry.restore(new(desk, "bob").record)


def test_room_is_made_by_what_was_not_used_for_long() -> None:
    desk = Desk(max_sessions=3)
    sessions = [taken_in(desk, f"user-{number}", WALL + number) for number in (2, 0, 1)]
    newest = new(desk, "bob", WALL + 9)
    assert desk.registry.restore(newest.record, make_room=True)
    assert desk.code(sessions[1].token) is Code.UNAUTHENTICATED
    assert desk.ended == []
    assert {desk.good(each.token).user for each in (sessions[0], sessions[2], newest)} == {
        "user-2",
        "user-1",
        "bob",
    }


def test_room_is_made_again_and_again_and_only_of_sessions() -> None:
    desk = Desk(max_sessions=EVICTION_SAMPLE, dead_limit=4 * EVICTION_SAMPLE, idle_timeout_ms=None)
    for number in range(3 * EVICTION_SAMPLE):  # the dead fill the slots in between
        taken_in(desk, f"user-{number}", WALL)
        if number % 2:
            desk.registry.revoke_user(f"user-{number}", "test")
        assert desk.registry.kept <= EVICTION_SAMPLE
        if desk.registry.kept == EVICTION_SAMPLE:
            break
    for number in range(1000, 1000 + 2 * EVICTION_SAMPLE):
        assert desk.registry.restore(new(desk, f"user-{number}").record, make_room=True)
        assert desk.registry.kept == EVICTION_SAMPLE


# --- forgetting and ending -------------------------------------------------------------------------------------


def test_forgetting_tells_nobody_and_leaves_nothing() -> None:
    desk = Desk()
    session = taken_in(desk, key="device:phone")
    before = desk.registry.generation
    assert desk.registry.forget(session.record.id)
    assert desk.code(session.token) is Code.UNAUTHENTICATED
    assert desk.registry.generation > before
    assert desk.ended == []
    assert (desk.strings, len(desk.registry._table.keys), desk.registry.kept) == ((0, 0, 0), 0, 0)
    assert not desk.registry.forget(session.record.id)
    assert desk.registry.restore(session.record)
    assert desk.good(session.token).bound


def test_a_lapsed_session_is_forgotten_too() -> None:
    desk = Desk()
    session = taken_in(desk)
    desk.clean(WALL + 2 * HOUR)
    assert (len(desk.registry), desk.registry.lapsed) == (0, 1)
    assert desk.registry.forget(session.record.id)
    assert (len(desk.registry), desk.registry.lapsed) == (0, 0)


def test_forgetting_all_keeps_the_dead() -> None:
    desk = Desk()
    sessions = [taken_in(desk, f"user-{number}") for number in range(50)]
    desk.registry.revoke_user("user-7", "test")
    desk.registry.forget_all()
    assert (desk.registry.kept, desk.registry.tombstones) == (0, 1)
    assert desk.code(sessions[7].token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize(
    ("code", "counted"),
    [(Code.TOKEN_REVOKED, (1, 0)), (Code.SESSION_REPLACED, (0, 1)), (Code.TOKEN_EXPIRED, (0, 0))],
)
def test_what_a_store_ends_is_told(code: Code, counted: tuple[int, int]) -> None:
    desk = Desk()
    session = taken_in(desk)
    session_id = desk.good(session.token).id
    assert desk.registry.end(session.record.id, code, "elsewhere", WALL)
    assert desk.ended == [(session_id, code, "elsewhere")]
    assert desk.code(session.token) is code
    assert (desk.registry.revoked, desk.registry.replaced) == counted
    assert not desk.registry.end(session.record.id, code, "elsewhere", WALL)
    assert not desk.registry.end(bytes(16), code, "elsewhere", WALL)


def test_the_memory_of_an_ended_session_is_restored() -> None:
    desk = Desk()
    session = new(desk)
    ended = EndedRecord(session.record.id, session.record.token_digest, Code.TOKEN_REVOKED, WALL - 1)
    desk.registry.restore_ended(ended)
    desk.registry.restore_ended(ended)
    assert desk.code(session.token) is Code.TOKEN_REVOKED
    assert desk.registry.tombstones == 1
    assert desk.registry.record_of(session.record.token_digest) == replace(ended, id=b"")


def test_the_memory_of_an_end_ends_a_session_that_is_known() -> None:
    desk = Desk()
    session = taken_in(desk)
    desk.registry.restore_ended(
        EndedRecord(session.record.id, session.record.token_digest, Code.SESSION_REPLACED, WALL)
    )
    assert desk.code(session.token) is Code.SESSION_REPLACED
    assert len(desk.ended) == 1


def test_memories_beyond_the_limit_are_forgotten() -> None:
    desk = Desk(dead_limit=2)
    for number in range(5):
        desk.registry.restore_ended(
            EndedRecord(b"", digest_of(b"%d" % number), Code.TOKEN_EXPIRED, WALL + number)
        )
    assert desk.registry.tombstones == 2


# --- looking ---------------------------------------------------------------------------------------------------


def test_a_token_leads_to_its_record_or_to_what_became_of_it() -> None:
    desk = Desk()
    session = taken_in(desk)
    assert desk.registry.record_of(session.record.token_digest) == session.record
    assert desk.registry.record(session.record.id) == session.record
    desk.registry.revoke_user("alice", "test")
    assert desk.registry.record_of(session.record.token_digest) == EndedRecord(
        session.record.id, session.record.token_digest, Code.TOKEN_REVOKED, WALL
    )
    assert desk.registry.record(session.record.id) is None
    assert desk.registry.record_of(digest_of(b"unknown")) is None


def test_an_id_leads_to_what_became_of_its_session() -> None:
    desk = Desk()
    session = taken_in(desk)
    assert desk.registry.ended(session.record.id) is None
    assert desk.registry.ended(bytes(16)) is None
    desk.registry.end(session.record.id, Code.SESSION_REPLACED, "", WALL + 1)
    assert desk.registry.ended(session.record.id) == EndedRecord(
        session.record.id, session.record.token_digest, Code.SESSION_REPLACED, WALL + 1
    )


def test_records_are_listed_the_oldest_first_and_so_many() -> None:
    desk = Desk()
    sessions = [taken_in(desk, user, WALL + number) for number, user in ((2, "a"), (0, "b"), (1, "a"))]
    assert desk.registry.records(None, 9) == [sessions[number].record for number in (1, 2, 0)]
    assert desk.registry.records(None, 2) == [sessions[number].record for number in (1, 2)]
    assert desk.registry.records("a", 9) == [sessions[number].record for number in (0, 2)]
    assert desk.registry.records("a", 1) == [sessions[0].record]
    desk.registry.revoke_user("a", "test")
    assert desk.registry.records(None, 9) == [sessions[1].record]
    assert desk.registry.records("a", 9) == []


def test_uses_come_in_slices_and_each_once() -> None:
    desk = Desk()
    sessions = [taken_in(desk, f"user-{number}") for number in range(40)]
    for session in sessions[::2]:
        desk.registry.check(session.token, WALL + SECOND)
    found, start = [], 0
    while True:
        start, uses = desk.registry.uses(WALL, start, 7)
        found += uses
        if not start:
            break
    assert sorted(found) == sorted((session.record.id, WALL + SECOND) for session in sessions[::2])
    assert Desk().registry.uses(WALL, 0, 7) == (0, [])


# --- the limit ---------------------------------------------------------------------------------------------------


def test_admitting_holds_the_limit() -> None:
    desk = Desk()
    sessions = [new(desk) for _ in range(3)]
    assert [desk.registry.admit(each.record, 2, "refuse") for each in sessions[:2]] == [None, None]
    with pytest.raises(ResourceExhausted) as refused:
        desk.registry.admit(sessions[2].record, 2, "refuse")
    assert refused.value.details == {"limit": 2}
    assert desk.registry.admit(sessions[1].record, 2, "refuse") is None  # once more
    ended = desk.registry.admit(sessions[2].record, 2, "evict_oldest")
    assert ended == EndedRecord(
        sessions[0].record.id, sessions[0].record.token_digest, Code.SESSION_REPLACED, WALL
    )
    assert desk.code(sessions[0].token) is Code.SESSION_REPLACED


def test_a_lapsed_session_makes_room_first() -> None:
    desk = Desk()
    lapsed, later = new(desk), new(desk, wall=WALL + 2 * HOUR)
    desk.registry.admit(lapsed.record, 1, "refuse")
    ended = desk.registry.admit(later.record, 1, "refuse")
    assert ended is not None
    assert (ended.id, ended.code) == (lapsed.record.id, Code.TOKEN_EXPIRED)


# --- refreshing elsewhere ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_process", [True, False])
def test_a_rotation_of_the_store_is_applied(same_process: bool) -> None:
    here = Desk()
    session = taken_in(here)
    store: SessionRegistry = here.registry if same_process else moved(here).registry
    rotation, token, refresh_token = here.registry.new_rotation(
        session.refresh_token or b"", client="zc/2", address="192.0.2.9", wall=WALL + MINUTE
    ) or pytest.fail("it is a refresh token")
    record, old = store.rotate(rotation)
    assert old == session.record.token_digest
    opened = here.registry.apply_rotation(record, rotation.spent_digest, token, refresh_token, WALL + MINUTE)
    assert (opened.token, opened.refresh_token) == (token, refresh_token)
    assert here.good(token, WALL + MINUTE).expires_at == record.expires_at == WALL + MINUTE + DAY
    assert here.code(session.token, WALL + MINUTE) is Code.TOKEN_REVOKED
    assert here.registry.record(session.record.id) == record
    assert (record.client, record.address) == ("zc/2", "192.0.2.9")
    assert here.ended == []


def test_a_session_that_was_not_known_here_is_known_after_its_refresh() -> None:
    here, store = Desk(), Desk()
    session = taken_in(store)
    made = here.registry.new_rotation(session.refresh_token or b"", client="", address="", wall=WALL)
    assert made is not None
    record, _ = store.registry.rotate(made[0])
    here.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    assert here.good(made[1]).user == "alice"


def test_a_session_that_ended_here_meanwhile_stays_ended() -> None:
    here = Desk()
    session = taken_in(here)
    store = moved(here)
    made = here.registry.new_rotation(session.refresh_token or b"", client="", address="", wall=WALL)
    assert made is not None
    record, _ = store.registry.rotate(made[0])
    here.registry.revoke_user("alice", "test")
    with pytest.raises(TokenRevoked):
        here.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    assert here.code(made[1]) is Code.UNAUTHENTICATED


def test_the_same_client_gets_the_same_pair_again_for_a_moment() -> None:
    desk = Desk()
    session = taken_in(desk)
    spent = session.refresh_token or b""
    made = desk.registry.new_rotation(spent, client="zc/1", address="192.0.2.1", wall=WALL)
    assert made is not None
    assert desk.registry.repeat_refresh(spent, client="zc/1", address="192.0.2.1", wall=WALL) is None
    record, _ = desk.registry.rotate(made[0])
    desk.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    again = desk.registry.repeat_refresh(spent, client="zc/1", address="192.0.2.1", wall=WALL + SECOND)
    assert again is not None
    assert (again.token, again.refresh_token) == made[1:]
    for client, address, wall in (
        ("zc/2", "192.0.2.1", WALL),
        ("zc/1", "192.0.2.2", WALL),
        ("zc/1", "192.0.2.1", WALL + 10 * SECOND),
    ):
        assert desk.registry.repeat_refresh(spent, client=client, address=address, wall=wall) is None
    assert desk.registry.repeat_refresh(b"short", client="zc/1", address="192.0.2.1", wall=WALL) is None


def test_what_is_no_refresh_token_makes_no_rotation() -> None:
    assert Desk().registry.new_rotation(b"short", client="", address="", wall=WALL) is None


def test_a_spent_refresh_token_ends_the_session_in_the_store() -> None:
    desk = Desk()
    session = taken_in(desk)
    first = desk.registry.new_rotation(session.refresh_token or b"", client="", address="", wall=WALL)
    second = desk.registry.new_rotation(session.refresh_token or b"", client="", address="", wall=WALL)
    assert first is not None
    assert second is not None
    desk.registry.rotate(first[0])
    with pytest.raises(TokenRevoked):
        desk.registry.rotate(second[0])
    assert desk.registry.refresh_reused == 1
    with pytest.raises(TokenRevoked):
        desk.registry.rotate(second[0])
    with pytest.raises(Unauthenticated):
        desk.registry.rotate(replace(second[0], id=bytes(16)))


def test_a_refresh_after_its_life_is_refused_by_the_store() -> None:
    desk = Desk()
    session = taken_in(desk)
    late = desk.registry.new_rotation(
        session.refresh_token or b"", client="", address="", wall=WALL + 30 * DAY
    )
    assert late is not None
    with pytest.raises(TokenExpired):
        desk.registry.rotate(late[0])
