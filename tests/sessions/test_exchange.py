"""Test the exchange with a store: restore, forget, end, rotation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.sessions.helpers import (
    DAY,
    HOUR,
    MINUTE,
    SECOND,
    WALL,
    NewSession,
    RegistryHarness,
    new_session,
)
from zcproto.common.roles import OPERATORS, Roles
from zcproto.errors import Code, ResourceExhausted, TokenExpired, TokenRevoked, Unauthenticated
from zcproto.sessions import OpenedSession, SessionRegistry
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord
from zcproto.sessions.registry import EVICTION_SAMPLE
from zcproto.sessions.token import digest_of


def new(harness: RegistryHarness, user: str = "alice", wall: int = WALL, *, key: str = "") -> NewSession:
    return new_session(harness.registry, user, client="zc/1", address="192.0.2.1", wall=wall, key=key)


def claim(harness: RegistryHarness, session: NewSession) -> OpenedSession | None:
    return harness.registry.opened_session(session.record.id, session.token, session.refresh_token)


def taken_in(harness: RegistryHarness, user: str = "alice", wall: int = WALL, *, key: str = "") -> NewSession:
    session = new(harness, user, wall, key=key)
    assert harness.registry.restore(session.record)
    return session


def rotation_of(
    harness: RegistryHarness, session: NewSession, wall: int = WALL, client: str = "", address: str = ""
) -> tuple[Rotation, bytes, bytes]:
    """Return a rotation of a session, with the new tokens."""
    token = session.refresh_token or b""
    made = harness.registry.new_rotation(token, client=client, address=address, wall=wall)
    assert made is not None
    return made


def tombstone(session: NewSession, code: Code = Code.TOKEN_REVOKED, wall: int = WALL) -> EndedRecord:
    return EndedRecord(session.record.id, session.record.token_digest, code, wall)


def moved(harness: RegistryHarness, **settings: object) -> RegistryHarness:
    """Another process with the same sessions."""
    other = RegistryHarness(**settings)
    other.entropy.calls = 1_000_000
    for record in harness.registry.records(None, harness.registry.kept):
        assert other.registry.restore(record)
    return other


# --- restoring -----------------------------------------------------------------------------------------------


def test_new_session_is_valid_after_restore(harness: RegistryHarness) -> None:
    session = new(harness)
    assert harness.code(session.token) is Code.UNAUTHENTICATED
    assert claim(harness, session) is None
    assert harness.registry.restore(session.record)
    opened = claim(harness, session)
    assert opened is not None
    assert (opened.token, opened.refresh_token) == (session.token, session.refresh_token)
    assert opened.session.id == harness.good(session.token).id
    assert (len(harness.registry), harness.registry.opened) == (1, 1)


def test_new_session_that_ended_meanwhile_is_not_opened(harness: RegistryHarness) -> None:
    revoked, forgotten = taken_in(harness), taken_in(harness)
    assert harness.registry.end(revoked.record.id, Code.TOKEN_REVOKED, "elsewhere", WALL)
    assert harness.registry.forget(forgotten.record.id)
    assert claim(harness, revoked) is None
    assert claim(harness, forgotten) is None
    assert harness.registry.opened == 0


@pytest.mark.parametrize("roles", [OPERATORS, OPERATORS | {"admin", "billing"}, frozenset({"admin"})])
@pytest.mark.parametrize("key", ["", "device:phone", "tls:" + 64 * "a"])
def test_restored_record_equals_stored_record(harness: RegistryHarness, key: str, roles: Roles) -> None:
    harness.registry.open("bob", roles=roles, client="x/2", address="::1", wall=WALL, key=key)
    other = moved(harness)
    (info,) = other.registry.list("bob", WALL)
    assert [info] == harness.registry.list("bob", WALL)
    assert (info.roles, info.bound) == (roles, bool(key))


def test_session_without_refresh_has_no_refresh_token() -> None:
    harness = RegistryHarness(refresh=False)
    session = taken_in(harness)
    assert session.refresh_token is None
    assert session.record.refresh_expires_at == 0
    assert session.token.hex() not in repr(session)


def test_restoring_again_updates_session(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    assert harness.registry.restore(session.record._replace(expires_at=WALL + HOUR, last_used_at=WALL + 5))
    assert len(harness.registry) == 1
    assert harness.good(session.token).expires_at == WALL + HOUR
    assert harness.registry.restore(session.record._replace(expires_at=WALL + 2 * HOUR, last_used_at=WALL))
    (info,) = harness.registry.list("alice", WALL + 6)
    assert (info.expires_at, info.last_used_at) == (WALL + 2 * HOUR, WALL + 5)


def test_shorter_expiry_raises_generation(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    before = harness.registry.generation
    harness.registry.restore(session.record._replace(expires_at=WALL + 1))
    assert harness.registry.generation > before


def test_restored_token_replaces_old_one(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    elsewhere = session.record._replace(token_digest=digest_of(b"elsewhere"))
    assert harness.registry.restore(elsewhere)
    assert harness.code(session.token) is Code.UNAUTHENTICATED
    assert harness.good(b"elsewhere").user == "alice"
    assert len(harness.registry) == 1


def test_restore_does_not_revive_ended_session(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    harness.registry.revoke_user("alice", "test")
    assert not harness.registry.restore(session.record)
    assert not harness.registry.restore(session.record._replace(token_digest=digest_of(b"another")))
    assert harness.code(session.token) is Code.TOKEN_REVOKED


def test_restore_does_not_revive_spent_token(harness: RegistryHarness) -> None:
    first = harness.open()
    record = harness.registry.record_of(digest_of(first.token))
    assert isinstance(record, SessionRecord)
    harness.refresh(first.refresh_token)
    assert not harness.registry.restore(record)
    assert harness.code(first.token) is Code.TOKEN_REVOKED


def test_restored_lapsed_session_is_lapsed(harness: RegistryHarness) -> None:
    session = new(harness)
    assert harness.registry.restore(session.record._replace(expires_at=WALL - 1))
    assert harness.code(session.token) is Code.TOKEN_EXPIRED
    assert harness.refresh(session.refresh_token).session.user == "alice"


# --- room ----------------------------------------------------------------------------------------------------


def test_restore_into_full_table_is_refused() -> None:
    harness = RegistryHarness(max_sessions=1)
    taken_in(harness)
    assert not harness.registry.restore(new(harness, "bob").record)


@pytest.mark.parametrize("limit", [1, 2, 7])
def test_restore_fills_table_to_its_limit_and_not_beyond(limit: int) -> None:
    harness = RegistryHarness(max_sessions=limit)
    for number in range(limit):
        taken_in(harness, f"user-{number}")
    assert not harness.registry.restore(new(harness, "bob").record)
    with pytest.raises(ResourceExhausted):
        harness.open("bob")
    assert harness.registry.restore(new(harness, "bob").record, make_room=True)
    assert harness.registry.kept == limit


def test_restore_evicts_least_recently_used_session() -> None:
    harness = RegistryHarness(max_sessions=3)
    sessions = [taken_in(harness, f"user-{number}", WALL + number) for number in (2, 0, 1)]
    newest = new(harness, "bob", WALL + 9)
    assert harness.registry.restore(newest.record, make_room=True)
    assert harness.code(sessions[1].token) is Code.UNAUTHENTICATED
    assert harness.ended == []
    assert {harness.good(each.token).user for each in (sessions[0], sessions[2], newest)} == {
        "user-2",
        "user-1",
        "bob",
    }


def test_repeated_eviction_never_evicts_tombstones() -> None:
    harness = RegistryHarness(
        max_sessions=EVICTION_SAMPLE, dead_limit=4 * EVICTION_SAMPLE, idle_timeout_ms=None
    )
    for number in range(3 * EVICTION_SAMPLE):  # tombstones fill the slots in between
        taken_in(harness, f"user-{number}", WALL)
        if number % 2:
            harness.registry.revoke_user(f"user-{number}", "test")
        assert harness.registry.kept <= EVICTION_SAMPLE
        if harness.registry.kept == EVICTION_SAMPLE:
            break
    for number in range(1000, 1000 + 2 * EVICTION_SAMPLE):
        assert harness.registry.restore(new(harness, f"user-{number}").record, make_room=True)
        assert harness.registry.kept == EVICTION_SAMPLE


# --- forgetting and ending -------------------------------------------------------------------------------------


def test_forget_is_silent_and_leaves_no_tombstone(harness: RegistryHarness) -> None:
    session = taken_in(harness, key="device:phone")
    before = harness.registry.generation
    assert harness.registry.forget(session.record.id)
    assert harness.code(session.token) is Code.UNAUTHENTICATED
    assert harness.registry.generation > before
    assert harness.ended == []
    assert (harness.strings, len(harness.table.keys), harness.registry.kept) == ((0, 0, 0), 0, 0)
    assert not harness.registry.forget(session.record.id)
    assert harness.registry.restore(session.record)
    assert harness.good(session.token).bound


def test_forget_removes_lapsed_session(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    harness.clean(WALL + 2 * HOUR)
    assert (len(harness.registry), harness.registry.lapsed) == (0, 1)
    assert harness.registry.forget(session.record.id)
    assert (len(harness.registry), harness.registry.lapsed) == (0, 0)


@pytest.mark.parametrize("ends", ["forgotten", "not kept", "evicted"])
def test_forgotten_session_has_no_grace(ends: str) -> None:
    harness = RegistryHarness(max_sessions=1)
    opened = harness.open()
    harness.refresh(opened.refresh_token)
    (record,) = harness.registry.records("alice", 1)
    match ends:
        case "forgotten":
            harness.registry.forget(record.id)
        case "not kept":
            harness.registry.forget_unless(lambda session_id: False, 0, 10)
        case "evicted":
            assert harness.registry.restore(new(harness, "bob").record, make_room=True)
    # Another process may have refreshed it since: the pair of then is not valid any more.
    elsewhere = record._replace(token_digest=bytes(32), refresh_digest=bytes(32))
    assert harness.registry.restore(elsewhere, make_room=True)
    spent = opened.refresh_token or b""
    assert harness.registry.repeat_refresh(spent, client="zc/1", address="192.0.2.1", wall=WALL) is None


@pytest.mark.parametrize("max_slots", [7, 5_000])
def test_sessions_are_forgotten_in_slices(max_slots: int) -> None:
    harness = RegistryHarness(max_sessions=20, dead_limit=2)
    sessions = [taken_in(harness, f"user-{number}") for number in range(20)]
    asked: list[bytes] = []

    def is_kept(session_id: bytes) -> bool:
        asked.append(session_id)
        return True

    start, slices = -1, 0
    while start:
        start, slices = harness.registry.forget_unless(is_kept, max(start, 0), max_slots), slices + 1
        assert len(asked) == min(max_slots * slices, len(sessions))
    assert sorted(asked) == sorted(each.record.id for each in sessions)


def test_forgetting_every_session_keeps_tombstones(harness: RegistryHarness) -> None:
    sessions = [taken_in(harness, f"user-{number}") for number in range(50)]
    harness.registry.revoke_user("user-7", "test")
    harness.registry.forget_unless(lambda session_id: False, 0, 1_000)
    assert (harness.registry.kept, harness.registry.tombstones) == (0, 1)
    assert harness.code(sessions[7].token) is Code.TOKEN_REVOKED


@pytest.mark.parametrize(
    ("code", "replaced"),
    [(Code.TOKEN_REVOKED, 0), (Code.SESSION_REPLACED, 1), (Code.TOKEN_EXPIRED, 0)],
)
def test_end_by_store_is_announced_and_not_counted_as_revoked_here(code: Code, replaced: int) -> None:
    harness = RegistryHarness()
    session = taken_in(harness)
    session_id = harness.good(session.token).id
    assert harness.registry.end(session.record.id, code, "elsewhere", WALL)
    assert harness.ended == [(session_id, code, "elsewhere")]
    assert harness.code(session.token) is code
    assert (harness.registry.revoked, harness.registry.replaced) == (0, replaced)
    assert not harness.registry.end(session.record.id, code, "elsewhere", WALL)
    assert not harness.registry.end(bytes(16), code, "elsewhere", WALL)


def test_tombstone_is_restored(harness: RegistryHarness) -> None:
    session = new(harness)
    ended = tombstone(session, wall=WALL - 1)
    harness.registry.restore_ended(ended)
    harness.registry.restore_ended(ended)
    assert harness.code(session.token) is Code.TOKEN_REVOKED
    assert harness.registry.tombstones == 1
    assert harness.registry.record_of(session.record.token_digest) == replace(ended, id=b"")


def test_restored_tombstone_ends_known_session(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    harness.registry.restore_ended(tombstone(session, Code.SESSION_REPLACED))
    assert harness.code(session.token) is Code.SESSION_REPLACED
    assert len(harness.ended) == 1


def test_restored_tombstones_are_limited() -> None:
    harness = RegistryHarness(dead_limit=2)
    for number in range(5):
        harness.registry.restore_ended(
            EndedRecord(b"", digest_of(b"%d" % number), Code.TOKEN_EXPIRED, WALL + number)
        )
    assert harness.registry.tombstones == 2


# --- listing ---------------------------------------------------------------------------------------------------


def test_record_of_token_or_its_tombstone(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    assert harness.registry.record_of(session.record.token_digest) == session.record
    assert harness.registry.record(session.record.id) == session.record
    harness.registry.revoke_user("alice", "test")
    assert harness.registry.record_of(session.record.token_digest) == tombstone(session)
    assert harness.registry.record(session.record.id) is None
    assert harness.registry.record_of(digest_of(b"unknown")) is None


def test_tombstone_is_found_by_id(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    assert harness.registry.ended(session.record.id) is None
    assert harness.registry.ended(bytes(16)) is None
    harness.registry.end(session.record.id, Code.SESSION_REPLACED, "", WALL + 1)
    assert harness.registry.ended(session.record.id) == tombstone(session, Code.SESSION_REPLACED, WALL + 1)


def test_records_are_listed_oldest_first_up_to_limit(harness: RegistryHarness) -> None:
    sessions = [taken_in(harness, user, WALL + number) for number, user in ((2, "a"), (0, "b"), (1, "a"))]
    assert harness.registry.records(None, 9) == [sessions[number].record for number in (1, 2, 0)]
    assert harness.registry.records(None, 2) == [sessions[number].record for number in (1, 2)]
    assert harness.registry.records("a", 9) == [sessions[number].record for number in (0, 2)]
    assert harness.registry.records("a", 1) == [sessions[0].record]
    harness.registry.revoke_user("a", "test")
    assert harness.registry.records(None, 9) == [sessions[1].record]
    assert harness.registry.records("a", 9) == []


def test_uses_are_reported_once_in_slices(harness: RegistryHarness) -> None:
    sessions = [taken_in(harness, f"user-{number}") for number in range(40)]
    for session in sessions[::2]:
        harness.registry.check(session.token, WALL + SECOND)
    found, start = [], 0
    while True:
        start, uses = harness.registry.uses(WALL, start, 7)
        assert len(uses) <= 7
        found += uses
        if not start:
            break
    assert sorted(found) == sorted((session.record.id, WALL + SECOND) for session in sessions[::2])
    assert RegistryHarness().registry.uses(WALL, 0, 7) == (0, [])


# --- rotation by a store ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_process", [True, False])
def test_rotation_by_store_is_applied(same_process: bool) -> None:
    here = RegistryHarness()
    session = taken_in(here)
    store: SessionRegistry = here.registry if same_process else moved(here).registry
    rotation, token, refresh_token = rotation_of(here, session, WALL + MINUTE, "zc/2", "192.0.2.9")
    record, old = store.rotate(rotation)
    assert old == session.record.token_digest
    opened = here.registry.apply_rotation(record, rotation.spent_digest, token, refresh_token, WALL + MINUTE)
    assert (opened.token, opened.refresh_token) == (token, refresh_token)
    assert here.good(token, WALL + MINUTE).expires_at == record.expires_at == WALL + MINUTE + DAY
    assert here.code(session.token, WALL + MINUTE) is Code.TOKEN_REVOKED
    assert here.registry.record(session.record.id) == record
    assert (record.client, record.address) == ("zc/2", "192.0.2.9")
    assert here.ended == []


def test_rotation_inserts_unknown_session() -> None:
    here, store = RegistryHarness(), RegistryHarness()
    session = taken_in(store)
    made = rotation_of(here, session)
    record, _ = store.registry.rotate(made[0])
    here.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    assert here.good(made[1]).user == "alice"


def test_rotation_does_not_revive_ended_session() -> None:
    here = RegistryHarness()
    session = taken_in(here)
    store = moved(here)
    made = rotation_of(here, session)
    record, _ = store.registry.rotate(made[0])
    here.registry.revoke_user("alice", "test")
    with pytest.raises(TokenRevoked):
        here.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    assert here.code(made[1]) is Code.UNAUTHENTICATED


def test_repeated_refresh_within_grace_gives_same_pair(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    spent = session.refresh_token or b""
    made = rotation_of(harness, session, WALL, "zc/1", "192.0.2.1")
    assert harness.registry.repeat_refresh(spent, client="zc/1", address="192.0.2.1", wall=WALL) is None
    record, _ = harness.registry.rotate(made[0])
    harness.registry.apply_rotation(record, made[0].spent_digest, made[1], made[2], WALL)
    again = harness.registry.repeat_refresh(spent, client="zc/1", address="192.0.2.1", wall=WALL + SECOND)
    assert again is not None
    assert (again.token, again.refresh_token) == made[1:]
    for client, address, wall in (
        ("zc/2", "192.0.2.1", WALL),
        ("zc/1", "192.0.2.2", WALL),
        ("zc/1", "192.0.2.1", WALL + 10 * SECOND),
    ):
        assert harness.registry.repeat_refresh(spent, client=client, address=address, wall=wall) is None
    assert harness.registry.repeat_refresh(b"short", client="zc/1", address="192.0.2.1", wall=WALL) is None


def test_invalid_refresh_token_gives_no_rotation() -> None:
    assert RegistryHarness().registry.new_rotation(b"short", client="", address="", wall=WALL) is None


def test_reused_refresh_token_ends_session_in_store(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    first, second = rotation_of(harness, session), rotation_of(harness, session)
    harness.registry.rotate(first[0])
    with pytest.raises(TokenRevoked):
        harness.registry.rotate(second[0])
    assert harness.registry.refresh_reused == 1
    with pytest.raises(TokenRevoked):
        harness.registry.rotate(second[0])
    with pytest.raises(Unauthenticated):
        harness.registry.rotate(replace(second[0], id=bytes(16)))


def test_rotation_after_refresh_expiry_is_refused(harness: RegistryHarness) -> None:
    session = taken_in(harness)
    late = rotation_of(harness, session, WALL + 30 * DAY)
    with pytest.raises(TokenExpired):
        harness.registry.rotate(late[0])
