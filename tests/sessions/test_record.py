"""Records of sessions as stores keep them, and who has to make room for another."""

from __future__ import annotations

import pytest

from tests.sessions.helpers import HOUR, MINUTE, WALL
from zcproto.common.roles import is_role, roles_of
from zcproto.errors import Code
from zcproto.sessions.record import (
    NO_ORIGIN,
    ROLES,
    SessionRecord,
    UserLimit,
    WhenFull,
    key_and_roles,
    pack_origin,
    stored_key,
    unpack_origin,
)


def record(number: int, *, used_at: int = WALL, expires_at: int = WALL + HOUR) -> SessionRecord:
    return SessionRecord(
        bytes([number]) * 16, bytes(32), bytes(32), "ada", "test/1", "192.0.2.7", 0, created_at=WALL,
        last_used_at=used_at, expires_at=expires_at, refresh_expires_at=WALL + 2 * HOUR,
    )  # fmt: skip


@pytest.mark.parametrize("key", ["", "device:phone", "device:a\0b"])
@pytest.mark.parametrize(("flags", "roles"), [(0, ""), (ROLES, ""), (ROLES, "admin operator")])
def test_key_and_roles_are_stored_as_one_text(key: str, flags: int, roles: str) -> None:
    stored = stored_key(record(1)._replace(key=key, flags=flags, roles=roles))
    assert key_and_roles(stored, flags) == (key, roles)


@pytest.mark.parametrize("origin", [b"", b"\1" * 8, b"\0\0\0\0\0\0\0\1", b"\1\0\0\0\0\0\0\0", NO_ORIGIN])
@pytest.mark.parametrize(("flags", "roles"), [(0, ""), (3, ""), (ROLES, "admin"), (ROLES | 1, "a@b admin@c")])
def test_origin_is_kept_among_the_roles(flags: int, roles: str, origin: bytes) -> None:
    known = record(1)._replace(flags=flags, roles=roles, origin=origin)
    packed = pack_origin(known)
    assert unpack_origin(packed) == known
    assert packed.origin == b""
    assert set(roles.split()) <= roles_of(False, packed.roles)  # as a version before reads it
    assert not any(map(is_role, roles_of(False, packed.roles) - set(roles.split())))


@pytest.mark.parametrize("mark", ["@", "@xyz", "@0102", "@" + 18 * "0", "@\u0660\u0661"])
@pytest.mark.parametrize("roles", ["", "admin"])
def test_damaged_origin_belongs_to_no_user(mark: str, roles: str) -> None:
    damaged = record(1)._replace(flags=ROLES, roles=f"{roles} {mark}".lstrip())
    assert unpack_origin(damaged) == record(1)._replace(
        flags=ROLES if roles else 0, roles=roles, origin=NO_ORIGIN
    )


LIVE, USED, IDLE = record(1), record(2), record(3, used_at=WALL - MINUTE)
EXPIRED, GONE = record(4, expires_at=WALL), record(5, expires_at=WALL)._replace(refresh_expires_at=WALL)
REPLACED, LAPSED = Code.SESSION_REPLACED, Code.TOKEN_EXPIRED


@pytest.mark.parametrize(
    ("when_full", "per_user", "records", "ending"),
    [
        ("refuse", 2, [LIVE], []),
        ("refuse", 2, [LIVE, USED], None),
        ("refuse", 2, [LIVE, IDLE], [(IDLE, LAPSED)]),
        ("refuse", 2, [EXPIRED, LIVE], [(EXPIRED, LAPSED)]),
        ("refuse", 1, [GONE], []),
        ("refuse", 1, [IDLE, EXPIRED], [(IDLE, LAPSED), (EXPIRED, LAPSED)]),
        ("evict_oldest", 2, [LIVE, USED], [(LIVE, REPLACED)]),
        ("evict_oldest", 1, [LIVE, USED], [(LIVE, REPLACED), (USED, REPLACED)]),
        ("evict_oldest", 2, [LIVE, USED, IDLE], [(IDLE, LAPSED), (LIVE, REPLACED)]),
        ("evict_disconnected", 2, [USED, LIVE], [(LIVE, LAPSED)]),
        ("evict_disconnected", 1, [USED, LIVE], None),
    ],
)
def test_lapsed_sessions_then_the_oldest_make_room(
    when_full: WhenFull, per_user: int, records: list[SessionRecord], ending: list[tuple[SessionRecord, Code]]
) -> None:
    limit = UserLimit(per_user, when_full, MINUTE, disconnected={LIVE.id})
    assert limit.make_room(records, WALL) == ending


def test_without_an_idle_limit_unused_sessions_are_live() -> None:
    assert UserLimit(1, "refuse", None).make_room([IDLE], WALL) is None
