"""Records, times and limits for the tests of stores."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Protocol

from zcproto.errors import Code
from zcproto.sessions.record import EndedRecord, Rotation, SessionRecord, UserLimit
from zcproto.stores.answers import DEFAULT_LIMITS, AnswerLimits
from zcproto.stores.base import Created, SessionStore

WALL = 1_700_000_000_000
SECOND = 1_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
LAST = 2**63 - 1

IDLE = HOUR
FIVE = UserLimit(5, "refuse", IDLE)
ONE = UserLimit(1, "refuse", IDLE)
EVICT_ONE = UserLimit(1, "evict_oldest", IDLE)
EVICT_TWO = UserLimit(2, "evict_oldest", IDLE)

KEEP_ENDED = 10 * MINUTE
LEASE = MINUTE
KEEP = 10 * MINUTE

STRINGS = {
    "empty": "",
    "long": 128 * "x",
    "two bytes": 128 * "\u00e9",
    "three bytes": 128 * "\u4e16",
    "four bytes": 128 * "\U0001f511",
    "quotes": "'\"\\`; DROP TABLE sessions; --",
    "spaces": " a  b ",
    "glob": "{a}*?[b]:%s_%",
    "combining": "e\u0301\u200d\u202e",
    "controls": "a\0b\nc\r\td\x7f",
    "a lone surrogate": "a\ud800b",
    "a number": "0012",
}

DIGESTS = {
    "zeros": bytes(32),
    "ones": 32 * b"\xff",
    "white space": b" \n\r\t\0\x0b\x0c,:;'\"\\" + 19 * b" ",
    "every byte": bytes(range(32)),
}


class StoreTime:
    """The time that a store counts by how long answers are kept. Tests set `ms`."""

    def __init__(self) -> None:
        self.ms = WALL

    def __call__(self) -> int:
        return self.ms


class Harness(Protocol):
    """Makes stores of one kind. All stores of one harness have the same data."""

    time: StoreTime

    async def make_store(self, answers: AnswerLimits = DEFAULT_LIMITS) -> SessionStore:
        """Return an open and empty store, with the idle limit IDLE and tombstones kept for KEEP_ENDED."""
        ...

    async def reopen(self, store: SessionStore) -> SessionStore:
        """Close a store that outlives its process, and return another open one with the same data."""
        ...


def digest(name: str) -> bytes:
    return sha256(name.encode()).digest()


def session(number: int = 1, user: str = "alice", wall: int = WALL, **changes: object) -> SessionRecord:
    """Return one of any number of sessions, opened at `wall`."""
    record = SessionRecord(
        id=digest(f"id {number}")[:16],
        token_digest=digest(f"token {number}"),
        refresh_digest=digest(f"refresh {number}"),
        user=user,
        client="zc/1",
        address="192.0.2.1",
        flags=0,
        created_at=wall,
        last_used_at=wall,
        expires_at=wall + DAY,
        refresh_expires_at=wall + 30 * DAY,
    )
    return record._replace(**changes)  # type: ignore[arg-type]


def rotation(
    record: SessionRecord, number: int = 1, wall: int = WALL + MINUTE, **changes: object
) -> Rotation:
    """Return a rotation with the current refresh token of a session."""
    wanted = Rotation(
        id=record.id,
        spent_digest=record.refresh_digest,
        token_digest=digest(f"token {number} of {record.token_digest.hex()}"),
        refresh_digest=digest(f"refresh {number} of {record.token_digest.hex()}"),
        expires_at=wall + DAY,
        client="zc/2",
        address="192.0.2.9",
        wall=wall,
    )
    return replace(wanted, **changes)  # type: ignore[arg-type]


def rotated(record: SessionRecord, wanted: Rotation) -> SessionRecord:
    """Return a session as it is after a rotation."""
    return record._replace(
        token_digest=wanted.token_digest,
        refresh_digest=wanted.refresh_digest,
        client=wanted.client,
        address=wanted.address,
        last_used_at=wanted.wall,
        expires_at=min(wanted.expires_at, record.refresh_expires_at),
    )


def ended(record: SessionRecord, code: Code = Code.TOKEN_REVOKED, wall: int = WALL) -> EndedRecord:
    return EndedRecord(record.id, record.token_digest, code, wall)


async def opened(store: SessionStore, *records: SessionRecord) -> None:
    for record in records:
        assert await store.create(record, UserLimit(10_000, "refuse", IDLE)) == Created()


async def loaded(store: SessionStore) -> list[SessionRecord | EndedRecord]:
    return [record async for batch in store.load() for record in batch]


async def expire_all(store: SessionStore, wall: int, limit: int = 1_000) -> int:
    """Call `expire` until a store that checks only a part per call has checked a small number of sessions."""
    removed = 0
    for _ in range(8):
        once = await store.expire(wall, KEEP_ENDED, limit)
        assert 0 <= once <= limit
        removed += once
    return removed
